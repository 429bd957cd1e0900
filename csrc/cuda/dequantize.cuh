// Whole rows of a weight as plain numbers, for products of many rows of x, which cuBLAS makes.
#pragma once

#include "cuda/gemm.cuh"
#include "cuda/numbers.cuh"

namespace llmpq {

constexpr int kDequantizeBlocks = 8;  // of 32 columns that a thread block takes: a warp writes 4 rows of 256 columns
constexpr int kDequantizeThreads = 128;

template <class X>
struct alignas(16) Eight {
  X values[kOctet];
};

struct DequantizeArgs : CudaGemmArgs {
  int64_t first_panel;
};

// Thread blocks: panels times spans of kDequantizeBlocks blocks, the latter fastest. Each thread takes four rows' octets.
//   y: [args.m, k] contiguous; each value is scale * (code - zero) in fp32, exact, or scale * code + offset, rounded to
//      fp32, and rounded to X
template <int Bits, class X>
__global__ void __launch_bounds__(kDequantizeThreads) dequantize_kernel(const DequantizeArgs args) {
  const int k = static_cast<int>(args.k);
  const int spans = (k + kDequantizeBlocks * kBlock - 1) / (kDequantizeBlocks * kBlock);
  const int64_t panel = blockIdx.x / spans;  // of those to write
  const int octet = threadIdx.x % kOctets;
  const int block = static_cast<int>(blockIdx.x % spans) * kDequantizeBlocks + threadIdx.x / kOctets % kDequantizeBlocks;
  const int begin = block * kBlock + octet * kOctet;
  if (begin >= k) return;

  const int64_t first_scale = ((args.first_panel + panel) * args.num_groups + (block >> args.group_shift)) * kPanel;
  const uint32_t* planes = static_cast<const uint32_t*>(args.qweight) +
                           ((args.first_panel + panel) * args.panel_planes + block / kChunkBlocks * kChunkPlanes<Bits>)*kPlane;
  constexpr int row_step = kDequantizeThreads / (kOctets * kDequantizeBlocks);
  for (int row = threadIdx.x / (kOctets * kDequantizeBlocks); row < kPanel; row += row_step) {
    if (panel * kPanel + row >= args.m) return;
    const int zero = args.zeros     ? static_cast<const uint8_t*>(args.zeros)[first_scale + row]
                     : args.offsets ? 0
                                    : kSymmetricZero<Bits>;
    const float scale = load_scale(args.scales, args.scale_dtype, first_scale + row);
    const float offset = args.offsets ? load_scale(args.offsets, args.scale_dtype, first_scale + row) : 0.0f;
    float values[kOctet];
    dequantize<Bits>(load_octet<Bits>(planes, block % kChunkBlocks, row * kOctets + octet), zero, values);
    X* to = static_cast<X*>(args.y) + (panel * kPanel + row) * args.k + begin;
    Eight<X> eight;
#pragma unroll
    for (int j = 0; j < kOctet; ++j) store(eight.values + j, fmaf(scale, values[j], offset));
    if (k % kOctet == 0) {  // and y starts at a multiple of 16 bytes
      *reinterpret_cast<Eight<X>*>(to) = eight;
    } else {
      for (int j = 0; j < kOctet && begin + j < k; ++j) to[j] = eight.values[j];
    }
  }
}

}  // namespace llmpq

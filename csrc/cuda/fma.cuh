// The kernel without tensor cores: for float32 x, and for what tensor cores a GPU lacks. Any m.
//
// A warp computes `Rows` x kWarpColumns outputs, its lanes share k. One order of sums, whatever m and `Rows` are, so
// that a row's result never depends on the other rows:
//   lane l takes octets (eight consecutive codes) l, l + 32, l + 64, ... of k;
//   an octet's products (code - zero) * x are summed in order by fused multiply-adds, starting at 0;
//   where there are offsets, the offset times the octet's sum of x is added to the lane's accumulator by one fused
//   multiply-add, and the zero, the middle code, times the sum of x to the sum of products by another;
//   that sum times the scale is added to the lane's accumulator by one fused multiply-add;
//   the 32 accumulators are summed as a binary tree (lane distance 16, 8, 4, 2, 1), then bias and residual are added.
// All of it is fp32 and spelled out with fmaf, which leaves the compiler nothing to reorder or contract.
#pragma once

#include <math.h>

#include "cuda/gemm.cuh"
#include "cuda/numbers.cuh"

namespace llmpq {

constexpr int kFmaWarps = 4;     // per thread block; they share nothing but the cached x
constexpr int kWarpColumns = 4;  // outputs along n per warp: each loaded x is used that often

// How many blocks of a kernel an SM is to hold at once: with eight rows the compiler would rather spill than hold three.
template <int Rows>
constexpr int kFmaResident = Rows == 8 ? 3 : 1;

template <class X>
struct alignas(16) Octet {
  X values[kOctet];
};

// Eight elements of a row of x as fp32; those from `valid` on lie past the end of the row and count as 0.
//   aligned: x and its rows start at multiples of 16 bytes, so that 16-byte loads are allowed
template <class X>
LLMPQ_DEVICE void load_octet_of_x(const X* x, int valid, bool aligned, float (&values)[kOctet]) {
  if (aligned && valid >= kOctet) {
    const Octet<X> octet = *reinterpret_cast<const Octet<X>*>(x);
#pragma unroll
    for (int j = 0; j < kOctet; ++j) values[j] = to_float(octet.values[j]);
  } else {
#pragma unroll
    for (int j = 0; j < kOctet; ++j) values[j] = j < valid ? to_float(x[j]) : 0.0f;
  }
}

// Thread blocks: ceil(m / Rows) times ceil(n / (kFmaWarps * kWarpColumns)), in one dimension, row tiles fastest: blocks
// that run at the same time read the same weights. Past the last row or column the last one is computed again, not
// stored.
template <int Bits, class X, int Rows, bool HasOffsets>
__global__ void __launch_bounds__(kFmaWarps* kLanes, kFmaResident<Rows>) fma_kernel(const CudaGemmArgs args) {
  const int lane = threadIdx.x % kLanes;
  const int64_t row_tiles = (args.m + Rows - 1) / Rows;
  const int64_t row_begin = blockIdx.x % row_tiles * Rows;
  const int64_t column_begin = (blockIdx.x / row_tiles * kFmaWarps + threadIdx.x / kLanes) * kWarpColumns;
  if (column_begin >= args.n) return;  // the whole warp: the shuffles below stay complete

  const int k = static_cast<int>(args.k);
  const bool aligned = (reinterpret_cast<uintptr_t>(args.x) | args.x_stride * sizeof(X)) % sizeof(Octet<__half>) == 0;

  const uint32_t* planes[kWarpColumns];  // of this column's panel
  int words[kWarpColumns];               // the column's first word in a plane
  int64_t groups[kWarpColumns];          // index of its first scale
#pragma unroll
  for (int c = 0; c < kWarpColumns; ++c) {
    const int64_t column = column_begin + c < args.n ? column_begin + c : args.n - 1;
    const int panel = static_cast<int>(column / kPanel);
    const int row = static_cast<int>(column % kPanel);
    planes[c] = static_cast<const uint32_t*>(args.qweight) + int64_t{panel} * args.panel_planes * kPlane;
    words[c] = row * kOctets;
    groups[c] = int64_t{panel} * args.num_groups * kPanel + row;
  }
  const X* x[Rows];
#pragma unroll
  for (int r = 0; r < Rows; ++r) {
    const int64_t row = row_begin + r < args.m ? row_begin + r : args.m - 1;
    x[r] = static_cast<const X*>(args.x) + row * args.x_stride;
  }

  float sums[Rows][kWarpColumns] = {};
  for (int begin = lane * kOctet; begin < k; begin += kLanes * kOctet) {
    const int block = begin / kBlock, octet = begin / kOctet % kOctets;
    const int64_t group = int64_t{block >> args.group_shift} * kPanel;
    const int chunk_plane = block / kChunkBlocks * kChunkPlanes<Bits>;
    float weights[kWarpColumns][kOctet];
    float scales[kWarpColumns];
#pragma unroll
    for (int c = 0; c < kWarpColumns; ++c) {
      const int zero = args.zeros ? static_cast<const uint8_t*>(args.zeros)[groups[c] + group] : kSymmetricZero<Bits>;
      scales[c] = load_scale(args.scales, args.scale_dtype, groups[c] + group);
      dequantize<Bits>(load_octet<Bits>(planes[c] + chunk_plane * kPlane, block % kChunkBlocks, words[c] + octet), zero,
                       weights[c]);
    }
#pragma unroll
    for (int r = 0; r < Rows; ++r) {
      float inputs[kOctet];
      load_octet_of_x(x[r] + begin, k - begin, aligned, inputs);
      float x_sum = 0.0f;
      if constexpr (HasOffsets) {
#pragma unroll
        for (int j = 0; j < kOctet; ++j) x_sum += inputs[j];
      }
#pragma unroll
      for (int c = 0; c < kWarpColumns; ++c) {
        float dot = 0.0f;
#pragma unroll
        for (int j = 0; j < kOctet; ++j) dot = fmaf(weights[c][j], inputs[j], dot);
        if constexpr (HasOffsets) {
          sums[r][c] = fmaf(load_scale(args.offsets, args.scale_dtype, groups[c] + group), x_sum, sums[r][c]);
          dot = fmaf(kSymmetricZero<Bits>, x_sum, dot);
        }
        sums[r][c] = fmaf(scales[c], dot, sums[r][c]);
      }
    }
  }

  float own = 0.0f;  // the output that this lane writes
  static_assert(Rows * kWarpColumns <= kLanes, "a lane writes at most one");
#pragma unroll
  for (int r = 0; r < Rows; ++r) {
#pragma unroll
    for (int c = 0; c < kWarpColumns; ++c) {
      const float sum = warp_sum(sums[r][c]);
      own = lane == r * kWarpColumns + c ? sum : own;
    }
  }
  const int64_t row = row_begin + lane / kWarpColumns, column = column_begin + lane % kWarpColumns;
  if (lane >= Rows * kWarpColumns || row >= args.m || column >= args.n) return;
  if (args.bias) own += to_float(static_cast<const X*>(args.bias)[column]);
  if (args.residual) {
    own = rounded<X>(own) +
          to_float(static_cast<const X*>(args.residual)[row * args.residual_stride + column]);
  }
  store(static_cast<X*>(args.y) + row * args.y_stride + column, own);
}

}  // namespace llmpq

// The kernel for every m: a warp computes `Rows` x kColumns outputs, its lanes share k.
//
// One reduction order along k, whatever m and `Rows` are, so that a row's result never depends on the other rows:
//   lane l takes octets (eight consecutive codes) l, l + 32, l + 64, ... of k;
//   an octet's products (code - zero) * x are summed in order by fused multiply-adds, starting at 0;
//   that sum times the scale is added to the lane's accumulator by one fused multiply-add;
//   the 32 accumulators are summed as a binary tree (lane distance 16, 8, 4, 2, 1), then the bias is added.
// All of it is fp32 and spelled out with fmaf, which leaves the compiler nothing to reorder or contract.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <math.h>

#include "cuda/dequant.cuh"
#include "gemm.h"

namespace llmpq {

constexpr int kLanes = 32;
constexpr int kWarps = 4;    // per thread block; they share nothing but the cached x
constexpr int kColumns = 4;  // outputs along n per warp: each loaded x is used that often

__device__ __forceinline__ float to_float(float value) { return value; }
__device__ __forceinline__ float to_float(__half value) { return __half2float(value); }
__device__ __forceinline__ float to_float(__nv_bfloat16 value) { return __bfloat162float(value); }

__device__ __forceinline__ void store(float* to, float value) { *to = value; }
__device__ __forceinline__ void store(__half* to, float value) { *to = __float2half_rn(value); }
__device__ __forceinline__ void store(__nv_bfloat16* to, float value) { *to = __float2bfloat16_rn(value); }

__device__ __forceinline__ float load_scale(const GemmArgs& args, int64_t index) {
  if (args.scale_dtype == Dtype::kBFloat16) return to_float(static_cast<const __nv_bfloat16*>(args.scales)[index]);
  return to_float(static_cast<const __half*>(args.scales)[index]);
}

template <class X>
struct alignas(16) Octet {
  X values[kOctet];
};

// Eight elements of a row of x as fp32; those from `valid` on lie past the end of the row and count as 0.
//   aligned: x and its rows start at multiples of 16 bytes, so that 16-byte loads are allowed
template <class X>
__device__ __forceinline__ void load_octet(const X* x, int valid, bool aligned, float (&values)[kOctet]) {
  if (aligned && valid >= kOctet) {
    const Octet<X> octet = *reinterpret_cast<const Octet<X>*>(x);
#pragma unroll
    for (int j = 0; j < kOctet; ++j) values[j] = to_float(octet.values[j]);
  } else {
#pragma unroll
    for (int j = 0; j < kOctet; ++j) values[j] = j < valid ? to_float(x[j]) : 0.0f;
  }
}

__device__ __forceinline__ float warp_sum(float value) {
#pragma unroll
  for (int distance = kLanes / 2; distance > 0; distance /= 2) {
    value += __shfl_xor_sync(0xFFFFFFFFu, value, distance);
  }
  return value;
}

// Thread blocks: ceil(m / Rows) times ceil(n / (kWarps * kColumns)), in one dimension, row tiles fastest: blocks that
// run at the same time read the same weights. Past the last row or column the last one is computed again, not stored.
//   qweight: uint32 [n, ceil(k / 32) * Bits]; scales, zeros: [n, ceil(k / group_size)]
template <int Bits, class X, int Rows>
__global__ void __launch_bounds__(kWarps* kLanes) gemm_kernel(const GemmArgs args) {
  const int lane = threadIdx.x % kLanes;
  const int64_t row_tiles = (args.m + Rows - 1) / Rows;
  const int64_t row_begin = blockIdx.x % row_tiles * Rows;
  const int64_t column_begin = (blockIdx.x / row_tiles * kWarps + threadIdx.x / kLanes) * kColumns;
  if (column_begin >= args.n) return;  // the whole warp: the shuffles below stay complete

  const int k = static_cast<int>(args.k);
  const int group_size = static_cast<int>(args.group_size);
  const int64_t num_groups = (k + group_size - 1) / group_size;
  const int64_t words_per_row = static_cast<int64_t>((k + kBlock - 1) / kBlock) * Bits;
  const bool aligned = (reinterpret_cast<uintptr_t>(args.x) | args.x_stride * sizeof(X)) % sizeof(Octet<__half>) == 0;

  const uint32_t* blocks[kColumns];  // this column's packed row
  int64_t groups[kColumns];          // index of its first scale
#pragma unroll
  for (int c = 0; c < kColumns; ++c) {
    const int64_t column = column_begin + c < args.n ? column_begin + c : args.n - 1;
    blocks[c] = static_cast<const uint32_t*>(args.qweight) + column * words_per_row;
    groups[c] = column * num_groups;
  }
  const X* x[Rows];
#pragma unroll
  for (int r = 0; r < Rows; ++r) {
    const int64_t row = row_begin + r < args.m ? row_begin + r : args.m - 1;
    x[r] = static_cast<const X*>(args.x) + row * args.x_stride;
  }

  float sums[Rows][kColumns] = {};
  for (int begin = lane * kOctet; begin < k; begin += kLanes * kOctet) {
    const int group = begin / group_size;
    float weights[kColumns][kOctet];
    float scales[kColumns];
#pragma unroll
    for (int c = 0; c < kColumns; ++c) {
      const int zero = args.zeros ? static_cast<const uint8_t*>(args.zeros)[groups[c] + group] : 1 << (Bits - 1);
      scales[c] = load_scale(args, groups[c] + group);
      dequantize_octet<Bits>(blocks[c] + begin / kBlock * Bits, begin / kOctet % kOctets, code_shift(zero), weights[c]);
    }
#pragma unroll
    for (int r = 0; r < Rows; ++r) {
      float inputs[kOctet];
      load_octet(x[r] + begin, k - begin, aligned, inputs);
#pragma unroll
      for (int c = 0; c < kColumns; ++c) {
        float dot = 0.0f;
#pragma unroll
        for (int j = 0; j < kOctet; ++j) dot = fmaf(weights[c][j], inputs[j], dot);
        sums[r][c] = fmaf(scales[c], dot, sums[r][c]);
      }
    }
  }

#pragma unroll
  for (int r = 0; r < Rows; ++r) {
#pragma unroll
    for (int c = 0; c < kColumns; ++c) {
      const float sum = warp_sum(sums[r][c]);
      const int64_t row = row_begin + r, column = column_begin + c;
      if (lane != 0 || row >= args.m || column >= args.n) continue;
      const float bias = args.bias ? to_float(static_cast<const X*>(args.bias)[column]) : 0.0f;
      store(static_cast<X*>(args.y) + row * args.y_stride + column, sum + bias);
    }
  }
}

}  // namespace llmpq

// What a matrix product with quantized weights is given: one parameter struct for CPU and CUDA.
//
//   y[m, n] = x[m, k] @ w[n, k].T + bias[n] + residual[m, n],   w = scale * (code - zero) or scale * code + offset
//
// with one scale and zero or offset per group along k. Bias and residual are added after the product, in this order.
//
// How the codes lie in memory is each backend's own affair (csrc/cpu/kernels.h, csrc/cuda/dequant.cuh).
#pragma once

#include <cstdint>

namespace llmpq {

enum class Dtype : int { kFloat32 = 0, kFloat16 = 1, kBFloat16 = 2 };

// How x is multiplied: as it is, or rounded to a sum of int8 terms, each with a scale for a group of columns
// (llmpq/quant/activations.py). The CUDA kernels have the first only.
enum class Activations : int { kFloat = 0, kInt8 = 1, kInt8x2 = 2 };

// How a group's zero is given: not at all, it being 2^(bits - 1); as a code; or as the weight of code 0.
enum class Zero : int { kSymmetric = 0, kInteger = 1, kOffset = 2 };

struct GemmArgs {
  const void* x;        // [m, k] of x_dtype, rows x_stride elements apart
  const void* qweight;  // codes; for bits = 16 the weights themselves, of scale_dtype
  const void* scales;   // per group of every row, of scale_dtype; null for bits = 16
  const void* zeros;    // uint8, as scales; null: zero = 2^(bits - 1), unless there are offsets
  const void* offsets;  // of scale_dtype, as scales; null: none
  const void* bias;     // [n] of x_dtype, on a CPU float32; null: none
  const void* residual;  // [m, n] of x_dtype, rows y_stride elements apart, on a GPU residual_stride; null: none
  void* y;              // [m, n] of x_dtype, rows y_stride elements apart
  int64_t m, n, k;
  int64_t x_stride, y_stride;
  int64_t group_size;  // codes along k that share a scale; k: the whole row
  int bits;            // 3, 4, 8 or 16
  Dtype x_dtype;
  Dtype scale_dtype;
  Activations activations;

  Zero zero() const {
    return offsets != nullptr ? Zero::kOffset : zeros != nullptr ? Zero::kInteger : Zero::kSymmetric;
  }
};

}  // namespace llmpq

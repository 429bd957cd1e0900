// 16-bit and 32-bit floats in memory, as the kernels compute with them.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "cuda/dequant.cuh"
#include "gemm.h"

namespace llmpq {

LLMPQ_DEVICE float to_float(float value) { return value; }
LLMPQ_DEVICE float to_float(__half value) { return __half2float(value); }
LLMPQ_DEVICE float to_float(__nv_bfloat16 value) { return __bfloat162float(value); }

LLMPQ_DEVICE void store(float* to, float value) { *to = value; }
LLMPQ_DEVICE void store(__half* to, float value) { *to = __float2half_rn(value); }
LLMPQ_DEVICE void store(__nv_bfloat16* to, float value) { *to = __float2bfloat16_rn(value); }

// `value` as an X has it.
template <class X>
LLMPQ_DEVICE float rounded(float value) {
  X stored;
  store(&stored, value);
  return to_float(stored);
}

// A scale or offset of `dtype`, in the lower half of `bits`.
LLMPQ_DEVICE float scale_of(uint32_t bits, Dtype dtype) {
  return dtype == Dtype::kBFloat16 ? float_of_bits(bits << 16)
                                   : __half2float(__ushort_as_half(static_cast<unsigned short>(bits)));
}

// Scale or offset `index` of an array of `dtype`.
LLMPQ_DEVICE float load_scale(const void* scales, Dtype dtype, int64_t index) {
  return scale_of(static_cast<const uint16_t*>(scales)[index], dtype);
}

// What is taken off the codes where there are no zero points.
template <int Bits>
constexpr int kSymmetricZero = 1 << (Bits - 1);

}  // namespace llmpq

// The two 16-bit floating types as bit patterns.
#pragma once

#include <cstdint>
#include <cstring>

#include "gemm.h"

namespace llmpq {

static inline float float_of_bits(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

static inline uint32_t bits_of_float(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

// Without branches, so that a loop over it becomes vector code: the product moves the exponent's bias, subnormal
// numbers included; infinities and NaNs get the exponent that it cannot give them.
static inline float float_of_half(uint16_t half) {
  const float magnitude = float_of_bits((half & 0x7fffu) << 13) * 0x1p112f;
  const uint32_t special = (half & 0x7c00u) == 0x7c00u ? 0x7f800000u : 0u;
  return float_of_bits(bits_of_float(magnitude) | special | (half & 0x8000u) << 16);
}

// To the nearest, ties to even, for |value| <= 65504; a NaN stays one.
static inline uint16_t half_of_float(float value) {
  const uint32_t bits = bits_of_float(value), sign = bits >> 16 & 0x8000u;
  const float magnitude = float_of_bits(bits & 0x7fffffffu);
  if (value != value) return static_cast<uint16_t>(sign | 0x7e00u);
  // Subnormal numbers have steps of 2^-24, which are those of floats between 1/2 and 1.
  if (magnitude < 0x1p-14f) {
    return static_cast<uint16_t>(sign | (bits_of_float(magnitude + 0.5f) - bits_of_float(0.5f)));
  }
  const uint32_t moved = (bits & 0x7fffffffu) - (112u << 23);
  return static_cast<uint16_t>(sign | (moved + 0xfffu + (moved >> 13 & 1u)) >> 13);
}

static inline float float_of_bfloat16(uint16_t half) { return float_of_bits(uint32_t{half} << 16); }

// To the nearest, ties to even; a NaN stays one.
static inline uint16_t bfloat16_of_float(float value) {
  const uint32_t bits = bits_of_float(value);
  if (value != value) return static_cast<uint16_t>(bits >> 16 | 0x40u);
  return static_cast<uint16_t>((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
}

static inline float float_of(uint16_t half, Dtype dtype) {
  return dtype == Dtype::kFloat16 ? float_of_half(half) : float_of_bfloat16(half);
}

}  // namespace llmpq

// What a KV cache holds, for an instruction set V: numbers of float32 or float16 (uint16_t), or int8 codes, whose scale
// is that of a token's key or value in one head.
#pragma once

#include <type_traits>

#include "cpu/kernels.h"

namespace llmpq {

template <class T>
constexpr bool kHasScales = std::is_same_v<T, int8_t>;

template <class T>
struct Held {
  using Type = T;
};

// body(Held<T>{}) for the T that a cache holds.
template <class Body>
LLMPQ_INLINE void with_cached(const KvCache& cache, Body&& body) {
  if (cache.bytes == 1) return body(Held<int8_t>{});
  if (cache.bytes == 2) return body(Held<uint16_t>{});
  body(Held<float>{});
}

// Sixteen numbers, or codes as they are.
template <class V>
LLMPQ_INLINE typename V::F load_cached(const int8_t* p) {
  return V::load_int8(p);
}
template <class V>
LLMPQ_INLINE typename V::F load_cached(const uint16_t* p) {
  return V::load_float16(reinterpret_cast<const uint8_t*>(p));
}
template <class V>
LLMPQ_INLINE typename V::F load_cached(const float* p) {
  return V::load(p);
}

// How a key or value x [head_dim] becomes what the cache holds.
template <class V, class T>
struct Conversion;

template <class V>
struct Conversion<V, float> {
  LLMPQ_INLINE Conversion(const float*, int64_t) {}
  LLMPQ_INLINE void store(float* p, typename V::F x) const { V::store(p, x); }
};

// Numbers that float16 cannot hold become its largest; NaN stays NaN.
template <class V>
struct Conversion<V, uint16_t> {
  LLMPQ_INLINE Conversion(const float*, int64_t) {}
  LLMPQ_INLINE void store(uint16_t* p, typename V::F x) const {
    constexpr float kLargest = 65504.0f;
    const auto within = V::min(V::broadcast(kLargest), V::max(V::broadcast(-kLargest), x));
    V::store_float16(reinterpret_cast<uint8_t*>(p), within);
  }
};

// The scale is a 127th of the largest |x|, a code the whole number nearest to x / scale, of two the even one. A head of
// zeros has the scale 0, one with an infinity or NaN the scale NaN.
template <class V>
struct Conversion<V, int8_t> {
  using F = typename V::F;
  static constexpr float kLargest = 127.0f;
  float scale;
  F divisor;

  LLMPQ_INLINE Conversion(const float* x, int64_t head_dim) {
    F largest = V::zero(), check = V::zero();  // check: NaN where a number is infinite or NaN
    for (int64_t d = 0; d < head_dim; d += kLanes) {
      const F part = V::load_first(x + d, head_dim - d < kLanes ? static_cast<int>(head_dim - d) : kLanes);
      largest = V::max(largest, V::max(part, V::sub(V::zero(), part)));
      check = V::add(check, V::sub(part, part));
    }
    const float poison = V::sum(check);
    scale = poison == 0.0f ? V::largest(largest) / kLargest : poison;
    divisor = V::broadcast(scale > 0.0f ? scale : 1.0f);
  }
  LLMPQ_INLINE void store(int8_t* p, F x) const {
    // What is NaN, or too large for a subnormal scale, becomes a code all the same.
    const F steps = V::max(V::div(x, divisor), V::broadcast(-kLargest));
    V::store_int8(p, V::round(V::min(steps, V::broadcast(kLargest))), false);
  }
};

}  // namespace llmpq

// RMS and layer norm of one row, for an instruction set V. Sums run down the 16 lanes, then across them.
#pragma once

#include "cpu/kernels.h"

namespace llmpq {

// body(offset, lanes) for the vectors of a row; all but the last have 16 lanes.
template <class F>
inline void for_vectors(int64_t size, const F& body) {
  int64_t i = 0;
  for (; i + kLanes <= size; i += kLanes) body(i, kLanes);
  if (i < size) body(i, static_cast<int>(size - i));
}

template <class V>
inline float inverse_root(float mean_square, float eps) {
  return 1.0f / __builtin_sqrtf(mean_square + eps);
}

template <class V>
void rms_norm_row(const NormArgs& a, int64_t row) {
  const float* x = a.x + row * a.x_stride;
  float* y = a.y + row * a.size;
  auto squares = V::zero();
  for_vectors(a.size, [&](int64_t i, int lanes) {
    const auto v = V::load_first(x + i, lanes);
    squares = V::fma(v, v, squares);
  });
  const auto factor = V::broadcast(inverse_root<V>(V::sum(squares) / static_cast<float>(a.size), a.eps));
  for_vectors(a.size, [&](int64_t i, int lanes) {
    const auto v = V::mul(V::load_first(x + i, lanes), factor), weight = V::load_first(a.weight + i, lanes);
    const bool alone = a.residual == nullptr;
    const auto sum = alone ? V::mul(v, weight) : V::fma(v, weight, V::load_first(a.residual + row * a.size + i, lanes));
    V::store_first(y + i, sum, lanes);
  });
}

template <class V>
void layer_norm_row(const NormArgs& a, int64_t row) {
  const float* x = a.x + row * a.x_stride;
  float* y = a.y + row * a.size;
  auto total = V::zero();
  for_vectors(a.size, [&](int64_t i, int lanes) { total = V::add(total, V::load_first(x + i, lanes)); });
  const auto mean = V::broadcast(V::sum(total) / static_cast<float>(a.size));
  auto squares = V::zero();
  for_vectors(a.size, [&](int64_t i, int lanes) {
    const auto v = V::first(V::sub(V::load_first(x + i, lanes), mean), lanes);
    squares = V::fma(v, v, squares);
  });
  const auto factor = V::broadcast(inverse_root<V>(V::sum(squares) / static_cast<float>(a.size), a.eps));
  for_vectors(a.size, [&](int64_t i, int lanes) {
    const auto v = V::mul(V::sub(V::load_first(x + i, lanes), mean), factor);
    const auto bias = a.bias != nullptr ? V::load_first(a.bias + i, lanes) : V::zero();
    V::store_first(y + i, V::fma(v, V::load_first(a.weight + i, lanes), bias), lanes);
  });
}

}  // namespace llmpq

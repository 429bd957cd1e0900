// Numbers of one row times a factor, and kept below a cap, for an instruction set V.
#pragma once

#include "cpu/attention_kernel.h"
#include "cpu/norm_kernel.h"

namespace llmpq {

// tanh(x) to about 2 ulp. Near 0, where 1 - e^-2x would cancel, by six levels of Lambert's continued fraction
// x / (1 + x^2 / (3 + x^2 / (5 + ...))), which up to 1 are within 5e-10.
template <class V>
inline typename V::F hyperbolic_tangent(typename V::F x) {
  using F = typename V::F;
  const F one = V::broadcast(1.0f), size = V::max(x, V::sub(V::zero(), x)), square = V::mul(x, x);
  F above = V::fma(V::broadcast(21.0f), square, V::broadcast(1260.0f)), below = V::add(square, V::broadcast(210.0f));
  above = V::fma(above, square, V::broadcast(10395.0f));
  below = V::fma(V::fma(below, square, V::broadcast(4725.0f)), square, V::broadcast(10395.0f));
  const F near = V::div(V::mul(size, above), below);
  const F power = exp_negative<V>(V::mul(size, V::broadcast(-2.0f)));
  const F far = V::div(V::sub(one, power), V::add(one, power));
  const F result = V::select_negative(V::sub(size, one), near, far);
  return V::select_negative(x, V::sub(V::zero(), result), result);
}

template <class V>
void scale_row(const ScaleArgs& a, int64_t row) {
  float* x = a.x + row * a.stride;
  const auto factor = V::broadcast(a.factor);
  if (a.cap == 0.0f) {
    for_vectors(a.size, [&](int64_t i, int lanes) {
      V::store_first(x + i, V::mul(V::load_first(x + i, lanes), factor), lanes);
    });
    return;
  }
  const auto cap = V::broadcast(a.cap), inverse = V::broadcast(1.0f / a.cap);
  for_vectors(a.size, [&](int64_t i, int lanes) {
    const auto scaled = V::mul(V::mul(V::load_first(x + i, lanes), factor), inverse);
    V::store_first(x + i, V::mul(cap, hyperbolic_tangent<V>(scaled)), lanes);
  });
}

}  // namespace llmpq

// Functions of the exponential, for an instruction set V. A lane's result depends on nothing but the lane.
#pragma once

#include "cpu/kernels.h"

namespace llmpq {

// e^x for x <= 0, to about 1 ulp; below -87, where it would be subnormal, e^-87.
template <class V>
inline typename V::F exp_negative(typename V::F x) {
  using F = typename V::F;
  x = V::max(V::broadcast(-87.0f), x);
  const F n = V::round(V::mul(x, V::broadcast(1.44269504f)));
  // x - n ln 2, with ln 2 in two parts, the first with so few bits that its product is exact.
  F r = V::fma(n, V::broadcast(-0.693359375f), x);
  r = V::fma(n, V::broadcast(2.12194440e-4f), r);
  // Taylor's series up to r^7: |r| <= ln(2) / 2, where the rest is below 2^-27.
  constexpr float kCoefficients[] = {1.0f / 720, 1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f};
  F y = V::broadcast(1.0f / 5040);
  for (float c : kCoefficients) y = V::fma(y, r, V::broadcast(c));
  return V::mul(y, V::power_of_two(n));
}

// tanh(x), to a few ulps of its own size for small x, too.
template <class V>
inline typename V::F hyperbolic_tangent(typename V::F x) {
  using F = typename V::F;
  const F zero = V::zero(), one = V::broadcast(1.0f);
  const F size = V::max(x, V::sub(zero, x));
  const F e = exp_negative<V>(V::mul(size, V::broadcast(-2.0f)));
  const F quotient = V::div(V::sub(one, e), V::add(one, e));
  // Where 1 - e would cancel, Taylor's series up to x^11: for |x| < 0.35 the rest is below 2^-26 of it.
  constexpr float kCoefficients[] = {62.0f / 2835, -17.0f / 315, 2.0f / 15, -1.0f / 3};
  const F square = V::mul(size, size);
  F y = V::broadcast(-1382.0f / 155925);
  for (float c : kCoefficients) y = V::fma(y, square, V::broadcast(c));
  const F series = V::fma(V::mul(y, square), size, size);
  const F result = V::select_negative(V::sub(size, V::broadcast(0.35f)), series, quotient);
  return V::select_negative(x, V::sub(zero, result), result);
}

}  // namespace llmpq

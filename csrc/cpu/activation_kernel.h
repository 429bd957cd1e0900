// Activations of one row, for an instruction set V. An element's result depends on nothing but the element.
#pragma once

#include "cpu/exponentials.h"
#include "cpu/norm_kernel.h"

namespace llmpq {

// 1 / (1 + e^-x). The exponential is of -|x|, which does not overflow.
template <class V>
inline typename V::F sigmoid(typename V::F x) {
  const auto one = V::broadcast(1.0f);
  const auto small = exp_negative<V>(V::sub(V::zero(), V::max(x, V::sub(V::zero(), x))));
  return V::div(V::select_negative(x, small, one), V::add(one, small));
}

// 1 - erf(x) for x >= 0, with a relative error below 1.2e-7 (Numerical Recipes in C, 2nd edition, section 6.2, erfcc).
template <class V>
inline typename V::F complementary_error(typename V::F x) {
  using F = typename V::F;
  const F one = V::broadcast(1.0f);
  const F t = V::div(one, V::fma(x, V::broadcast(0.5f), one));
  constexpr float kCoefficients[] = {-0.82215223f, 1.48851587f,  -1.13520398f, 0.27886807f, -0.18628806f,
                                     0.09678418f,  0.37409196f, 1.00002368f,  -1.26551223f};
  F y = V::broadcast(0.17087277f);
  for (float c : kCoefficients) y = V::fma(y, t, V::broadcast(c));
  return V::mul(t, exp_negative<V>(V::sub(y, V::mul(x, x))));
}

template <class V, Activation A>
inline typename V::F activated(typename V::F x) {
  using F = typename V::F;
  if constexpr (A == Activation::kSilu) return V::mul(x, sigmoid<V>(x));
  if constexpr (A == Activation::kRelu) return V::max(V::zero(), x);
  if constexpr (A == Activation::kGelu) {
    const F negative = V::sub(V::zero(), x);
    const F tail = complementary_error<V>(V::mul(V::max(x, negative), V::broadcast(0.70710678f)));
    const F half = V::mul(V::mul(x, V::broadcast(0.5f)), tail);
    return V::select_negative(x, half, V::sub(x, half));
  }
  // gelu_tanh: (1 + tanh(u)) / 2 is the sigmoid of 2 u.
  const F cube = V::mul(V::mul(x, x), x);
  const F u = V::mul(V::fma(cube, V::broadcast(0.044715f), x), V::broadcast(1.59576912f));
  return V::mul(x, sigmoid<V>(u));
}

template <class V, Activation A>
void activate_row_with(const ActivationArgs& a, int64_t row) {
  float* x = a.x + row * a.stride;
  const float* up = x + a.size;
  for_vectors(a.size, [&](int64_t i, int lanes) {
    auto y = activated<V, A>(V::load_first(x + i, lanes));
    if (a.gated) y = V::mul(y, V::load_first(up + i, lanes));
    V::store_first(x + i, y, lanes);
  });
}

template <class V>
void swiglu_clamped_row(const ActivationArgs& a, int64_t row) {
  float* x = a.x + row * a.stride;
  const float* up = x + a.size;
  const auto most = V::broadcast(7.0f), least = V::broadcast(-7.0f);
  for_vectors(a.size, [&](int64_t i, int lanes) {
    const auto gate = V::min(most, V::load_first(x + i, lanes));
    const auto factor = V::add(V::max(least, V::min(most, V::load_first(up + i, lanes))), V::broadcast(1.0f));
    const auto y = V::mul(gate, sigmoid<V>(V::mul(gate, V::broadcast(1.702f))));
    V::store_first(x + i, V::mul(y, factor), lanes);
  });
}

template <class V>
void activate_row(const ActivationArgs& a, int64_t row) {
  switch (a.activation) {
    case Activation::kSilu:
      return activate_row_with<V, Activation::kSilu>(a, row);
    case Activation::kRelu:
      return activate_row_with<V, Activation::kRelu>(a, row);
    case Activation::kGelu:
      return activate_row_with<V, Activation::kGelu>(a, row);
    case Activation::kGeluTanh:
      return activate_row_with<V, Activation::kGeluTanh>(a, row);
    case Activation::kSwigluClamped:
      return swiglu_clamped_row<V>(a, row);
  }
}

}  // namespace llmpq

// Numbers of one row times a factor, and kept below a cap, for an instruction set V.
#pragma once

#include "cpu/exponentials.h"
#include "cpu/norm_kernel.h"

namespace llmpq {

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

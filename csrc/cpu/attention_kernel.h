// Causal attention for an instruction set V: keys in tiles of 64 from the first on, with a running maximum and sum.
//
// A tile is used for all rows (tokens x heads of one kv head) of a task while it is in the L1 cache. What a row adds
// up, and in which order, depends on its own position only. Nothing beyond a row's position is read.
#pragma once

#include "cpu/kernels.h"

namespace llmpq {

constexpr int kKeys = 64;  // keys of a tile

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

// scores[64] = q . keys[0..count), columns beyond count being those of the last key.
template <class V>
inline void dot_keys(const float* q, const float* keys, int64_t head_dim, int count, float* scores) {
  using F = typename V::F;
  const int64_t whole = head_dim / kLanes * kLanes;
  const int rest = static_cast<int>(head_dim - whole);
  for (int first = 0; first < count; first += kLanes) {
    F products[kLanes];
    for (int i = 0; i < kLanes; i += 4) {
      const float* key[4];
      F sum[4];
      for (int j = 0; j < 4; ++j) {
        const int at = first + i + j;
        key[j] = keys + (at < count ? at : count - 1) * head_dim;
        sum[j] = V::zero();
      }
      for (int64_t d = 0; d < whole; d += kLanes) {
        const F qs = V::load(q + d);
        for (int j = 0; j < 4; ++j) sum[j] = V::fma(qs, V::load(key[j] + d), sum[j]);
      }
      if (rest > 0) {
        const F qs = V::load(q + whole);
        for (int j = 0; j < 4; ++j) sum[j] = V::fma(qs, V::load_first(key[j] + whole, rest), sum[j]);
      }
      for (int j = 0; j < 4; ++j) products[i + j] = sum[j];
    }
    V::store(scores + first, V::sums(products));
  }
}

// out[N vectors] = out * keep + weights[0..count) @ values, for columns of which the last vector has `rest`.
template <class V, int N>
inline void add_values(const float* weights, const float* values, int64_t head_dim, int count, int rest,
                       typename V::F keep, float* out) {
  typename V::F sum[N];
  for (int i = 0; i < N; ++i) sum[i] = V::zero();
  for (int t = 0; t < count; ++t) {
    const auto weight = V::broadcast(weights[t]);
    const float* value = values + t * head_dim;
    for (int i = 0; i < N - 1; ++i) sum[i] = V::fma(weight, V::load(value + i * kLanes), sum[i]);
    const float* last = value + (N - 1) * kLanes;
    sum[N - 1] = V::fma(weight, rest == kLanes ? V::load(last) : V::load_first(last, rest), sum[N - 1]);
  }
  for (int i = 0; i < N; ++i) V::store(out + i * kLanes, V::fma(V::load(out + i * kLanes), keep, sum[i]));
}

template <class V>
void attention_task(const AttentionTask& task, float* scratch) {
  using F = typename V::F;
  const AttentionArgs& a = *task.args;
  const int64_t head_dim = a.head_dim, padded = ceil_div(head_dim, kLanes) * kLanes;
  const int64_t heads = a.heads / a.kv_heads, rows = task.tokens * heads;
  float *q = scratch, *out = q + rows * padded, *maxima = out + rows * padded, *totals = maxima + rows;
  const auto head_of = [&](int64_t row, int64_t stride) {
    return (task.first_token + row / heads) * stride + (task.kv_head * heads + row % heads) * head_dim;
  };
  for (int64_t row = 0; row < rows; ++row) {
    const float* from = a.q + head_of(row, a.q_stride);
    for (int64_t d = 0; d < padded; ++d) q[row * padded + d] = d < head_dim ? from[d] : 0.0f;
    for (int64_t d = 0; d < padded; ++d) out[row * padded + d] = 0.0f;
    maxima[row] = -__builtin_inff();
    totals[row] = 0.0f;
  }

  const int64_t length = task.first_position + task.tokens;
  const int64_t cache = (task.slot * a.kv_heads + task.kv_head) * a.max_len * head_dim;
  alignas(64) float weights[kKeys];
  for (int64_t start = 0; start < length; start += kKeys) {
    const float* keys = a.k_cache + cache + start * head_dim;
    const float* values = a.v_cache + cache + start * head_dim;
    for (int64_t row = 0; row < rows; ++row) {
      const int64_t seen = task.first_position + row / heads + 1 - start;
      if (seen <= 0) continue;
      const int count = seen < kKeys ? static_cast<int>(seen) : kKeys;
      dot_keys<V>(q + row * padded, keys, head_dim, count, weights);
      F largest = V::broadcast(maxima[row]);
      for (int t = 0; t < count; t += kLanes) {  // a repeated last key does not change the maximum
        V::store(weights + t, V::mul(V::load(weights + t), V::broadcast(a.scale)));
        largest = V::max(largest, V::load(weights + t));
      }
      largest = V::broadcast(V::largest(largest));
      const F keep = exp_negative<V>(V::sub(V::broadcast(maxima[row]), largest));
      F total = V::zero();
      for (int t = 0; t < count; t += kLanes) {
        F weight = exp_negative<V>(V::sub(V::load(weights + t), largest));
        if (count - t < kLanes) weight = V::first(weight, count - t);
        V::store(weights + t, weight);
        total = V::add(total, weight);
      }
      maxima[row] = V::lane(largest);
      totals[row] = totals[row] * V::lane(keep) + V::sum(total);
      for (int64_t d = 0; d < head_dim; d += 4 * kLanes) {
        const int64_t left = head_dim - d;
        const int rest = left >= 4 * kLanes ? kLanes : static_cast<int>((left - 1) % kLanes) + 1;
        float* to = out + row * padded + d;
        if (left > 3 * kLanes) {
          add_values<V, 4>(weights, values + d, head_dim, count, rest, keep, to);
        } else if (left > 2 * kLanes) {
          add_values<V, 3>(weights, values + d, head_dim, count, rest, keep, to);
        } else if (left > kLanes) {
          add_values<V, 2>(weights, values + d, head_dim, count, rest, keep, to);
        } else {
          add_values<V, 1>(weights, values + d, head_dim, count, rest, keep, to);
        }
      }
    }
  }
  for (int64_t row = 0; row < rows; ++row) {
    float* to = a.out + head_of(row, a.heads * head_dim);
    for (int64_t d = 0; d < head_dim; ++d) to[d] = out[row * padded + d] / totals[row];
  }
}

}  // namespace llmpq

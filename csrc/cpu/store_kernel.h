// Rotary embedding and the way into the KV cache, for an instruction set V.
#pragma once

#include "cpu/cached.h"
#include "cpu/kernels.h"

namespace llmpq {

template <class V>
inline void rotate_head(float* x, const float* cos, const float* sin, int64_t half) {
  for (int64_t j = 0; j < half; j += kLanes) {
    const int lanes = half - j < kLanes ? static_cast<int>(half - j) : kLanes;
    const auto c = V::load_first(cos + j, lanes), s = V::load_first(sin + half + j, lanes);
    const auto low = V::load_first(x + j, lanes), high = V::load_first(x + half + j, lanes);
    V::store_first(x + j, V::sub(V::mul(low, c), V::mul(high, s)), lanes);
    V::store_first(x + half + j, V::add(V::mul(high, c), V::mul(low, s)), lanes);
  }
}

// Fetch for writing where a token's keys and values will go: far apart, and stores that miss the caches wait in line.
template <class V, class T>
inline void prefetch_token(const KvCache& cache, int64_t block, int64_t place) {
  const int64_t head_dim = cache.head_dim;
  constexpr int64_t kLine = 64 / sizeof(T);
  for (int64_t kv_head = 0; kv_head < cache.kv_heads; ++kv_head) {
    const T* keys = cache.keys_of<T>(block, kv_head) + place / kLanes * kLanes * head_dim;
    const T* values = cache.values_of<T>(block, kv_head) + place * cache.value_dim();
    for (int64_t i = 0; i < head_dim * kLanes; i += kLine) __builtin_prefetch(keys + i, 1);
    for (int64_t d = 0; d < head_dim; d += kLine) __builtin_prefetch(values + d, 1);
    if constexpr (kHasScales<T>) {
      __builtin_prefetch(cache.scales_of(cache.key_scales, block, kv_head) + place, 1);
      __builtin_prefetch(cache.scales_of(cache.value_scales, block, kv_head) + place, 1);
    }
  }
}

template <class V, class T>
inline void store_run(const StoreArgs& a, const TokenRun& run) {
  const KvCache& cache = a.cache;
  const int64_t head_dim = cache.head_dim, value_dim = cache.value_dim();
  for (int64_t i = 0; i < run.tokens; ++i) {
    float* x = a.qkv + (run.first_token + i) * a.stride;
    const int64_t position = run.first_position + i, block = cache.block(run, position), place = position % kBlockKeys;
    if (i == 0 || place % kLanes == 0) prefetch_token<V, T>(cache, block, place);
    if (a.rotated != 0) {
      const int64_t at = position * a.rotated;
      for (int64_t head = 0; head < a.heads + cache.kv_heads; ++head) {
        rotate_head<V>(x + head * head_dim, a.cos + at, a.sin + at, a.rotated / 2);
      }
    }
    for (int64_t kv_head = 0; kv_head < cache.kv_heads; ++kv_head) {
      const float* key = x + (a.heads + kv_head) * head_dim;
      const float* value = key + cache.kv_heads * head_dim;
      T* keys = cache.keys_of<T>(block, kv_head) + place / kLanes * kLanes * head_dim + place % kLanes;
      T* values = cache.values_of<T>(block, kv_head) + place * value_dim;
      const Conversion<V, T> of_key(key, head_dim), of_value(value, head_dim);
      if constexpr (kHasScales<T>) {
        cache.scales_of(cache.key_scales, block, kv_head)[place] = of_key.scale;
        cache.scales_of(cache.value_scales, block, kv_head)[place] = of_value.scale;
      }
      for (int64_t d = 0; d < head_dim; d += kLanes) {
        const int lanes = head_dim - d < kLanes ? static_cast<int>(head_dim - d) : kLanes;
        alignas(64) T converted[kLanes];
        of_key.store(converted, V::load_first(key + d, lanes));
        for (int lane = 0; lane < lanes; ++lane) keys[(d + lane) * kLanes] = converted[lane];
        of_value.store(values + d, V::load_first(value + d, lanes));
      }
    }
  }
}

template <class V>
void rotate_and_store_run(const StoreArgs& a, const TokenRun& run) {
  with_cached(a.cache, [&](auto held) LLMPQ_LAMBDA { store_run<V, typename decltype(held)::Type>(a, run); });
}

}  // namespace llmpq

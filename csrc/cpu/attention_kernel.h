// Causal attention for an instruction set V: rows (tokens x heads of one kv head) in tiles against chunks of 128 keys.
//
// Scores and weighted values of a tile are two products whose sums stay in registers, with the softmax between them.
// Chunk after chunk is merged into what went before it. What a row adds up, and in which order, depends on its own
// position only: scores along the dimensions of a head, weighted values along a chunk's keys, chunks from the first
// that it sees on. Nothing beyond a row's position or before its window enters its sums. Where the cache holds codes,
// scores are times the scales of keys, and weights, once added up, times those of values.
#pragma once

#include "cpu/cached.h"
#include "cpu/exponentials.h"
#include "cpu/kernels.h"
#include "cpu/task_ahead.h"
#include "cpu/unroll.h"

namespace llmpq {

// Vectors that are worked on together in a tile of so many rows, so that its sums fit the registers.
template <class V>
constexpr int tile_vectors(int rows) {
  return V::kAttentionSums >= 4 * rows ? 4 : V::kAttentionSums >= 2 * rows ? 2 : 1;
}

// body(Index<N>, i) for i from 0 to count, N at a time: N = Most as long as that goes, then half of it and so on.
template <int Most, class Body>
LLMPQ_INLINE void for_vectors_of(int64_t i, int64_t count, Body&& body) {
  for (; i + Most <= count; i += Most) body(Index<Most>{}, i);
  if constexpr (Most > 1) for_vectors_of<Most / 2>(i, count, body);
}

// scores[M][kChunkKeys] = q [head_dim][M] times N blocks of keys.
template <class V, int M, int N, class T>
LLMPQ_INLINE void dot_keys(const float* q, const T* keys, TaskAhead<V, T>& ahead, int64_t head_dim, float* scores) {
  typename V::F sums[M][N];
  LLMPQ_UNROLL
  for (int r = 0; r < M; ++r) {
    LLMPQ_UNROLL
    for (int i = 0; i < N; ++i) sums[r][i] = V::zero();
  }
  auto next = ahead.place;
  int64_t stop = next.template steps<N>();
  for (int64_t d = 0; d < head_dim; ++d) {
    if (d >= stop) {
      next = ahead.turn();
      stop = d + next.template steps<N>();
    }
    next.template fetch<N>();
    typename V::F key[N];
    LLMPQ_UNROLL
    for (int i = 0; i < N; ++i) key[i] = load_cached<V>(keys + (i * head_dim + d) * kLanes);
    LLMPQ_UNROLL
    for (int r = 0; r < M; ++r) {
      const auto x = V::broadcast(q[d * M + r]);
      LLMPQ_UNROLL
      for (int i = 0; i < N; ++i) sums[r][i] = V::fma(x, key[i], sums[r][i]);
    }
  }
  ahead.place = next;
  LLMPQ_UNROLL
  for (int r = 0; r < M; ++r) {
    LLMPQ_UNROLL
    for (int i = 0; i < N; ++i) V::store(scores + r * kChunkKeys + i * kLanes, sums[r][i]);
  }
}

// out[M][N vectors] += weights[M][begin..end) @ values, both with rows of value_dim.
template <class V, int M, int N, class T>
LLMPQ_INLINE void add_values(const float* weights, const T* values, TaskAhead<V, T>& ahead, int64_t value_dim,
                             int begin, int end, float* out) {
  typename V::F sums[M][N];
  LLMPQ_UNROLL
  for (int r = 0; r < M; ++r) {
    LLMPQ_UNROLL
    for (int i = 0; i < N; ++i) sums[r][i] = V::load(out + r * value_dim + i * kLanes);
  }
  auto next = ahead.place;
  int64_t stop = begin + next.template steps<N>();
  for (int t = begin; t < end; ++t) {
    if (t >= stop) {
      next = ahead.turn();
      stop = t + next.template steps<N>();
    }
    next.template fetch<N>();
    typename V::F value[N];
    LLMPQ_UNROLL
    for (int i = 0; i < N; ++i) value[i] = load_cached<V>(values + t * value_dim + i * kLanes);
    LLMPQ_UNROLL
    for (int r = 0; r < M; ++r) {
      const auto weight = V::broadcast(weights[r * kChunkKeys + t]);
      LLMPQ_UNROLL
      for (int i = 0; i < N; ++i) sums[r][i] = V::fma(weight, value[i], sums[r][i]);
    }
  }
  ahead.place = next;
  LLMPQ_UNROLL
  for (int r = 0; r < M; ++r) {
    LLMPQ_UNROLL
    for (int i = 0; i < N; ++i) V::store(out + r * value_dim + i * kLanes, sums[r][i]);
  }
}

// The scores of keys to e^(score - largest), in place. Returns the largest and the sum; other lanes are free. Of no
// keys these are a number below all scores, and 0: to them another chunk's are added as they are.
template <class V>
LLMPQ_INLINE void soften(float* scores, Keys keys, float& largest, float& total) {
  using F = typename V::F;
  const F least = V::broadcast(-__FLT_MAX__);
  const int before = keys.begin % kLanes;
  scores += keys.begin - before;
  if (before != 0) V::store(scores, V::first_or(least, before, V::load(scores)));  // e^-87 enters the sum
  const int count = keys.end - keys.begin + before, whole = count / kLanes * kLanes;
  F most = least;
  for (int t = 0; t < whole; t += kLanes) most = V::max(most, V::load(scores + t));
  if (whole < count) most = V::max(most, V::first_or(V::load(scores + whole), count - whole, least));
  largest = V::largest(most);
  most = V::broadcast(largest);
  F sum = V::zero();
  for (int t = 0; t < whole; t += kLanes) {
    const F weight = exp_negative<V>(V::sub(V::load(scores + t), most));
    V::store(scores + t, weight);
    sum = V::add(sum, weight);
  }
  if (whole < count) {
    const F weight = V::first(exp_negative<V>(V::sub(V::load(scores + whole), most)), count - whole);
    V::store(scores + whole, weight);
    sum = V::add(sum, weight);
  }
  total = V::sum(sum);
}

// Multiplies columns [M][kChunkKeys] of keys, which lie together in the cache, by the scales of what it holds of them.
template <class V, int M>
LLMPQ_INLINE void scale_columns(float* columns, const float* scales, Keys keys) {
  for (int t = keys.begin / kLanes * kLanes; t < keys.end; t += kLanes) {
    const auto scale = V::load(scales + t);
    LLMPQ_UNROLL
    for (int r = 0; r < M; ++r) {
      float* column = columns + r * kChunkKeys + t;
      V::store(column, V::mul(V::load(column), scale));
    }
  }
}

// What a head adds to the scores of keys, and their soft cap. distance: of the chunk's first key from the query.
template <class V>
[[gnu::noinline]] void adjust(const AttentionArgs& a, int64_t head, int64_t distance, Keys keys, float* scores) {
  using F = typename V::F;
  alignas(64) static constexpr float kLane[] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  const int first = keys.begin / kLanes * kLanes;
  if (a.slopes != nullptr) {
    const F slope = V::broadcast(a.slopes[head]);
    for (int t = first; t < keys.end; t += kLanes) {
      const F distances = V::add(V::broadcast(static_cast<float>(distance + t)), V::load(kLane));
      V::store(scores + t, V::fma(slope, distances, V::load(scores + t)));
    }
  }
  if (a.cap > 0) {
    const F cap = V::broadcast(a.cap), inverse = V::broadcast(1.0f / a.cap);
    for (int t = first; t < keys.end; t += kLanes) {
      V::store(scores + t, V::mul(cap, hyperbolic_tangent<V>(V::mul(V::load(scores + t), inverse))));
    }
  }
}

// out[value_dim] += the weighted values of keys, for one row.
template <class V, class T>
inline void add_row(const float* weights, const T* values, TaskAhead<V, T>& ahead, int64_t value_dim, Keys keys,
                    float* out) {
  for_vectors_of<tile_vectors<V>(1)>(0, value_dim / kLanes, [&](auto n, int64_t i) LLMPQ_LAMBDA {
    constexpr int N = decltype(n)::value;
    add_values<V, 1, N>(weights, values + i * kLanes, ahead, value_dim, keys.begin, keys.end, out + i * kLanes);
  });
}

// Results of one chunk, or of several merged, for the rows of a task.
struct Partial {
  float *out, *largest, *totals;  // [rows][value_dim], [rows] each

  LLMPQ_INLINE Partial(const AttentionTask& task, float* memory)
      : out(memory),
        largest(out + task.rows() * task.args->cache.value_dim()),
        totals(largest + (task.rows() + kLanes - 1) / kLanes * kLanes) {}
};

// Rows row to row + M of a task against a chunk.
template <class V, int M, class T>
inline void attend_tile(const AttentionTask& task, int64_t chunk, TaskAhead<V, T>& ahead, int64_t row, const float* q,
                        const Partial& partial) {
  const AttentionArgs& a = *task.args;
  const KvCache& cache = a.cache;
  const int64_t value_dim = cache.value_dim(), heads = task.heads();
  const int64_t start = chunk * kChunkKeys;
  const auto position = [&](int r) LLMPQ_LAMBDA { return task.run.first_position + (row + r) / heads; };
  // Keys of the chunk that a row sees.
  const auto seen = [&](int r) LLMPQ_LAMBDA { return task.seen(chunk, position(r), position(r)); };
  alignas(64) float weights[M * kChunkKeys];
  float* out = partial.out + row * value_dim;
  // Of a tile's rows the last sees the latest keys, and the first the earliest.
  const Keys first = seen(0), last = seen(M - 1), all{first.begin, last.end};
  // body(block, after) for the pieces of the chunk's blocks.
  const auto for_pieces = [&](auto&& body) LLMPQ_LAMBDA {
    for (int block = all.first_block(), after; block < all.end_block(); block = after) {
      after = task.piece_end(chunk, block, all.end_block());
      body(block, after);
    }
  };
  for_pieces([&](int block, int after) LLMPQ_LAMBDA {
    const T* keys = task.keys<T>(chunk, block) - block * kBlockKeys * cache.head_dim;
    const Keys part = all.in_blocks(block, after);
    for_vectors_of<tile_vectors<V>(M)>(
        part.begin / kLanes, (part.end + kLanes - 1) / kLanes, [&](auto n, int64_t vector) LLMPQ_LAMBDA {
          constexpr int N = decltype(n)::value;
          const int64_t at = vector * cache.head_dim * kLanes;
          dot_keys<V, M, N>(q, keys + at, ahead, cache.head_dim, weights + vector * kLanes);
        });
    if constexpr (kHasScales<T>) scale_columns<V, M>(weights, task.scales(cache.key_scales, chunk, block), part);
  });
  if (a.slopes != nullptr || a.cap > 0) {
    for (int r = 0; r < M; ++r) {
      const int64_t head = task.kv_head * heads + (row + r) % heads;
      adjust<V>(a, head, start - position(r), seen(r), weights + r * kChunkKeys);
    }
  }
  for (int r = 0; r < M; ++r) {
    soften<V>(weights + r * kChunkKeys, seen(r), partial.largest[row + r], partial.totals[row + r]);
  }
  for (int64_t i = 0; i < M * value_dim; i += kLanes) V::store(out + i, V::zero());
  // What all rows see at once, and by itself what only some of them see: not even zero times it may enter the sums of
  // the others.
  const Keys common{last.begin, first.end > last.begin ? first.end : last.begin};
  for_pieces([&](int block, int after) LLMPQ_LAMBDA {
    const T* values = task.values<T>(chunk, block) - block * kBlockKeys * value_dim;
    if constexpr (kHasScales<T>) {
      scale_columns<V, M>(weights, task.scales(cache.value_scales, chunk, block), all.in_blocks(block, after));
    }
    const auto add_rows = [&](Keys part) {
      for (int r = 0; part.begin < part.end && r < M; ++r) {
        const Keys keys = seen(r);
        add_row<V>(weights + r * kChunkKeys, values, ahead, value_dim,
                   {keys.begin > part.begin ? keys.begin : part.begin, keys.end < part.end ? keys.end : part.end},
                   out + r * value_dim);
      }
    };
    const Keys part = common.in_blocks(block, after);
    add_rows(Keys{first.begin, common.begin}.in_blocks(block, after));
    if (part.begin < part.end) {
      for_vectors_of<tile_vectors<V>(M)>(0, value_dim / kLanes, [&](auto n, int64_t i) LLMPQ_LAMBDA {
        constexpr int N = decltype(n)::value;
        add_values<V, M, N>(weights, values + i * kLanes, ahead, value_dim, part.begin, part.end, out + i * kLanes);
      });
    }
    add_rows(Keys{common.end, last.end}.in_blocks(block, after));
  });
}

// body(row, count) for the tiles of a task's rows, of about equal size.
template <class V, class Body>
LLMPQ_INLINE void for_row_tiles(int64_t rows, Body&& body) {
  const int64_t tiles = ceil_div(rows, V::kTileRows);
  for (int64_t t = 0; t < tiles; ++t) {
    const int64_t begin = t * rows / tiles, end = (t + 1) * rows / tiles;
    body(begin, static_cast<int>(end - begin));
  }
}

// The queries times the scale, tile by tile [head_dim][rows of the tile].
template <class V>
inline void pack_queries(const AttentionTask& task, float* packed) {
  const AttentionArgs& a = *task.args;
  const int64_t head_dim = a.cache.head_dim, heads = task.heads();
  for_row_tiles<V>(task.rows(), [&](int64_t row, int count) LLMPQ_LAMBDA {
    for (int r = 0; r < count; ++r) {
      const int64_t token = task.run.first_token + (row + r) / heads, head = task.kv_head * heads + (row + r) % heads;
      const float* q = a.q + token * a.q_stride + head * head_dim;
      for (int64_t d = 0; d < head_dim; ++d) packed[row * head_dim + d * count + r] = q[d] * a.scale;
    }
  });
}

template <class V, class T>
inline void attend_chunk(const AttentionTask& task, int64_t chunk, TaskAhead<V, T>& ahead, const float* q,
                         const Partial& partial) {
  for_row_tiles<V>(task.rows(), [&](int64_t row, int count) LLMPQ_LAMBDA {
    const int64_t last = task.run.first_position + (row + count - 1) / task.heads();
    if (last < chunk * kChunkKeys) return;
    unroll<V::kTileRows>([&](auto r) LLMPQ_LAMBDA {
      constexpr int M = decltype(r)::value + 1;
      if (count == M) attend_tile<V, M, T>(task, chunk, ahead, row, q + row * task.args->cache.head_dim, partial);
    });
    ahead.place.moves = false;  // the other tiles read the same, from a near cache
  });
  ahead.place.moves = true;
}

// Add the results of a chunk to those of all before it that a row sees.
template <class V>
inline void merge(const AttentionTask& task, int64_t chunk, const Partial& all, const Partial& next) {
  using F = typename V::F;
  const int64_t rows = task.rows(), value_dim = task.args->cache.value_dim();
  const int64_t unseen = chunk * kChunkKeys - task.run.first_position;  // tokens before the chunk
  const int64_t first = unseen > 0 ? unseen * task.heads() : 0;
  alignas(64) float kept[kLanes], added[kLanes];
  for (int64_t row = first; row < rows; row += kLanes) {
    const int count = rows - row < kLanes ? static_cast<int>(rows - row) : kLanes;
    const F before = V::load_first(all.largest + row, count), after = V::load_first(next.largest + row, count);
    const F largest = V::max(before, after);
    const F keep = exp_negative<V>(V::sub(before, largest)), add = exp_negative<V>(V::sub(after, largest));
    const F total = V::mul(V::load_first(all.totals + row, count), keep);
    V::store_first(all.largest + row, largest, count);
    V::store_first(all.totals + row, V::fma(V::load_first(next.totals + row, count), add, total), count);
    V::store(kept, keep);
    V::store(added, add);
    for (int r = 0; r < count; ++r) {
      float* out = all.out + (row + r) * value_dim;
      const float* addend = next.out + (row + r) * value_dim;
      for (int64_t i = 0; i < value_dim; i += kLanes) {
        const F sum = V::mul(V::load(out + i), V::broadcast(kept[r]));
        V::store(out + i, V::fma(V::load(addend + i), V::broadcast(added[r]), sum));
      }
    }
  }
}

// 1 / total where a sink takes part in the softmax, with the largest score and the sum of weights of the keys.
template <class V>
inline float share_beside(float sink, float largest, float total) {
  const auto weight = [&](float score) LLMPQ_LAMBDA {
    return V::lane(exp_negative<V>(V::broadcast(score - (sink > largest ? sink : largest))));
  };
  const float kept = weight(largest);
  return kept / (total * kept + weight(sink));
}

template <class V>
inline void write_attention(const AttentionTask& task, const Partial& all) {
  const AttentionArgs& a = *task.args;
  const int64_t head_dim = a.cache.head_dim, value_dim = a.cache.value_dim(), heads = task.heads();
  for (int64_t row = 0; row < task.rows(); ++row) {
    const int64_t token = task.run.first_token + row / heads, head = task.kv_head * heads + row % heads;
    float* out = a.out + (token * a.heads + head) * head_dim;
    float share = 1.0f / all.totals[row];
    if (a.sinks != nullptr) share = share_beside<V>(a.sinks[head], all.largest[row], all.totals[row]);
    const auto factor = V::broadcast(share);
    for (int64_t d = 0; d < head_dim; d += kLanes) {
      const int lanes = head_dim - d < kLanes ? static_cast<int>(head_dim - d) : kLanes;
      V::store_first(out + d, V::mul(V::load(all.out + row * value_dim + d), factor), lanes);
    }
  }
}

// next: what is read after the task.
template <class V>
void attention_task(const AttentionTask& task, const TaskChunk& next, float* scratch) {
  const Partial all(task, scratch), last(task, scratch + task.partial_floats());
  float* q = scratch + 2 * task.partial_floats();
  pack_queries<V>(task, q);
  const int64_t first = task.first_chunk(), end = task.end_chunk();
  with_cached(task.args->cache, [&](auto held) LLMPQ_LAMBDA {
    TaskAhead<V, typename decltype(held)::Type> ahead(task, first, end, next);
    for (int64_t chunk = first; chunk < end; ++chunk) {
      attend_chunk<V>(task, chunk, ahead, q, chunk == first ? all : last);
      if (chunk > first) merge<V>(task, chunk, all, last);
    }
  });
  write_attention<V>(task, all);
}

template <class V>
void attention_chunk(const TaskChunk& of, const TaskChunk& next, float* partial, float* scratch) {
  const AttentionTask& task = *of.task;
  pack_queries<V>(task, scratch);
  with_cached(task.args->cache, [&](auto held) LLMPQ_LAMBDA {
    TaskAhead<V, typename decltype(held)::Type> ahead(task, of.chunk, of.chunk + 1, next);
    attend_chunk<V>(task, of.chunk, ahead, scratch, Partial(task, partial));
  });
}

template <class V>
void attention_merge(const AttentionTask& task, float* partials) {
  const Partial all(task, partials);
  for (int64_t chunk = task.first_chunk() + 1; chunk < task.end_chunk(); ++chunk) {
    merge<V>(task, chunk, all, Partial(task, partials += task.partial_floats()));
  }
  write_attention<V>(task, all);
}

}  // namespace llmpq

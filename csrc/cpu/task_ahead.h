// What a thread reads next of a KV cache, on its way into the processor's caches. V: the instruction set, each of which
// needs a copy of its own.
#pragma once

#include "cpu/cached.h"
#include "cpu/kernels.h"

namespace llmpq {

// Fetches what a task reads next, as many bytes as it reads meanwhile: keys and values alternate, a chunk of each, and no
// hardware prefetcher sees that coming. It begins behind the keys of the first chunk and ends in what follows the task.
template <class V, class T>
class TaskAhead {
 public:
  // Where it is, in a loop that has it in registers.
  struct Place {
    const T *at, *end;
    bool moves;  // or stays where it is, since what is read now has been read before

    // How often N vectors can be fetched before `turn`.
    template <int N>
    LLMPQ_INLINE int64_t steps() const {
      return moves ? ceil_div(end - at, N * kLanes) : INT64_MAX / 2;
    }
    template <int N>
    LLMPQ_INLINE void fetch() {
      for (int i = 0; i < N * kLanes; i += 64 / static_cast<int>(sizeof(T))) __builtin_prefetch(at + i);
      at += moves ? N * kLanes : 0;
    }
  };
  Place place;

  // Chunks `chunk` to `end` of a task; then, however long, the one that follows.
  TaskAhead(const AttentionTask& task, int64_t chunk, int64_t end, const TaskChunk& next)
      : task_(&task), chunk_(chunk), end_chunk_(end), next_(next) {
    place = enter(false);
  }

  // Where it goes on once a place's end is reached.
  [[gnu::noinline]] Place turn() {
    if (block_ < seen_.end_block()) return piece();
    if (!in_keys_ && ++chunk_ == end_chunk_) {
      task_ = next_.task;
      chunk_ = next_.chunk;
      end_chunk_ = chunk_ + 1;
    }
    return enter(!in_keys_);
  }

 private:
  // To the keys or the values of a chunk.
  LLMPQ_INLINE Place enter(bool keys) {
    in_keys_ = keys;
    seen_ = task_->seen(chunk_);
    block_ = seen_.first_block();
    return piece();
  }
  // What is seen of the blocks from block_ on that follow each other.
  LLMPQ_INLINE Place piece() {
    const int first = block_;
    block_ = task_->piece_end(chunk_, first, seen_.end_block());
    const Keys seen = seen_.in_blocks(first, block_);
    if constexpr (kHasScales<T>) {
      const KvCache& cache = task_->args->cache;
      const float* scales = task_->scales(in_keys_ ? cache.key_scales : cache.value_scales, chunk_, first);
      for (int t = seen.begin / kLanes * kLanes; t < seen.end; t += kLanes) __builtin_prefetch(scales + t);
    }
    if (in_keys_) {
      const int64_t size = task_->args->cache.head_dim;
      const T* keys = task_->template keys<T>(chunk_, first) - first * kBlockKeys * size;
      return {keys + seen.begin / kLanes * kLanes * size, keys + ceil_div(seen.end, kLanes) * kLanes * size, true};
    }
    const int64_t size = task_->args->cache.value_dim();
    const T* values = task_->template values<T>(chunk_, first) - first * kBlockKeys * size;
    return {values + seen.begin * size, values + seen.end * size, true};
  }

  const AttentionTask* task_;
  int64_t chunk_, end_chunk_;
  TaskChunk next_;
  Keys seen_;
  int block_;  // of the chunk, up to which it was fetched
  bool in_keys_;
};

}  // namespace llmpq

// Loops over independent items on several threads. Which thread gets which item never shows in a result.
#pragma once

#include <algorithm>
#include <cstdint>

namespace llmpq {

using WorkFunction = void (*)(const void* context, int64_t item);

// Calls work(context, i) for i in [0, items) on up to `threads` threads, of which the caller is one. From several
// callers at once, the first gets the pool's threads and the others do their work alone.
void run_parallel(int64_t items, int threads, WorkFunction work, const void* context);

// One turn of waiting for another thread, counted from 0: now and then others may run, who may hold up what is awaited.
void pause(int turn);

// Waits, awake, for what another thread has begun, or will soon.
template <class Condition>
void spin_until(const Condition& met) {
  for (int turn = 0; !met(); ++turn) pause(turn);
}

// While there is one of these, the pool's threads do not sleep, so that what follows soon finds them ready within a
// microsecond.
class KeepAwake {
 public:
  explicit KeepAwake(bool yes);
  ~KeepAwake();
  KeepAwake(const KeepAwake&) = delete;
  KeepAwake& operator=(const KeepAwake&) = delete;

 private:
  bool yes_;
};

// How long each of `count` loops takes, in seconds, that hands an item to every one of `threads` threads which are awake
// and ends when all of them have begun: what handing work over costs.
void time_hand_overs(int threads, int64_t count, double* seconds);

// As many threads as `work` is worth, where another one costs more than it gives below `per_thread` of it.
inline int useful_threads(int64_t work, int64_t per_thread, int threads) {
  return static_cast<int>(std::min<int64_t>(threads, 1 + work / per_thread));
}

template <class Work>
void parallel_for(int64_t items, int threads, const Work& work) {
  run_parallel(
      items, threads, [](const void* context, int64_t item) { (*static_cast<const Work*>(context))(item); }, &work);
}

}  // namespace llmpq

#include "cpu/threads.h"

#include <pthread.h>

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <mutex>
#include <thread>

namespace llmpq {
namespace {

// Turns of a waiting thread before it sleeps, unless it is kept awake. The calls of one step follow each other within
// microseconds, and waking a sleeping thread costs about as much as a small product.
constexpr int kSpins = 4000;
constexpr int kYield = 1000;  // turns after which a waiting thread lets others run, who may hold up what it waits for

inline void pause(int turn) {
  if (turn % kYield == kYield - 1) std::this_thread::yield();
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

std::atomic<int> awake{0};  // how many KeepAwake there are

class Pool {
 public:
  void run(int64_t items, int threads, WorkFunction work, const void* context) {
    std::unique_lock<std::mutex> turn(turn_, std::try_to_lock);
    if (!turn.owns_lock()) {
      for (int64_t i = 0; i < items; ++i) work(context, i);
      return;
    }
    while (workers_ < threads - 1) {
      std::thread(&Pool::serve, this).detach();
      ++workers_;
    }
    work_ = work;
    context_ = context;
    items_ = items;
    next_.store(0, std::memory_order_relaxed);
    finished_.store(0, std::memory_order_relaxed);
    const uint64_t places = static_cast<uint64_t>(threads - 1);
    state_.store((generation(state_.load(std::memory_order_relaxed)) + 1) << kPlaceBits | places);
    if (sleepers_.load() > 0) {
      { std::lock_guard<std::mutex> lock(mutex_); }  // a worker that saw no work is waiting now
      wake_.notify_all();
    }
    drain();
    // A thread that has not begun by now is not waited for: it finds no place left.
    const uint64_t left = state_.fetch_and(~kPlaces, std::memory_order_acq_rel) & kPlaces;
    const int joined = static_cast<int>(places - left);
    for (int spin = 0; finished_.load(std::memory_order_acquire) < joined; ++spin) pause(spin);
  }

 private:
  static constexpr int kPlaceBits = 16;
  static constexpr uint64_t kPlaces = (uint64_t{1} << kPlaceBits) - 1;

  static uint64_t generation(uint64_t state) { return state >> kPlaceBits; }

  void drain() {
    for (int64_t i; (i = next_.fetch_add(1, std::memory_order_relaxed)) < items_;) work_(context_, i);
  }

  void wait(uint64_t seen) {
    for (int spin = 0; spin < kSpins || awake.load(std::memory_order_relaxed) > 0; ++spin) {
      if (generation(state_.load(std::memory_order_acquire)) != seen) return;
      pause(spin % kSpins);
    }
    // The caller changes the state before it looks for sleepers, and they look at the state after they are counted.
    sleepers_.fetch_add(1);
    std::unique_lock<std::mutex> lock(mutex_);
    wake_.wait(lock, [&] { return generation(state_.load()) != seen; });
    sleepers_.fetch_sub(1);
  }

  void serve() {
    for (uint64_t seen = 0;;) {
      wait(seen);
      uint64_t state = state_.load(std::memory_order_acquire);
      seen = generation(state);
      while (generation(state) == seen && (state & kPlaces) > 0) {
        if (!state_.compare_exchange_weak(state, state - 1, std::memory_order_acq_rel, std::memory_order_acquire)) {
          continue;
        }
        drain();
        finished_.fetch_add(1, std::memory_order_release);
        break;
      }
    }
  }

  std::mutex turn_;  // held by the caller whose work the pool does
  int workers_ = 0;  // guarded by turn_
  // What is to be done: written by the caller while no thread has a place, read by those that have one.
  WorkFunction work_ = nullptr;
  const void* context_ = nullptr;
  int64_t items_ = 0;
  // Apart, so that threads do not wait for each other's cache lines.
  alignas(64) std::atomic<uint64_t> state_{0};  // number of the work, and how many threads may still join it
  alignas(64) std::atomic<int64_t> next_{0};
  alignas(64) std::atomic<int> finished_{0};  // threads that joined and are done
  alignas(64) std::atomic<int> sleepers_{0};
  std::mutex mutex_;  // for sleeping only
  std::condition_variable wake_;
};

// Never destroyed, since its threads run until the process ends. A forked child, which has none of them, gets its own.
Pool* pool;

Pool& the_pool() {
  static const bool made = [] {
    pool = new Pool;
    pthread_atfork(nullptr, nullptr, [] { pool = new Pool; });
    return true;
  }();
  (void)made;
  return *pool;
}

}  // namespace

void run_parallel(int64_t items, int threads, WorkFunction work, const void* context) {
  if (threads > items) threads = static_cast<int>(items);
  if (threads <= 1) {
    for (int64_t i = 0; i < items; ++i) work(context, i);
    return;
  }
  the_pool().run(items, threads, work, context);
}

KeepAwake::KeepAwake(bool yes) : yes_(yes) {
  if (yes_) awake.fetch_add(1, std::memory_order_relaxed);
}

KeepAwake::~KeepAwake() {
  if (yes_) awake.fetch_sub(1, std::memory_order_relaxed);
}

void time_hand_overs(int threads, int64_t count, double* seconds) {
  constexpr int kPatience = 1000000;  // turns: threads that another caller has never come
  const KeepAwake awake(true);
  for (int64_t i = 0; i < count; ++i) {
    std::atomic<int> begun{0};
    const auto start = std::chrono::steady_clock::now();
    parallel_for(threads, threads, [&](int64_t) {
      begun.fetch_add(1, std::memory_order_acq_rel);
      for (int spin = 0; begun.load(std::memory_order_acquire) < threads && spin < kPatience; ++spin) pause(spin);
    });
    seconds[i] = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  }
}

}  // namespace llmpq

#include "cpu/threads.h"

#include <pthread.h>

#include <algorithm>
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

std::atomic<int> awake{0};  // how many KeepAwake there are

// Threads that wait for a loop, and the caller's own. All of a loop that threads contend for is one word: how many may
// take part, how many items there are, and which is next. Who makes that word one larger holds an item. What is to be
// done with it lies in the same cache line, and stays there until every item that is held has been given back as done.
// So a thread begins after two messages between cores, and one that is held up before it begins holds up nobody.
class Pool {
 public:
  static constexpr int64_t kMostItems = (int64_t{1} << 26) - 1;

  // Calls work(context, i) for i in [first, first + items), 1 < items <= kMostItems, unless other work is going on.
  bool run(int64_t first, int64_t items, int threads, WorkFunction work, const void* context) {
    std::unique_lock<std::mutex> turn(turn_, std::try_to_lock);
    if (!turn.owns_lock()) return false;
    while (workers_ < threads - 1) std::thread(&Pool::serve, this, ++workers_).detach();
    work_ = work;
    context_ = context;
    first_ = first;
    done_.store(0, std::memory_order_relaxed);
    const auto taking_part = static_cast<uint64_t>(std::min(threads, kMostThreads));
    state_.store(taking_part << 2 * kItemBits | static_cast<uint64_t>(items) << kItemBits | 1);  // item 0 is held
    if (sleepers_.load() > 0) {
      { std::lock_guard<std::mutex> lock(mutex_); }  // a worker that saw no work is waiting now
      wake_.notify_all();
    }
    work(context, first);
    const int64_t others = items - 1 - drain(0);
    spin_until([&] { return done_.load(std::memory_order_acquire) == others; });
    return true;
  }

 private:
  static constexpr int kItemBits = 26, kMostThreads = (1 << 12) - 1;
  static constexpr uint64_t kItems = (uint64_t{1} << kItemBits) - 1;

  static bool has_item(uint64_t state, int thread) {
    return (state & kItems) < (state >> kItemBits & kItems) && static_cast<uint64_t>(thread) < state >> 2 * kItemBits;
  }

  // Does items until all are held; how many it did.
  int64_t drain(int thread) {
    int64_t count = 0;
    uint64_t state = state_.load(std::memory_order_acquire);
    while (has_item(state, thread)) {
      const uint64_t held = state + 1;
      if (!state_.compare_exchange_weak(state, held, std::memory_order_acq_rel, std::memory_order_acquire)) continue;
      work_(context_, first_ + static_cast<int64_t>(state & kItems));
      ++count;
      state = state_.load(std::memory_order_acquire);
    }
    return count;
  }

  void wait(int thread) {
    for (int turn = 0; turn < kSpins; ++turn) {
      if (has_item(state_.load(std::memory_order_acquire), thread)) return;
      pause(turn);
      if (awake.load(std::memory_order_relaxed) > 0) turn %= kYield;  // on and on
    }
    // The caller changes the state before it looks for sleepers, and they look at the state after they are counted.
    sleepers_.fetch_add(1);
    std::unique_lock<std::mutex> lock(mutex_);
    wake_.wait(lock, [&] { return has_item(state_.load(), thread); });
    sleepers_.fetch_sub(1);
  }

  // Of a worker, which are numbered from 1.
  void serve(int thread) {
    for (;;) {
      wait(thread);
      const int64_t count = drain(thread);
      if (count > 0) done_.fetch_add(count, std::memory_order_release);
    }
  }

  std::mutex turn_;  // held by the caller whose work the pool does
  int workers_ = 0;  // guarded by turn_
  // Apart, so that threads do not wait for each other's cache lines.
  alignas(64) std::atomic<uint64_t> state_{0};  // threads that may take part, items, the next item
  WorkFunction work_ = nullptr;  // this and the rest of the line: read by who holds an item, written while nobody does
  const void* context_ = nullptr;
  int64_t first_ = 0;
  alignas(64) std::atomic<int64_t> done_{0};  // items that other threads than the caller have done
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

void pause(int turn) {
  if (turn % kYield == kYield - 1) std::this_thread::yield();
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

void run_parallel(int64_t items, int threads, WorkFunction work, const void* context) {
  for (int64_t first = 0; first < items;) {
    const int64_t count = std::min(items - first, Pool::kMostItems), last = first + count;
    const bool shared = threads > 1 && count > 1 && the_pool().run(first, count, threads, work, context);
    for (int64_t i = first; !shared && i < last; ++i) work(context, i);
    first = last;
  }
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

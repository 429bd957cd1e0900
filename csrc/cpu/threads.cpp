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

// Threads that wait for a loop, and the caller's own. Who adds one to `next_` and gets an item of the loop holds it; what
// is to be done with it stays where it is until all items that are held are given back as done. So a thread begins after
// two messages between cores, and one that is held up before it begins holds up nobody. Those that wait look at another
// cache line, which does not change with every item, and holds what they need once they have one.
class Pool {
 public:
  static constexpr int64_t kMostItems = int64_t{1} << 30;

  // Calls work(context, i) for i in [first, first + items), 1 < items <= kMostItems, unless other work is going on.
  bool run(int64_t first, int64_t items, int threads, WorkFunction work, const void* context) {
    std::unique_lock<std::mutex> turn(turn_, std::try_to_lock);
    if (!turn.owns_lock()) return false;
    while (workers_ < threads - 1) std::thread(&Pool::serve, this, ++workers_).detach();
    work_ = work;
    context_ = context;
    first_ = first;
    done_.store(0, std::memory_order_relaxed);
    next_.store(static_cast<uint64_t>(items) << 32 | 1, std::memory_order_release);  // the caller has item 0
    const uint64_t loop = (loop_.load(std::memory_order_relaxed) >> kThreadBits) + 1;
    loop_.store(loop << kThreadBits | static_cast<uint64_t>(std::min(threads, kMostThreads)));
    if (sleepers_.load() > 0) {
      { std::lock_guard<std::mutex> lock(mutex_); }  // a worker that saw no loop is waiting now
      wake_.notify_all();
    }
    work(context, first);
    const int64_t others = items - 1 - drain();
    spin_until([&] { return done_.load(std::memory_order_acquire) == others; });
    return true;
  }

 private:
  static constexpr int kThreadBits = 12, kMostThreads = (1 << kThreadBits) - 1;

  // Does items until all are held; how many it did. What it does may be of a later loop than it was called for.
  int64_t drain() {
    for (int64_t count = 0;; ++count) {
      const uint64_t held = next_.fetch_add(1, std::memory_order_acq_rel);
      const uint64_t item = held & UINT32_MAX;
      if (item >= held >> 32) return count;
      work_(context_, first_ + static_cast<int64_t>(item));
    }
  }

  // The loop after `seen`, asleep if that takes long.
  uint64_t await_loop(uint64_t seen) {
    for (int turn = 0; turn < kSpins; ++turn) {
      const uint64_t loop = loop_.load(std::memory_order_acquire);
      if (loop != seen) return loop;
      pause(turn);
      if (awake.load(std::memory_order_relaxed) > 0) turn %= kYield;  // on and on
    }
    // The caller changes the loop before it looks for sleepers, and they look at the loop after they are counted.
    sleepers_.fetch_add(1);
    std::unique_lock<std::mutex> lock(mutex_);
    wake_.wait(lock, [&] { return loop_.load() != seen; });
    sleepers_.fetch_sub(1);
    return loop_.load();
  }

  // Of a worker, which are numbered from 1.
  void serve(uint64_t thread) {
    for (uint64_t loop = 0;;) {
      loop = await_loop(loop);
      if (thread >= (loop & kMostThreads)) continue;
      const int64_t count = drain();
      if (count > 0) done_.fetch_add(count, std::memory_order_release);
    }
  }

  std::mutex turn_;  // held by the caller whose work the pool does
  int workers_ = 0;  // guarded by turn_
  // Apart, so that threads do not wait for each other's cache lines.
  alignas(64) std::atomic<uint64_t> loop_{0};  // its number, and how many threads may take part
  WorkFunction work_ = nullptr;  // this and the rest of the line: read by who holds an item, written while nobody does
  const void* context_ = nullptr;
  int64_t first_ = 0;
  alignas(64) std::atomic<uint64_t> next_{0};  // items of the loop, and the next one that nobody holds
  alignas(64) std::atomic<int64_t> done_{0};   // items that other threads than the caller have done
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

#include "cpu/threads.h"

#include <pthread.h>

#include <atomic>
#include <condition_variable>
#include <mutex>
#include <thread>

namespace llmpq {
namespace {

// Turns of a waiting thread before it sleeps. The calls of one decoding step follow each other within microseconds,
// and waking a sleeping thread costs about as much as a small product.
constexpr int kSpins = 4000;

inline void pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

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
    {
      std::lock_guard<std::mutex> lock(mutex_);
      work_ = work;
      context_ = context;
      items_ = items;
      next_.store(0, std::memory_order_relaxed);
      places_ = threads - 1;
      generation_.fetch_add(1, std::memory_order_release);
    }
    wake_.notify_all();
    drain();
    // A thread that has not begun by now is not waited for: it finds no place left.
    std::unique_lock<std::mutex> lock(mutex_);
    places_ = 0;
    for (int spin = 0; active_ > 0 && spin < kSpins; ++spin) {
      lock.unlock();
      pause();
      lock.lock();
    }
    done_.wait(lock, [this] { return active_ == 0; });
  }

 private:
  void drain() {
    for (int64_t i; (i = next_.fetch_add(1, std::memory_order_relaxed)) < items_;) work_(context_, i);
  }

  void serve() {
    uint64_t seen = 0;
    for (;;) {
      for (int spin = 0; generation_.load(std::memory_order_acquire) == seen && spin < kSpins; ++spin) pause();
      std::unique_lock<std::mutex> lock(mutex_);
      wake_.wait(lock, [&] { return generation_.load(std::memory_order_relaxed) != seen; });
      seen = generation_.load(std::memory_order_relaxed);
      if (places_ == 0) continue;
      --places_;
      ++active_;
      lock.unlock();
      drain();
      lock.lock();
      if (--active_ == 0) done_.notify_one();
    }
  }

  std::mutex turn_;   // held by the caller whose work the pool does
  int workers_ = 0;   // guarded by turn_
  std::mutex mutex_;  // guards all below
  std::condition_variable wake_, done_;
  std::atomic<uint64_t> generation_{0};
  int places_ = 0;  // threads that may still join
  int active_ = 0;  // threads that joined and have not finished
  WorkFunction work_ = nullptr;
  const void* context_ = nullptr;
  int64_t items_ = 0;
  std::atomic<int64_t> next_{0};
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

}  // namespace llmpq

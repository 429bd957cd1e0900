// Loops of the pool from several threads at once: each item of each loop must be done once, before the loop ends. In some
// loops the later items wait for the earlier ones, as the panels of a product wait for its rows.
// Prints how many items were not done once, or too early, and whether other threads than the callers did any; then also
// after all had fallen asleep.
// tests/kernels/test_threads.py builds it with ThreadSanitizer.
#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <random>
#include <thread>
#include <vector>

#include "cpu/threads.h"

namespace {

std::atomic<int64_t> wrong{0}, by_others{0};

void call_loops(unsigned seed, int loops) {
  std::mt19937 random(seed);
  const std::thread::id caller = std::this_thread::get_id();
  for (int loop = 0; loop < loops; ++loop) {
    const auto items = static_cast<int64_t>(random() % 40);
    const int64_t first = std::min<int64_t>(items, random() % 4);
    const int threads = 1 + static_cast<int>(random() % 5);
    const llmpq::KeepAwake awake(random() % 2 == 0);
    std::vector<int64_t> given(items, loop), done(items, 0);
    std::atomic<int64_t> begun{0};
    llmpq::parallel_for(items, threads, [&](int64_t i) {
      if (i >= first) {
        llmpq::spin_until([&] { return begun.load(std::memory_order_acquire) == first; });
        for (int64_t j = 0; j < first; ++j) wrong += done[j] != 1;
      }
      done[i] += given[i] == loop ? 1 : 2;
      if (i < first) begun.fetch_add(1, std::memory_order_release);
      if (std::this_thread::get_id() != caller) ++by_others;
    });
    for (const int64_t times : done) wrong += times != 1;
    if (loop % 1000 == 999) std::this_thread::sleep_for(std::chrono::milliseconds(5));  // the others fall asleep
  }
}

void call_sleeping_threads() {
  const std::thread::id caller = std::this_thread::get_id();
  for (int loop = 0; loop < 20; ++loop) {
    std::this_thread::sleep_for(std::chrono::milliseconds(5));
    llmpq::parallel_for(8, 4, [&](int64_t) {
      std::this_thread::sleep_for(std::chrono::milliseconds(1));
      if (std::this_thread::get_id() != caller) ++by_others;
    });
  }
}

}  // namespace

int main() {
  std::vector<std::thread> callers;
  for (unsigned seed = 1; seed <= 3; ++seed) callers.emplace_back(call_loops, seed, 4000);
  for (std::thread& caller : callers) caller.join();
  by_others = 0;
  call_loops(4, 8000);  // alone, so that it has the pool each time
  std::printf("%lld wrong, %s, ", static_cast<long long>(wrong.load()), by_others > 0 ? "shared" : "not shared");
  by_others = 0;
  call_sleeping_threads();
  std::printf("%s\n", by_others > 0 ? "woken" : "not woken");
}

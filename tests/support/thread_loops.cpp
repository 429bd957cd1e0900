// Loops of the pool from several threads at once: each item of each loop must be done once, before the loop ends.
// Prints how many were not. Built with ThreadSanitizer by tests/kernels/test_threads.py.
#include <atomic>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <random>
#include <thread>
#include <vector>

#include "cpu/threads.h"

namespace {

std::atomic<int64_t> wrong{0};

void call_loops(unsigned seed, int loops) {
  std::mt19937 random(seed);
  for (int loop = 0; loop < loops; ++loop) {
    const auto items = static_cast<int64_t>(random() % 40);
    const int threads = 1 + static_cast<int>(random() % 5);
    const llmpq::KeepAwake awake(random() % 2 == 0);
    std::vector<int64_t> given(items, loop), done(items, 0);
    llmpq::parallel_for(items, threads, [&](int64_t i) { done[i] += given[i] == loop ? 1 : 2; });
    for (const int64_t times : done) wrong += times != 1;
    if (loop % 1000 == 999) std::this_thread::sleep_for(std::chrono::milliseconds(5));  // the others fall asleep
  }
}

}  // namespace

int main() {
  std::vector<std::thread> callers;
  for (unsigned seed = 1; seed <= 3; ++seed) callers.emplace_back(call_loops, seed, 4000);
  for (std::thread& caller : callers) caller.join();
  call_loops(4, 8000);  // alone, so that it has the pool each time
  std::printf("%lld items were not done once\n", static_cast<long long>(wrong.load()));
}

// Running a recorded program.
#include "cpu/program.h"

#include <chrono>

#include "cpu/threads.h"

namespace llmpq {
void Program::run(const Pass& pass, int threads, double* seconds) const {
  using Clock = std::chrono::steady_clock;
  const KeepAwake awake(threads > 1);
  auto before = seconds == nullptr ? Clock::time_point() : Clock::now();
  for (const auto& operation : operations_) {
    operation(pass, threads);
    if (seconds == nullptr) continue;
    const auto now = Clock::now();
    *seconds++ = std::chrono::duration<double>(now - before).count();
    before = now;
  }
}

}  // namespace llmpq

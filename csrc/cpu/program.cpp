// Running a recorded program.
#include "cpu/program.h"

#include <chrono>

#include "cpu/threads.h"

namespace llmpq {

int64_t Program::times_recorded(const char* name, int64_t rows) {
  if (recorded_rows_ == 0) recorded_rows_ = rows;
  if (rows % recorded_rows_ != 0) {
    throw std::runtime_error(std::string(name) + " was called for " + std::to_string(rows) +
                             " rows while a program was recorded for " + std::to_string(recorded_rows_));
  }
  return rows / recorded_rows_;
}

void Program::run(const Pass& pass, int threads, double* seconds) const {
  using Clock = std::chrono::steady_clock;
  const KeepAwake awake(threads > 1);
  auto before = seconds == nullptr ? Clock::time_point() : Clock::now();
  Pass after = pass;
  after.rows = pass.sequences.count;
  for (size_t i = 0; i < operations_.size(); ++i) {
    operations_[i](i < before_last_rows_ ? pass : after, threads);
    if (seconds == nullptr) continue;
    const auto now = Clock::now();
    *seconds++ = std::chrono::duration<double>(now - before).count();
    before = now;
  }
}

}  // namespace llmpq

// What is done to rows one by one, shared out to threads: activations, scales, learned positions, the likeliest tokens.
#include <algorithm>

#include "cpu/kernels.h"
#include "cpu/threads.h"

namespace llmpq {
namespace {

constexpr int64_t kWorkPerThread = 1 << 13;  // elements below which another thread costs more than it gives

}  // namespace

void activate(const ActivationArgs& args, int threads) {
  const auto row_kernel = kernels().activate;
  parallel_for(args.rows, useful_threads(args.rows * args.size, kWorkPerThread, threads),
               [&](int64_t row) { row_kernel(args, row); });
}

void scale(const ScaleArgs& args, int threads) {
  const auto row_kernel = kernels().scale;
  parallel_for(args.rows, useful_threads(args.rows * args.size, kWorkPerThread, threads),
               [&](int64_t row) { row_kernel(args, row); });
}

void add_positions(const PositionArgs& args, int) {
  float* y = args.y;
  for (int64_t s = 0; s < args.sequences.count; ++s) {
    const int64_t length = args.sequences.query_lens[s];
    const float* row = args.table + (args.sequences.context_lens[s] - length) * args.size;
    for (int64_t i = 0; i < length * args.size; ++i) y[i] += row[i];
    y += length * args.size;
  }
}

void last_rows(const LastRowsArgs& args, int) {
  const float* x = args.x;
  for (int64_t s = 0; s < args.sequences.count; ++s) {
    x += args.sequences.query_lens[s] * args.size;
    std::copy(x - args.size, x, args.y + s * args.size);
  }
}

void argmax(const ArgmaxArgs& args, int threads) {
  const auto row_kernel = kernels().argmax;
  parallel_for(args.rows, useful_threads(args.rows * args.size, kWorkPerThread, threads),
               [&](int64_t row) { args.columns[row] = row_kernel(args.x + row * args.size, args.size); });
}

}  // namespace llmpq

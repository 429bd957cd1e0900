// Where tokens go among experts, and the sum of what comes back. Their products are in gemm.cpp.
#include "cpu/experts.h"

#include <algorithm>
#include <cmath>

#include "cpu/threads.h"

namespace llmpq {
namespace {

constexpr int64_t kWorkPerThread = 1 << 15;  // elements below which another thread costs more than it gives

void choose(const float* logits, int64_t experts, int64_t count, int32_t* chosen) {
  int64_t found = 0;
  for (int64_t expert = 0; expert < experts; ++expert) {
    if (found == count && !(logits[expert] > logits[chosen[count - 1]])) continue;
    int64_t at = found < count ? found++ : count - 1;
    for (; at > 0 && logits[expert] > logits[chosen[at - 1]]; --at) chosen[at] = chosen[at - 1];
    chosen[at] = static_cast<int32_t>(expert);
  }
}

void route_row(const RouteArgs& a, int64_t row) {
  const float* logits = a.logits + row * a.stride;
  int32_t* chosen = a.chosen + row * a.per_token;
  float* weights = a.weights + row * a.per_token;
  choose(logits, a.experts, a.per_token, chosen);
  const float largest = logits[chosen[0]];
  const auto score = [&](float x) { return a.sigmoid ? 1.0f / (1.0f + std::exp(-x)) : std::exp(x - largest); };
  for (int64_t j = 0; j < a.per_token; ++j) weights[j] = score(logits[chosen[j]]);
  double total = 0.0;
  if (a.normalized) {
    for (int64_t j = 0; j < a.per_token; ++j) total += weights[j];
  } else if (a.sigmoid) {
    return;
  } else {
    for (int64_t expert = 0; expert < a.experts; ++expert) total += score(logits[expert]);
  }
  for (int64_t j = 0; j < a.per_token; ++j) weights[j] = static_cast<float>(weights[j] / total);
}

void combine_row(const CombineArgs& a, int64_t row) {
  constexpr int64_t kColumns = 64;  // whose sums stay near
  const float *x = a.x + row * a.per_token * a.size, *weights = a.weights + row * a.per_token;
  for (int64_t first = 0; first < a.size; first += kColumns) {
    const int64_t count = std::min(kColumns, a.size - first), at = row * a.size + first;
    float sums[kColumns];
    for (int64_t i = 0; i < count; ++i) sums[i] = weights[0] * x[first + i];
    for (int64_t j = 1; j < a.per_token; ++j) {
      for (int64_t i = 0; i < count; ++i) sums[i] += weights[j] * x[j * a.size + first + i];
    }
    for (int64_t i = 0; i < count; ++i) a.y[at + i] = sums[i] + a.residual[at + i];
  }
}

}  // namespace

void route(const RouteArgs& args, int threads) {
  constexpr int64_t kElementWork = 8;  // of an exponential, in elements of `combine`
  parallel_for(args.rows, useful_threads(args.rows * args.experts * kElementWork, kWorkPerThread, threads),
               [&](int64_t row) { route_row(args, row); });
}

void combine(const CombineArgs& args, int threads) {
  parallel_for(args.rows, useful_threads(args.rows * args.per_token * args.size, kWorkPerThread, threads),
               [&](int64_t row) { combine_row(args, row); });
}

}  // namespace llmpq

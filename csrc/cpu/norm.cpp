// RMS and layer norm over rows, shared out to threads.
#include "cpu/kernels.h"
#include "cpu/threads.h"

namespace llmpq {
namespace {

constexpr int64_t kWorkPerThread = 1 << 17;  // elements below which another thread costs more than it gives

void normalize(const NormArgs& args, int threads, void (*row_kernel)(const NormArgs&, int64_t)) {
  parallel_for(args.rows, useful_threads(args.rows * args.size, kWorkPerThread, threads),
               [&](int64_t row) { row_kernel(args, row); });
}

}  // namespace

void rms_norm(const NormArgs& args, int threads) { normalize(args, threads, kernels().rms_norm); }
void layer_norm(const NormArgs& args, int threads) { normalize(args, threads, kernels().layer_norm); }

void head_norm(const HeadNormArgs& args, int threads) {
  const auto row_kernel = kernels().rms_norm;
  const int used = useful_threads(args.tokens * args.groups * args.size, kWorkPerThread, threads);
  parallel_for(args.tokens, used, [&](int64_t token) {
    float* x = args.x + token * args.stride;
    const NormArgs groups{x, args.weight, nullptr, nullptr, x, args.groups, args.size, args.size, args.eps};
    for (int64_t group = 0; group < args.groups; ++group) row_kernel(groups, group);
  });
}

}  // namespace llmpq

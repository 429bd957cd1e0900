// RMS and layer norm over rows, shared out to threads.
#include <algorithm>

#include "cpu/kernels.h"
#include "cpu/threads.h"

namespace llmpq {
namespace {

constexpr int64_t kWorkPerThread = 1 << 17;  // elements below which another thread costs more than it gives

void normalize(const NormArgs& args, int threads, void (*row_kernel)(const NormArgs&, int64_t)) {
  const int used = static_cast<int>(std::min<int64_t>(threads, 1 + args.rows * args.size / kWorkPerThread));
  parallel_for(args.rows, used, [&](int64_t row) { row_kernel(args, row); });
}

}  // namespace

void rms_norm(const NormArgs& args, int threads) { normalize(args, threads, kernels().rms_norm); }
void layer_norm(const NormArgs& args, int threads) { normalize(args, threads, kernels().layer_norm); }

}  // namespace llmpq

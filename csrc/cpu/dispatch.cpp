// Which instruction set's kernels are used.
#include <cstdlib>
#include <stdexcept>
#include <string>

#include "cpu/kernels.h"

namespace llmpq {

extern const Kernels kPortableKernels;
#if defined(__x86_64__)
extern const Kernels kAvx2Kernels, kAvx512Kernels;
#endif

namespace {

const Kernels& choose(const std::string& widest) {
  if (widest != "portable" && widest != "avx2" && widest != "avx512") {
    throw std::invalid_argument("LLMPQ_ISA is '" + widest + "', expected portable, avx2 or avx512");
  }
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (avx512 && widest == "avx512") return kAvx512Kernels;
  if (avx2 && widest != "portable") return kAvx2Kernels;
#endif
  return kPortableKernels;
}

}  // namespace

const Kernels& kernels() {
  static const Kernels& chosen = [&]() -> const Kernels& {
    const char* widest = std::getenv("LLMPQ_ISA");
    return choose(widest != nullptr && *widest != 0 ? widest : "avx512");
  }();
  return chosen;
}

}  // namespace llmpq

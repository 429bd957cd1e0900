// Which instruction set's kernels are used.
#include <algorithm>
#include <cstdlib>
#include <iterator>
#include <stdexcept>
#include <string>

#include "cpu/kernels.h"

namespace llmpq {

extern const Kernels kPortableKernels;
#if defined(__x86_64__)
extern const Kernels kAvx2Kernels, kAvxVnniKernels, kAvx512Kernels;
#endif

namespace {

const Kernels& choose(const std::string& widest) {
  const std::string names[] = {"portable", "avx2", "avxvnni", "avx512"};
  const auto rank = std::find(std::begin(names), std::end(names), widest) - std::begin(names);
  if (rank == 4) {
    throw std::invalid_argument("LLMPQ_ISA is '" + widest + "', expected portable, avx2, avxvnni or avx512");
  }
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
                      __builtin_cpu_supports("avx512vnni");
  if (avx512 && rank >= 3) return kAvx512Kernels;
#if defined(LLMPQ_AVXVNNI)
  if (avx2 && __builtin_cpu_supports("avxvnni") && rank >= 2) return kAvxVnniKernels;
#endif
  if (avx2 && rank >= 1) return kAvx2Kernels;
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

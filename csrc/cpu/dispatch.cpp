// Which instruction set's kernels are used.
#include <algorithm>
#include <cstdlib>
#include <iterator>
#include <stdexcept>
#include <string>

#if defined(LLMPQ_AMX)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include "cpu/kernels.h"

namespace llmpq {

extern const Kernels kPortableKernels;
#if defined(__x86_64__)
extern const Kernels kAvx2Kernels, kAvxVnniKernels, kAvx512Kernels;
#endif
#if defined(LLMPQ_AMX)
extern const GemmKernel<Int8Rows> kAmxGemm;
#endif

namespace {

constexpr const char* kDefaultIsa = "avx512";  // "amx" once it has been measured on such a processor

#if defined(LLMPQ_AMX)
constexpr int kAmxRows = 6;  // below, reading the weights takes longer than either kernel

#if defined(LLMPQ_EMULATED_TILES)
bool amx_permitted() { return true; }
#else
// Whether the processor has AMX for int8, and the system keeps its registers.
bool has_amx() {
  const char* emulated = std::getenv("LLMPQ_AMX_EMULATED");  // where tests execute the instructions
  if (emulated != nullptr && std::string(emulated) == "1") return true;
  unsigned a, b, c, d;
  if (__get_cpuid(1, &a, &b, &c, &d) == 0 || (c >> 27 & 1) == 0) return false;  // OSXSAVE: there is XGETBV
  if (__get_cpuid_count(7, 0, &a, &b, &c, &d) == 0 || (d >> 24 & 3) != 3) return false;  // AMX-TILE, AMX-INT8
  unsigned low, high;
  asm("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return (low >> 17 & 3) == 3;  // XTILECFG, XTILEDATA
}

// Linux lets a process use them once it has asked, for all its threads and the children that it forks; it may refuse.
bool amx_permitted() {
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM
  static const bool permitted = has_amx() && syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
  return permitted;
}
#endif

const Kernels& amx_kernels() {
  static const Kernels amx = [] {
    Kernels amx = kAvx512Kernels;
    amx.isa = "amx";
    amx.many_rows = kAmxRows;
    amx.gemm_int8_many = kAmxGemm;
    return amx;
  }();
  return amx;
}
#endif

const Kernels& choose(const std::string& widest) {
  const std::string names[] = {"portable", "avx2", "avxvnni", "avx512", "amx"};
  const auto rank = std::find(std::begin(names), std::end(names), widest) - std::begin(names);
  if (rank == std::end(names) - std::begin(names)) {
    throw std::invalid_argument("LLMPQ_ISA is '" + widest + "', expected portable, avx2, avxvnni, avx512 or amx");
  }
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
                      __builtin_cpu_supports("avx512vnni");
#if defined(LLMPQ_AMX)
  if (avx512 && rank >= 4 && amx_permitted()) return amx_kernels();
#endif
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
    return choose(widest != nullptr && *widest != 0 ? widest : kDefaultIsa);
  }();
  return chosen;
}

}  // namespace llmpq

// What this machine can do at most: bytes read from memory, float32 multiply-adds and int8 dot products per second.
// bench/kernels/ceilings.py compiles this for the processor that it runs on.

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <future>
#include <thread>
#include <vector>

#include <sched.h>
#include <sys/mman.h>
#if defined(__x86_64__)
#include <immintrin.h>
#endif
#if defined(__AMX_INT8__) && defined(__linux__)
#define HAS_TILES 1
#include <sys/syscall.h>
#include <unistd.h>

#include "cpu/amx_tiles.h"
#endif

namespace {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#else
constexpr int kVectorBytes = 32;
#endif
typedef float Floats __attribute__((vector_size(kVectorBytes)));
typedef uint64_t Words __attribute__((vector_size(kVectorBytes)));

constexpr size_t kHugePage = size_t{2} << 20;

volatile double sink;  // results go here, so that no work is left out

// Keep the calling thread on one of the processors that the process may use.
void pin(int index) {
#if defined(__linux__)
  cpu_set_t allowed, chosen;
  if (sched_getaffinity(0, sizeof allowed, &allowed) != 0 || CPU_COUNT(&allowed) == 0) return;
  int skip = index % CPU_COUNT(&allowed), cpu = 0;
  while (!CPU_ISSET(cpu, &allowed) || skip-- > 0) ++cpu;
  CPU_ZERO(&chosen);
  CPU_SET(cpu, &chosen);
  sched_setaffinity(0, sizeof chosen, &chosen);
#endif
}

// Seconds from when the threads may start to when the last is done.
double seconds_of(int threads, const std::function<double(int)>& work) {
  using Clock = std::chrono::steady_clock;
  std::promise<void> go;
  const std::shared_future<void> started = go.get_future().share();  // they sleep: spinning could hold up the others
  std::vector<double> results(threads);
  std::vector<std::thread> workers;
  for (int index = 0; index < threads; ++index) {
    workers.emplace_back([&, index] {
      pin(index);
      started.wait();
      results[index] = work(index);
    });
  }
  const auto start = Clock::now();
  go.set_value();
  for (auto& worker : workers) worker.join();
  const double seconds = std::chrono::duration<double>(Clock::now() - start).count();
  for (double result : results) sink = result;
  return seconds;
}

double read_all(const uint8_t* data, size_t bytes) {
  constexpr int kUnrolled = 8;
  Words sums[kUnrolled] = {};
  const auto* words = reinterpret_cast<const Words*>(data);
  for (size_t i = 0; i + kUnrolled <= bytes / kVectorBytes; i += kUnrolled) {
    for (int j = 0; j < kUnrolled; ++j) sums[j] += words[i + j];
  }
  for (int j = 1; j < kUnrolled; ++j) sums[0] += sums[j];
  return static_cast<double>(sums[0][0]);
}

constexpr int kChains = 12;  // more than the latency of a multiply-add times how many start per cycle
constexpr int64_t kRepeats = 20'000'000, kFewRepeats = 2'000'000;
constexpr double kRepeatOperations = 2.0 * kVectorBytes / sizeof(float) * kChains;

double multiply_add(int index, int64_t repeats) {
  Floats sums[kChains];
  for (int j = 0; j < kChains; ++j) sums[j] = Floats{} + static_cast<float>(j);  // equal chains would be computed once
  const Floats factor = Floats{} + (0.5f + 1e-3f * index);
  const Floats addend = Floats{} + 1.0f;
  for (int64_t i = 0; i < repeats; ++i) {
#pragma GCC unroll 16
    for (int j = 0; j < kChains; ++j) sums[j] = sums[j] * factor + addend;
  }
  for (int j = 1; j < kChains; ++j) sums[0] += sums[j];
  return sums[0][0];
}

#if defined(__AVX512VNNI__)
#define HAS_DOT 1
using Dot = __m512i;
inline Dot dot(Dot sum, Dot a, Dot b) { return _mm512_dpbusd_epi32(sum, a, b); }
#elif defined(__AVXVNNI__)
#define HAS_DOT 1
using Dot = __m256i;
inline Dot dot(Dot sum, Dot a, Dot b) { return _mm256_dpbusd_avx_epi32(sum, a, b); }
#elif defined(__AVX2__)
#define HAS_DOT 1
using Dot = __m256i;
// In 16 bits, as far as sums fit: no product of bytes is faster without VNNI.
inline Dot dot(Dot sum, Dot a, Dot b) {
  Dot product;
  asm volatile("vpmaddubsw %2, %1, %0" : "=x"(product) : "x"(a), "x"(b));  // volatile: it is made anew each time
  return _mm256_add_epi16(sum, product);
}
#endif

#if defined(HAS_DOT)
double dot_products(int index) {
  Dot sums[kChains], a, b;
  for (int j = 0; j < kChains; ++j) std::memset(&sums[j], j, sizeof(Dot));
  std::memset(&a, index + 1, sizeof a);
  std::memset(&b, index + 2, sizeof b);
  for (int64_t i = 0; i < kRepeats; ++i) {
#pragma GCC unroll 16
    for (int j = 0; j < kChains; ++j) sums[j] = dot(sums[j], a, b);
  }
  int64_t total = 0;
  for (const Dot& sum : sums) {
    int64_t first;
    std::memcpy(&first, &sum, sizeof first);
    total ^= first;
  }
  return static_cast<double>(total);
}
#endif

#if defined(HAS_TILES)
using llmpq::AmxTiles;

constexpr int64_t kTileSteps = 1'000'000, kFewTileSteps = 200;
constexpr int kStepsInL1 = 4;  // 16 KiB of operands
constexpr double kTileStepOperations = 2.0 * 4 * 16 * 16 * 64;

bool tiles_permitted() {
  static const bool permitted = syscall(SYS_arch_prctl, 0x1023, 18) == 0;  // ARCH_REQ_XCOMP_PERM
  return permitted;
}

// Two by two tiles of sums, as the product uses them, whose operands come from L1.
double tile_products(int64_t steps) {
  alignas(64) static thread_local uint8_t operands[kStepsInL1][4][1024] = {};
  alignas(64) llmpq::TileConfig before, config = {};
  AmxTiles::read_config(before);  // some library may count on it
  config.palette = 1;
  for (int tile = 0; tile < 8; ++tile) config.column_bytes[tile] = 64, config.rows[tile] = 16;
  AmxTiles::configure(config);
  for (int64_t i = 0; i < steps; ++i) {
    const auto* from = operands[i % kStepsInL1];
    AmxTiles::load<4>(from[0], 64);
    AmxTiles::load<5>(from[1], 64);
    AmxTiles::load<6>(from[2], 64);
    AmxTiles::load<7>(from[3], 64);
    AmxTiles::dot<0, 4, 6>();
    AmxTiles::dot<1, 4, 7>();
    AmxTiles::dot<2, 5, 6>();
    AmxTiles::dot<3, 5, 7>();
  }
  alignas(64) int32_t sums[16][16];
  AmxTiles::store<0>(sums, 64);
  AmxTiles::configure(before);
  return sums[0][0];
}
#endif

}  // namespace

extern "C" {

// Memory in pages of 2 MiB where the system has them, written once; null if there is none. `bytes` is a multiple of
// 2 MiB. It is kept until the process ends.
void* ceilings_allocate(size_t bytes) {
  void* mapped = mmap(nullptr, bytes + kHugePage, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (mapped == MAP_FAILED) return nullptr;
  const auto start = (reinterpret_cast<uintptr_t>(mapped) + kHugePage - 1) / kHugePage * kHugePage;
  void* aligned = reinterpret_cast<void*>(start);
#if defined(MADV_HUGEPAGE)
  madvise(aligned, bytes, MADV_HUGEPAGE);
#endif
  std::memset(aligned, 1, bytes);
  return aligned;
}

double ceilings_read_seconds(const void* data, size_t bytes, int threads) {
  const size_t part = bytes / threads / kHugePage * kHugePage;
  return seconds_of(threads, [=](int index) {
    const size_t end = index + 1 == threads ? bytes : part * (index + 1);
    return read_all(static_cast<const uint8_t*>(data) + part * index, end - part * index);
  });
}

double ceilings_fp32_flop_per_s(int threads) {
  return kRepeatOperations * kRepeats * threads / seconds_of(threads, [](int i) { return multiply_add(i, kRepeats); });
}

// The same over some milliseconds.
double ceilings_fp32_flop_per_s_now(int threads) {
  const double operations = kRepeatOperations * kFewRepeats * threads;
  return operations / seconds_of(threads, [](int i) { return multiply_add(i, kFewRepeats); });
}

// 0: the compiler knows of no such instruction on this processor.
double ceilings_int8_op_per_s([[maybe_unused]] int threads) {
#if defined(HAS_DOT)
  const double operations = 2.0 * sizeof(Dot) * kChains * kRepeats * threads;
  return operations / seconds_of(threads, dot_products);
#else
  return 0;
#endif
}

// The same in tiles of AMX.
double ceilings_tile_op_per_s([[maybe_unused]] int threads) {
#if defined(HAS_TILES)
  if (!tiles_permitted()) return 0;
  const double operations = kTileStepOperations * kTileSteps * threads;
  return operations / seconds_of(threads, [](int) { return tile_products(kTileSteps); });
#else
  return 0;
#endif
}

// The same on the calling thread, over some microseconds.
double ceilings_tile_op_per_s_now() {
#if defined(HAS_TILES)
  if (!tiles_permitted()) return 0;
  using Clock = std::chrono::steady_clock;
  const auto start = Clock::now();
  sink = tile_products(kFewTileSteps);
  return kTileStepOperations * kFewTileSteps / std::chrono::duration<double>(Clock::now() - start).count();
#else
  return 0;
#endif
}
}

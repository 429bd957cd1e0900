// The host's csrc/cuda/ptx.cuh: what a GPU does, said in C++ after the PTX ISA's definitions.
//
// Thread blocks run one after the other, in either order. The threads of one are coroutines; one hands over where it
// waits for others, at barriers and in warp-wide instructions. There are two extremes of what a GPU may do: asynchronous
// copies are made when they are waited for, and all warps keep step; or they are made at once, and a warp runs on until
// it comes to a barrier of the block. Shared memory begins as NaNs, and it is an error to copy what is not aligned or
// what is forbidden, and to use what the GPU does not have.
//
// A kernel that may begin before the ones before it have ended does so as far as it can: what these write arrives only
// where a block waits for them. Until then it is NaNs, and it is an error to copy from it or to write to it.
//
// Products of warpgroups have the same extremes: they are made when they are begun, or when they are waited for; their
// sums are NaNs in between. It is an error to touch sums or left factors meanwhile, to begin a batch of products without
// a fence, and to multiply what was written to shared memory and not shown to products since.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <type_traits>
#include <utility>
#include <vector>

#define LLMPQ_DEVICE inline
#define __launch_bounds__(...)
#define LLMPQ_HAS_WGMMA
#define threadIdx emulation::thread().index
#define blockIdx emulation::block_index

namespace emulation {

constexpr size_t kStackBytes = 1 << 17;

[[noreturn]] inline void fail(const char* what) {
  std::fprintf(stderr, "emulation: %s\n", what);
  std::abort();
}

struct Copy {
  void* to;
  const void* from;  // null: zeros

  void make() const;
};

// A product of a warpgroup, as one thread sees it.
struct Product {
  float* sums;
  int count;  // of sums
  bool adds;
  const void* left;
  uint32_t words[4];  // of left, as they were
  bool bfloat16;
  uint64_t right;
};

struct Thread {
  uint3 index;
  ucontext_t context;
  std::unique_ptr<char[]> stack{new char[kStackBytes]};
  bool done;
  const void* at_barrier;  // that of the block, while it waits there
  bool waited;             // for the grids before
  std::vector<Copy> begun;                 // copies of the batch that is not ended yet
  std::vector<std::vector<Copy>> batches;  // and of those that are, oldest first
  std::vector<int> unshown;                // pieces of shared memory that it wrote and has not shown to products

  bool fenced;  // whether products may be begun
  std::vector<Product> products;  // of the batch that is not ended yet
  std::vector<std::vector<Product>> product_batches;
  std::map<float*, std::vector<float>> sums;  // of products that are not done, as they are
};

// Where some threads wait until all of them have come.
struct Barrier {
  int arrived;
  unsigned turn;
};

struct Warp {
  Barrier barrier;
  uint32_t words[32][6];  // what each lane shows the others
  const Product* products[32];
};

// What the emulated GPU has.
inline int capability = 90, multiprocessors = 3, shared_bytes = 227 * 1024;

inline bool backwards;  // the order in which blocks, and threads, take turns
inline bool hasty;      // copies are made at once, and warps run ahead
inline std::vector<Thread> threads;
inline std::vector<Warp> warps;
inline Barrier block_barrier;  // only its address counts
inline std::vector<uint4> shared;
inline std::vector<int> unshown;  // for each piece of shared memory, how many threads wrote it and have not shown it
inline bool is_last;
inline uint3 block_index;
inline int current;
inline long waits;  // since a thread last came further
inline ucontext_t scheduler;
inline std::function<void()> entry;

using Ranges = std::vector<std::pair<uintptr_t, uintptr_t>>;  // from, to
inline Ranges forbidden;
inline Ranges late;                             // what the grids before write
inline std::vector<std::vector<char>> arrived;  // its contents, while it is not there
inline bool early;                              // this grid began before they ended
inline bool deaf;                               // a fault: waiting for them is of no use

inline Thread& thread() { return threads[current]; }
inline Warp& warp() { return warps[current / 32]; }

// Until all of the block have come, which the scheduler sees.
inline void sync_block() {
  thread().at_barrier = &block_barrier;
  swapcontext(&thread().context, &scheduler);
}

// Until all of the warp have come.
inline void sync_warp() {
  Barrier& barrier = warp().barrier;
  const unsigned turn = barrier.turn;
  waits = 0;
  if (++barrier.arrived == 32) {
    barrier.arrived = 0;
    ++barrier.turn;
    return;
  }
  while (barrier.turn == turn) {
    if (++waits > 4 * static_cast<long>(threads.size())) fail("a warp waits for one of its threads");
    swapcontext(&thread().context, &scheduler);
  }
}

inline void check_aligned(const void* address) {
  if (reinterpret_cast<uintptr_t>(address) % 16) fail("a copy of 16 bytes is not aligned");
}

inline bool is_in(const Ranges& ranges, const void* address) {
  const auto at = reinterpret_cast<uintptr_t>(address);
  return std::any_of(ranges.begin(), ranges.end(), [=](auto range) { return at + 16 > range.first && at < range.second; });
}

inline void check_allowed(const void* address) {
  if (is_in(forbidden, address)) fail("a copy from outside its tensor");
  if (early && !thread().waited && is_in(late, address)) fail("a copy of what the grids before may still write");
}

inline void take_late_away() {
  for (const auto& [from, to] : late) {
    char* const memory = reinterpret_cast<char*>(from);
    arrived.emplace_back(memory, memory + (to - from));
    std::memset(memory, 0xFF, to - from);
  }
}

inline void bring_late() {
  for (size_t i = 0; i < arrived.size(); ++i) {
    char* const memory = reinterpret_cast<char*>(late[i].first);
    if (!deaf && std::any_of(memory, memory + arrived[i].size(), [](char byte) { return byte != '\xFF'; })) {
      fail("a write to what the grids before may still use");
    }
    std::copy(arrived[i].begin(), arrived[i].end(), memory);
  }
  arrived.clear();
}

// Until all of the block wait for the grids before.
inline void wait_for_grids_before() {
  thread().waited = true;
  if (!early) return;
  sync_block();
  if (!deaf) bring_late();
}

inline void Copy::make() const {
  if (from) {
    std::memcpy(to, from, 16);
  } else {
    std::memset(to, 0, 16);
  }
  const int piece = static_cast<int>((static_cast<char*>(to) - reinterpret_cast<char*>(shared.data())) / 16);
  ++unshown[piece];
  thread().unshown.push_back(piece);
}

inline void run_thread() {
  entry();
  if (!thread().begun.empty()) fail("copies were begun in a batch that never ended");
  if (early && !thread().waited) fail("a thread did not wait for the grids before");
  if (!thread().products.empty() || !thread().sums.empty()) fail("products were never waited for");
  thread().done = true;
}

inline void run_block(unsigned block, unsigned count, size_t shared_bytes) {
  block_index = {block, 0, 0};
  shared.assign(shared_bytes / sizeof(uint4) + 1, uint4{~0u, ~0u, ~0u, ~0u});
  unshown.assign(shared.size(), 0);
  warps.assign(count / 32, Warp{});
  if (threads.size() != count) threads = std::vector<Thread>(count);
  waits = 0;
  for (unsigned i = 0; i < count; ++i) {
    Thread& one = threads[i];
    one.index = {i, 0, 0};
    one.done = false;
    one.at_barrier = nullptr;
    one.waited = false;
    one.begun.clear();
    one.batches.clear();
    one.unshown.clear();
    one.fenced = false;
    one.products.clear();
    one.product_batches.clear();
    one.sums.clear();
    getcontext(&one.context);
    one.context.uc_stack.ss_sp = one.stack.get();
    one.context.uc_stack.ss_size = kStackBytes;
    one.context.uc_link = &scheduler;
    makecontext(&one.context, run_thread, 0);
  }
  const auto take_turns = [&](unsigned first, unsigned end) {  // whether any came further
    bool running = false;
    for (unsigned turn = first; turn < end; ++turn) {
      current = static_cast<int>(backwards ? count - 1 - turn : turn);
      if (thread().done || thread().at_barrier == &block_barrier) continue;
      swapcontext(&scheduler, &thread().context);
      running = true;
    }
    return running;
  };
  const auto leave_barrier = [&] {  // of the block, if all have come; whether any is left to go on
    unsigned waiting = 0, done = 0;
    for (const Thread& one : threads) {
      waiting += one.at_barrier == &block_barrier;
      done += one.done;
    }
    if (done == count) return false;
    if (waiting != count) fail("some threads wait for others that are gone");
    for (Thread& one : threads) one.at_barrier = nullptr;
    return true;
  };
  do {
    if (hasty) {
      for (unsigned warp = 0; warp < count; warp += 32) {
        while (take_turns(warp, warp + 32)) {
        }
      }
    } else {
      while (take_turns(0, count)) {
      }
    }
  } while (leave_barrier());
}

inline float half_of(uint32_t bits) { return __half2float(__half(__half_raw{static_cast<unsigned short>(bits)})); }
inline float bfloat_of(uint32_t bits) {
  const uint32_t wide = bits << 16;
  float value;
  std::memcpy(&value, &wide, sizeof value);
  return value;
}
inline uint32_t bits_of(__half value) { return __half_raw(value).x; }
inline uint32_t bits_of(__nv_bfloat16 value) { return __nv_bfloat16_raw(value).x; }

}  // namespace emulation

namespace llmpq {

using std::max;
using std::min;

constexpr int kLanes = 32;

struct Half2 {
  uint32_t bits;
  float at(int i) const { return emulation::half_of(bits >> 16 * i & 0xFFFFu); }
  static Half2 of(double a, double b) {
    return {emulation::bits_of(__double2half(a)) | emulation::bits_of(__double2half(b)) << 16};
  }
};
struct BFloat2 {
  uint32_t bits;
  float at(int i) const { return emulation::bfloat_of(bits >> 16 * i & 0xFFFFu); }
  static BFloat2 of(double a, double b) {
    return {emulation::bits_of(__double2bfloat16(a)) | emulation::bits_of(__double2bfloat16(b)) << 16};
  }
};

inline int kept(int value) { return value; }
inline const uint8_t* kept(const uint8_t* value) { return value; }

inline float float_of_bits(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

inline uint32_t choose_bytes(uint32_t a, uint32_t b, uint32_t selector) {
  const uint64_t bytes = static_cast<uint64_t>(b) << 32 | a;
  uint32_t chosen = 0;
  for (int i = 0; i < 4; ++i) chosen |= static_cast<uint32_t>(bytes >> 8 * (selector >> 4 * i & 7) & 0xFF) << 8 * i;
  return chosen;
}

inline uint32_t masked_or(uint32_t a, uint32_t mask, uint32_t bits) { return (a & mask) | bits; }

inline Half2 subtract(Half2 a, Half2 b) {
  return Half2::of(double(a.at(0)) - b.at(0), double(a.at(1)) - b.at(1));
}
inline BFloat2 subtract(BFloat2 a, BFloat2 b) {
  if (emulation::capability < 80) emulation::fail("this GPU has no arithmetic for bfloat16");
  return BFloat2::of(double(a.at(0)) - b.at(0), double(a.at(1)) - b.at(1));
}
inline Half2 multiply_add(Half2 a, Half2 b, Half2 c) {
  return Half2::of(double(a.at(0)) * b.at(0) + c.at(0), double(a.at(1)) * b.at(1) + c.at(1));
}
inline BFloat2 rounded_pair(float first, float second) { return BFloat2::of(first, second); }

// PTX ISA, "Matrix Fragments for mma.m16n8k16" with 16-bit floats.
template <class Pair>
void multiply_tile(float (&sums)[4], const Pair (&a)[4], const Pair (&b)[2]) {
  if (emulation::capability < (std::is_same_v<Pair, Half2> ? 75 : 80)) emulation::fail("this GPU has no such product");
  emulation::Warp& warp = emulation::warp();
  const int lane = emulation::current % 32;
  for (int i = 0; i < 4; ++i) warp.words[lane][i] = a[i].bits;
  for (int i = 0; i < 2; ++i) warp.words[lane][4 + i] = b[i].bits;
  emulation::sync_warp();
  for (int i = 0; i < 4; ++i) {
    const int row = lane / 4 + 8 * (i / 2), column = lane % 4 * 2 + i % 2;
    double sum = sums[i];
    for (int k = 0; k < 16; ++k) {
      const Pair left{warp.words[row % 8 * 4 + k % 8 / 2][row / 8 + 2 * (k / 8)]};
      const Pair right{warp.words[column * 4 + k % 8 / 2][4 + k / 8]};
      sum += double(left.at(k % 2)) * right.at(k % 2);
    }
    sums[i] = static_cast<float>(sum);
  }
  emulation::sync_warp();
}

// PTX ISA, "Matrix Descriptor": no swizzling, k-major. Shared memory begins at address 0.
inline uint64_t matrix_in_shared(const void* start, int k_step, int row_step) {
  const auto address = static_cast<const char*>(start) - reinterpret_cast<const char*>(emulation::shared.data());
  if (address % 16 || k_step % 16 || row_step % 16) emulation::fail("a matrix in shared memory is not aligned");
  return address >> 4 | static_cast<uint64_t>(k_step >> 4) << 16 | static_cast<uint64_t>(row_step >> 4) << 32;
}

inline uint64_t moved(uint64_t matrix, int bytes) { return matrix + (bytes >> 4); }

inline void show_to_products() {
  for (const int piece : emulation::thread().unshown) --emulation::unshown[piece];
  emulation::thread().unshown.clear();
}

template <int Count, class Pair>
void begin_products(Pair (&)[Count][4]) {
  emulation::thread().fenced = true;
}

}  // namespace llmpq

namespace emulation {

inline uint32_t word_of(const Product& product, int i) {
  uint32_t word;
  std::memcpy(&word, static_cast<const char*>(product.left) + 4 * i, 4);
  return word;
}

// By the lanes of a warp, each of which has come to the same one: PTX ISA, "Matrix Fragments for wgmma.m64nNk16".
inline void make_product(const Product& product) {
  const int lane = current % 32;
  for (int i = 0; i < 4; ++i) {
    if (word_of(product, i) != product.words[i]) fail("a left factor was overwritten before its product was made");
  }
  warp().products[lane] = &product;
  sync_warp();
  const auto float_of = [&](uint32_t word, int half) {
    const uint32_t bits = word >> 16 * half & 0xFFFFu;
    return product.bfloat16 ? bfloat_of(bits) : half_of(bits);
  };
  for (const Product* other : warp().products) {
    if (other->right != product.right || other->count != product.count) fail("lanes differ in what they multiply");
  }
  float left[2][16];
  for (int half = 0; half < 2; ++half) {
    for (int k = 0; k < 16; ++k) {
      left[half][k] = float_of(warp().products[lane / 4 * 4 + k % 8 / 2]->words[half + 2 * (k / 8)], k % 2);
    }
  }
  const uint64_t start = product.right & 0x3FFF, k_step = product.right >> 16 & 0x3FFF, row_step = product.right >> 32 & 0x3FFF;
  std::vector<float>& sums = thread().sums.at(product.sums);
  for (int step = 0; step < product.count / 4; ++step) {
    for (int column = 0; column < 2; ++column) {
      float right[16];
      for (int core = 0; core < 2; ++core) {
        const uint64_t piece = start + core * k_step + step * row_step + (lane % 4 * 2 + column);
        if (piece >= shared.size()) fail("a product from outside shared memory");
        if (unshown[piece]) fail("a product of what was not shown to it");
        const uint4 words = shared[piece];
        const uint32_t four[4] = {words.x, words.y, words.z, words.w};
        for (int k = 0; k < 8; ++k) right[8 * core + k] = float_of(four[k / 2], k % 2);
      }
      for (int half = 0; half < 2; ++half) {
        float& sum = sums[step * 4 + half * 2 + column];
        double exact = product.adds ? sum : 0.0;
        for (int k = 0; k < 16; ++k) exact += double(left[half][k]) * right[k];
        sum = static_cast<float>(exact);
      }
    }
  }
  sync_warp();
}

}  // namespace emulation

namespace llmpq {

template <int Steps, class Pair>
void begin_product(float (&sums)[Steps][4], const Pair (&left)[4], uint64_t right, bool adds) {
  if (emulation::capability != 90) emulation::fail("this GPU has no such product");
  emulation::Thread& thread = emulation::thread();
  if (!thread.fenced) emulation::fail("a batch of products was begun without a fence");
  emulation::Product product{sums[0], Steps * 4, adds, left, {}, std::is_same_v<Pair, BFloat2>, right};
  for (int i = 0; i < 4; ++i) product.words[i] = left[i].bits;
  if (thread.sums.find(sums[0]) == thread.sums.end()) {
    thread.sums[sums[0]] = std::vector<float>(sums[0], sums[0] + Steps * 4);
    std::memset(sums, 0xFF, sizeof sums);
  }
  if (emulation::hasty) emulation::make_product(product);
  thread.products.push_back(product);
}

template <int Steps, class Pair>
void set_product(float (&sums)[Steps][4], const Pair (&left)[4], uint64_t right) {
  begin_product(sums, left, right, false);
}

template <int Steps, class Pair>
void add_product(float (&sums)[Steps][4], const Pair (&left)[4], uint64_t right) {
  begin_product(sums, left, right, true);
}

inline void end_products() {
  emulation::Thread& thread = emulation::thread();
  thread.product_batches.push_back(std::move(thread.products));
  thread.products.clear();
  thread.fenced = false;
}

template <int Batches>
void wait_for_products() {
  emulation::Thread& thread = emulation::thread();
  auto& batches = thread.product_batches;
  const int done = std::max(0, static_cast<int>(batches.size()) - Batches);
  for (int i = 0; i < done; ++i) {
    for (const emulation::Product& product : batches[i]) {
      if (!emulation::hasty) emulation::make_product(product);
    }
  }
  std::vector<float*> left;  // whose products are still to be made
  for (size_t i = done; i < batches.size(); ++i) {
    for (const emulation::Product& product : batches[i]) left.push_back(product.sums);
  }
  for (auto sums = thread.sums.begin(); sums != thread.sums.end();) {
    if (std::find(left.begin(), left.end(), sums->first) != left.end()) {
      ++sums;
      continue;
    }
    for (size_t i = 0; i < sums->second.size(); ++i) {
      uint32_t bits;
      std::memcpy(&bits, sums->first + i, 4);
      if (bits != 0xFFFFFFFFu) emulation::fail("sums were overwritten before their product was made");
    }
    std::copy(sums->second.begin(), sums->second.end(), sums->first);
    sums = thread.sums.erase(sums);
  }
  batches.erase(batches.begin(), batches.begin() + done);
}

template <int Steps>
void use_sums(float (&)[Steps][4]) {}

inline uint8_t* shared_memory() { return reinterpret_cast<uint8_t*>(emulation::shared.data()); }

// Shared memory begins at address 0.
struct SharedAddress {
  uint32_t bytes;

  SharedAddress operator+(int more) const { return {bytes + more}; }
};

inline SharedAddress shared_address(const void* in_shared) {
  return {static_cast<uint32_t>(static_cast<const uint8_t*>(in_shared) - shared_memory())};
}

inline SharedAddress kept(SharedAddress value) { return value; }

// PTX ISA, "ldmatrix": `Count` matrices of 8 rows of 16 bytes, the rows' addresses from lane 8 i + row on.
template <int Count>
void load_rows(SharedAddress row, bool transposed, uint32_t (&words)[Count]) {
  if (emulation::capability < 75) emulation::fail("this GPU loads no matrices");
  if (row.bytes % 16) emulation::fail("a row of a matrix is not aligned");
  if (row.bytes + 16 > emulation::shared.size() * sizeof(uint4)) emulation::fail("a matrix from outside shared memory");
  emulation::Warp& warp = emulation::warp();
  const int lane = emulation::current % 32, g = lane / 4, t = lane % 4;
  warp.words[lane][0] = row.bytes;
  emulation::sync_warp();
  const auto value = [&](int matrix, int of_row, int column) {
    uint16_t bits;
    std::memcpy(&bits, shared_memory() + warp.words[8 * matrix + of_row][0] + 2 * column, sizeof bits);
    return uint32_t{bits};
  };
  for (int i = 0; i < Count; ++i) {
    words[i] = transposed ? value(i, 2 * t, g) | value(i, 2 * t + 1, g) << 16
                          : value(i, g, 2 * t) | value(i, g, 2 * t + 1) << 16;
  }
  emulation::sync_warp();
}

inline void load_matrices(uint32_t (&words)[4], SharedAddress row) { load_rows(row, false, words); }

template <int Count>
void load_transposed(uint32_t (&pairs)[Count], SharedAddress row) {
  static_assert(Count == 2 || Count == 4, "as many matrices as csrc/cuda/ptx.cuh has");
  load_rows(row, true, pairs);
}

inline void copy_16_bytes(void* to, const void* from, bool wanted = true) {
  emulation::check_aligned(to);
  emulation::check_aligned(from);
  if (wanted) emulation::check_allowed(from);
  const emulation::Copy copy{to, wanted ? from : nullptr};
  if (emulation::hasty) return copy.make();
  emulation::thread().begun.push_back(copy);
}

inline void copy_16_bytes(SharedAddress to, const void* from, bool wanted = true) {
  copy_16_bytes(shared_memory() + to.bytes, from, wanted);
}

inline uint4 load_16_bytes(const void* from, bool wanted) {
  emulation::check_aligned(from);
  if (!wanted) return {0, 0, 0, 0};
  emulation::check_allowed(from);
  return *static_cast<const uint4*>(from);
}

inline void end_copy_batch() {
  emulation::Thread& thread = emulation::thread();
  thread.batches.push_back(std::move(thread.begun));
  thread.begun.clear();
}

template <int Batches>
void wait_for_copies() {
  auto& batches = emulation::thread().batches;
  const int done = std::max(0, static_cast<int>(batches.size()) - Batches);
  for (int i = 0; i < done; ++i) {
    for (const emulation::Copy& copy : batches[i]) copy.make();
  }
  batches.erase(batches.begin(), batches.begin() + done);
}

inline void sync_block() { emulation::sync_block(); }

inline void sync_warp() { emulation::sync_warp(); }

inline bool is_last_of(unsigned count, unsigned* counter) {
  emulation::sync_block();
  if (emulation::current == 0) {
    emulation::is_last = ++*counter == count;
    if (emulation::is_last) *counter = 0;
  }
  emulation::sync_block();
  return emulation::is_last;
}

inline float load_written_by_others(const float* from) { return *from; }

inline float warp_sum(float value) {
  emulation::Warp& warp = emulation::warp();
  for (int distance = 16; distance > 0; distance /= 2) {
    std::memcpy(&warp.words[emulation::current % 32][0], &value, sizeof value);
    emulation::sync_warp();
    value += float_of_bits(warp.words[emulation::current % 32 ^ distance][0]);
    emulation::sync_warp();
  }
  return value;
}

inline void let_next_grid_begin() {}
inline void wait_for_grids_before() { emulation::wait_for_grids_before(); }

template <class Args>
cudaError_t make_ready(void (*)(Args), int bytes, int& architecture) {
  architecture = 90;
  return bytes <= emulation::shared_bytes ? cudaSuccess : cudaErrorInvalidValue;
}

struct Grid {
  unsigned blocks, threads;
  size_t shared_bytes = 0;
  bool early = false;
};

template <class Args>
cudaError_t launch(void (*kernel)(Args), const Args& args, const Grid& grid, cudaStream_t) {
  if (grid.shared_bytes > static_cast<size_t>(emulation::shared_bytes)) return cudaErrorInvalidValue;
  if (grid.early && emulation::capability < 90) emulation::fail("this GPU lets no kernel begin early");
  emulation::entry = [=] { kernel(args); };
  emulation::early = grid.early;
  for (unsigned i = 0; i < grid.blocks; ++i) {
    if (grid.early) emulation::take_late_away();
    emulation::run_block(emulation::backwards ? grid.blocks - 1 - i : i, grid.threads, grid.shared_bytes);
    emulation::bring_late();  // where waiting did not
  }
  return cudaSuccess;
}

}  // namespace llmpq

// Matrix products and look-ups: cut into tasks, put x in the order the kernels read it, share the panels out to
// threads.
#include <algorithm>
#include <cstring>

#include "cpu/half.h"
#include "cpu/kernels.h"
#include "cpu/scratch.h"
#include "cpu/threads.h"

namespace llmpq {
namespace {

constexpr int64_t kWorkPerThread = 1 << 19;  // multiplications below which another thread costs more than it gives
constexpr int kTasksPerThread = 4;           // so that a thread that is held up does not hold up all
constexpr int64_t kPackedBytes = 3 << 18;    // of x in a task, so that they stay in an L2 cache of 1 MiB

int useful_threads(int64_t work, int threads) {
  return static_cast<int>(std::min<int64_t>(threads, 1 + work / kWorkPerThread));
}

// Of a row of x whose blocks come in so many together.
int64_t value_bytes(const GemmArgs& a, const FloatRows&, int blocks) {
  return ceil_div(a.k, blocks * kBlock) * blocks * kBlock * sizeof(float);
}
int64_t value_bytes(const GemmArgs& a, const Int8Rows& x, int blocks) {
  return ceil_div(a.k, blocks * kBlock) * blocks * kBlock * x.terms;
}

// Give `rows` rows, of `bytes` each, and the numbers that go with them their memory.
void place(const GemmArgs& a, FloatRows& x, int64_t rows, int64_t bytes) {
  uint8_t* memory = scratch(Scratch::kRows, rows * (bytes + ceil_div(a.k, kBlock) * sizeof(float)));
  x.values = reinterpret_cast<float*>(memory);
  x.sums = reinterpret_cast<float*>(memory + rows * bytes);
}

void place(const GemmArgs& a, Int8Rows& x, int64_t rows, int64_t bytes) {
  const int64_t numbers = rows * x.terms * ceil_div(ceil_div(a.k, kBlock), x.group_blocks);
  const int64_t totals = a.offsets != nullptr ? numbers / x.terms : 0;
  const int64_t all_numbers = numbers * (sizeof(float) + sizeof(int32_t)) + totals * sizeof(float);
  uint8_t* memory = scratch(Scratch::kRows, rows * bytes + all_numbers);
  x.values = reinterpret_cast<int8_t*>(memory);
  x.scales = reinterpret_cast<float*>(memory + rows * bytes);
  x.sums = reinterpret_cast<int32_t*>(x.scales + numbers);
  x.totals = reinterpret_cast<float*>(x.sums + numbers);
}

template <class Rows>
void multiply(const GemmArgs& args, int threads, const GemmKernel<Rows>& kernel, Rows x, int terms) {
  const int tile_rows = kernel.tile_rows / terms;
  const int64_t bytes = value_bytes(args, x, kernel.whole_tiles ? 2 : 1);
  const int64_t panels = ceil_div(args.n, kLanes);
  const int64_t rows_at_once = std::max<int64_t>(1, kPackedBytes / bytes / tile_rows) * tile_rows;
  for (int64_t row = 0; row < args.m; row += rows_at_once) {
    const int rows = static_cast<int>(std::min(rows_at_once, args.m - row));
    const int tiles = static_cast<int>(ceil_div(rows, tile_rows));
    place(args, x, kernel.whole_tiles ? tiles * tile_rows : rows, bytes);
    const GemmTask<Rows> task{&args, row, rows, tiles, x};
    const int used = useful_threads(rows * args.n * args.k, threads);
    parallel_for(task.tiles, rows == 1 ? 1 : used, [&](int64_t tile) {
      for (int r = 0; r < task.tile_rows(tile); ++r) kernel.pack(task, static_cast<int>(tile), r);
    });
    const int64_t share = used == 1 ? panels : ceil_div(panels, used * kTasksPerThread);
    const int64_t step = ceil_div(share, kernel.panels) * kernel.panels;
    parallel_for(ceil_div(panels, step), used,
                 [&](int64_t item) { kernel.multiply(task, item * step, std::min(panels, (item + 1) * step)); });
  }
}

}  // namespace

void gemm(const GemmArgs& args, int threads) {
  const Kernels& isa = kernels();
  if (args.activations == Activations::kFloat) return multiply(args, threads, isa.gemm, FloatRows{}, 1);
  Int8Rows x{};
  x.terms = args.activations == Activations::kInt8 ? 1 : 2;
  x.group_blocks = static_cast<int>(std::min<int64_t>(ceil_div(args.group_size, kBlock), kMaxGroupBlocks));
  multiply(args, threads, isa.int8_kernel(args.m * x.terms), x, x.terms);
}

namespace {

// The 32 codes of a row (lane) in one block of a panel.
void read_block(const uint8_t* block, int lane, int bits, int* codes) {
  uint32_t words[8] = {};
  for (int w = 0; w < bits; ++w) std::memcpy(&words[w], block + (w * kLanes + lane) * 4, 4);
  if (bits == 3) {
    words[3] = (words[0] >> 3 & 0x11111111) | (words[1] >> 2 & 0x22222222) | (words[2] >> 1 & 0x44444444);
  }
  const int each = bits == 8 ? 8 : 4, in_word = 32 / each, mask = (1 << bits) - 1;
  for (int i = 0; i < kBlock; ++i) codes[i] = static_cast<int>(words[i / in_word] >> i % in_word * each) & mask;
}

void read_row(const GemmArgs& a, int64_t id, float* y) {
  const int64_t panel = id / kLanes, blocks = ceil_div(a.k, kBlock);
  const int lane = static_cast<int>(id % kLanes);
  if (a.bits == 16) {
    const auto* weights = static_cast<const uint16_t*>(a.qweight) + panel * blocks * kBlock * kLanes + lane;
    for (int64_t i = 0; i < a.k; ++i) y[i] = float_of(weights[i * kLanes], a.scale_dtype);
    return;
  }
  const int64_t block_bytes = kLanes * kBlock * a.bits / 8;
  const int64_t groups = ceil_div(a.k, a.group_size);
  for (int64_t block = 0; block < blocks; ++block) {
    const int64_t at = (panel * groups + block * kBlock / a.group_size) * kLanes + lane;
    const float scale = float_of(static_cast<const uint16_t*>(a.scales)[at], a.scale_dtype);
    const float offset = a.offsets ? float_of(static_cast<const uint16_t*>(a.offsets)[at], a.scale_dtype) : 0.0f;
    const int zero = a.offsets ? 0 : a.zeros ? static_cast<const uint8_t*>(a.zeros)[at] : 1 << (a.bits - 1);
    int codes[kBlock];
    read_block(static_cast<const uint8_t*>(a.qweight) + (panel * blocks + block) * block_bytes, lane, a.bits, codes);
    const int64_t count = std::min<int64_t>(kBlock, a.k - block * kBlock);
    for (int64_t i = 0; i < count; ++i) y[block * kBlock + i] = scale * static_cast<float>(codes[i] - zero) + offset;
  }
}

}  // namespace

void embedding(const EmbeddingArgs& args, int threads) {
  const int64_t size = args.table.k;
  parallel_for(args.rows, useful_threads(args.rows * size * 8, threads),
               [&](int64_t row) { read_row(args.table, args.ids[row], args.y + row * size); });
}

}  // namespace llmpq

// Matrix products and look-ups: cut into tasks, put x in the order the kernels read it, share the panels out to
// threads.
#include <algorithm>
#include <memory>

#include "cpu/half.h"
#include "cpu/kernels.h"
#include "cpu/threads.h"

namespace llmpq {
namespace {

constexpr int64_t kWorkPerThread = 1 << 19;  // multiplications below which another thread costs more than it gives
constexpr int kTasksPerThread = 4;           // so that a thread that is held up does not hold up all

int useful_threads(int64_t work, int threads) {
  return static_cast<int>(std::min<int64_t>(threads, 1 + work / kWorkPerThread));
}

// Fixed order: eight partial sums, then these in pairs.
float sum_of_block(const float* x) {
  float partial[8] = {};
  for (int i = 0; i < kBlock; ++i) partial[i % 8] += x[i];
  for (int half = 4; half > 0; half /= 2) {
    for (int i = 0; i < half; ++i) partial[i] += partial[i + half];
  }
  return partial[0];
}

void pack_x(const GemmTask& task, float* packed, float* sums) {
  const GemmArgs& a = *task.args;
  const int64_t blocks = task.blocks();
  int64_t row = task.first_row;
  for (int tile = 0; tile < task.tiles; ++tile) {
    const int rows = task.tile_rows(tile);
    for (int r = 0; r < rows; ++r, ++row) {
      const float* x = static_cast<const float*>(a.x) + row * a.x_stride;
      for (int64_t block = 0; block < blocks; ++block) {
        const int64_t count = std::min<int64_t>(kBlock, a.k - block * kBlock);
        float* to = packed + (block * rows + r) * kBlock;
        std::copy_n(x + block * kBlock, count, to);
        std::fill(to + count, to + kBlock, 0.0f);
        if (a.zeros != nullptr) sums[block * rows + r] = sum_of_block(to);
      }
    }
    packed += rows * blocks * kBlock;
    sums += rows * blocks;
  }
}

}  // namespace

void gemm(const GemmArgs& args, int threads) {
  const Kernels& isa = kernels();
  const int64_t panels = ceil_div(args.n, kLanes);
  const int most_rows = isa.tile_rows * kTilesAtOnce;
  std::unique_ptr<float[]> packed, sums;
  for (int64_t row = 0; row < args.m; row += most_rows) {
    const int rows = static_cast<int>(std::min<int64_t>(most_rows, args.m - row));
    GemmTask task{&args, nullptr, nullptr, row, rows, static_cast<int>(ceil_div(rows, isa.tile_rows))};
    if (packed == nullptr) {
      packed.reset(new float[rows * task.blocks() * kBlock]);
      sums.reset(new float[rows * task.blocks()]);
    }
    pack_x(task, packed.get(), sums.get());
    task.x = packed.get();
    task.x_sums = sums.get();

    const int used = useful_threads(rows * args.n * args.k, threads);
    const int64_t step = used == 1 ? panels : ceil_div(panels, used * kTasksPerThread);
    parallel_for(ceil_div(panels, step), used,
                 [&](int64_t item) { isa.gemm(task, item * step, std::min(panels, (item + 1) * step)); });
  }
}

namespace {

int sign_extended(uint32_t word, int shift, int bits) {
  return static_cast<int32_t>(word << (32 - bits - shift)) >> (32 - bits);
}

// The 32 fields of a row (lane) in one block of a panel.
void read_block(const uint8_t* block, int lane, int bits, int* fields) {
  if (bits == 8) {
    for (int i = 0; i < kBlock; ++i) fields[i] = static_cast<int8_t>(block[i * kLanes + lane]);
    return;
  }
  uint32_t words[4] = {};
  for (int w = 0; w < bits; ++w) std::memcpy(&words[w], block + (w * kLanes + lane) * 4, 4);
  if (bits == 3) {
    words[3] = (words[0] >> 3 & 0x11111111) | (words[1] >> 2 & 0x22222222) | (words[2] >> 1 & 0x44444444);
  }
  for (int i = 0; i < kBlock; ++i) fields[i] = sign_extended(words[i / 8], i % 8 * 4, bits);
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
    const int center = 1 << (a.bits - 1);
    const int zero = a.zeros != nullptr ? static_cast<const uint8_t*>(a.zeros)[at] : center;
    int fields[kBlock];
    read_block(static_cast<const uint8_t*>(a.qweight) + (panel * blocks + block) * block_bytes, lane, a.bits, fields);
    const int64_t count = std::min<int64_t>(kBlock, a.k - block * kBlock);
    for (int64_t i = 0; i < count; ++i) y[block * kBlock + i] = scale * static_cast<float>(fields[i] + center - zero);
  }
}

}  // namespace

void embedding(const GemmArgs& args, int threads) {
  parallel_for(args.m, useful_threads(args.m * args.k * 8, threads), [&](int64_t row) {
    read_row(args, static_cast<const int64_t*>(args.x)[row], static_cast<float*>(args.y) + row * args.y_stride);
  });
}

}  // namespace llmpq

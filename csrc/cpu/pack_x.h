// Rows of x in the order the kernels read them, for an instruction set V.
#pragma once

#include <cmath>

#include "cpu/half.h"
#include "cpu/kernels.h"
#include "cpu/unroll.h"

namespace llmpq {

// Columns first to first + 32 of a row of x as floats; those beyond k are 0.
template <class V>
LLMPQ_INLINE void load_block(const GemmArgs& a, int64_t row, int64_t first, float* to) {
  const int count = a.k - first < kBlock ? static_cast<int>(a.k - first) : kBlock;
  const int64_t at = row * a.x_stride + first;
  if (a.x_dtype == Dtype::kFloat32) {
    const float* x = static_cast<const float*>(a.x) + at;
    if (count == kBlock) {
      V::store(to, V::load(x));
      V::store(to + kLanes, V::load(x + kLanes));
      return;
    }
    for (int i = 0; i < count; ++i) to[i] = x[i];
  } else {
    const uint16_t* x = static_cast<const uint16_t*>(a.x) + at;
    if (count == kBlock) {
      V::store(to, V::load_bfloat16(reinterpret_cast<const uint8_t*>(x)));
      V::store(to + kLanes, V::load_bfloat16(reinterpret_cast<const uint8_t*>(x + kLanes)));
      return;
    }
    for (int i = 0; i < count; ++i) to[i] = float_of_bfloat16(x[i]);
  }
  for (int i = count; i < kBlock; ++i) to[i] = 0.0f;
}

// Fixed order: eight partial sums, then these in pairs.
LLMPQ_INLINE float sum_of_block(const float* x) {
  float partial[8] = {};
  for (int i = 0; i < kBlock; ++i) partial[i % 8] += x[i];
  for (int half = 4; half > 0; half /= 2) {
    for (int i = 0; i < half; ++i) partial[i] += partial[i + half];
  }
  return partial[0];
}

template <class V>
void pack_float_row(const FloatTask& task, int tile, int r) {
  const GemmArgs& a = *task.args;
  const int64_t blocks = task.blocks(), first = task.tile_begin(tile) * blocks;
  const int rows = task.tile_rows(tile);
  const int64_t row = task.x_row(task.tile_begin(tile) + r);
  for (int64_t block = 0; block < blocks; ++block) {
    const int64_t at = first + block * rows + r;
    load_block<V>(a, row, block * kBlock, task.x.values + at * kBlock);
    if (a.zero() != Zero::kSymmetric) {
      task.x.sums[at] = sum_of_block(task.x.values + at * kBlock);
    }
  }
}

// Where the numbers of a tile lie, in the order of kernels.h. `row` is one of int8.
struct BlockOrder {
  int64_t blocks, groups, before, rows;  // before: rows of int8 in earlier tiles

  LLMPQ_INLINE BlockOrder(const Int8Task& task, int tile)
      : blocks(task.blocks()),
        groups(ceil_div(blocks, task.x.group_blocks)),
        before(task.tile_begin(tile) * task.x.terms),
        rows(task.tile_rows(tile) * task.x.terms) {}
  LLMPQ_INLINE int64_t value(int64_t block, int row) const { return (before * blocks + block * rows + row) * kBlock; }
  LLMPQ_INLINE int64_t number(int64_t group, int row) const { return before * groups + group * rows + row; }
};

// The definition is in llmpq/quant/activations.py; the values are the same to the bit.
template <class V, class Order = BlockOrder>
void quantize_row(const Int8Task& task, int tile, int r) {
  using F = typename V::F;
  const GemmArgs& a = *task.args;
  const int terms = task.x.terms;
  const int64_t blocks = task.blocks(), groups = ceil_div(blocks, task.x.group_blocks);
  const Order order(task, tile);
  const int64_t row = task.x_row(task.tile_begin(tile) + r);
  const float zero = a.zeros != nullptr ? 1.0f : static_cast<float>((1 << (a.bits - 1)) - V::operand_offset(a.bits));
  alignas(64) float values[kMaxGroupBlocks * kBlock];
  for (int64_t group = 0; group < groups; ++group) {
    const int64_t first = group * task.x.group_blocks;
    const int count = blocks - first < task.x.group_blocks ? static_cast<int>(blocks - first) : task.x.group_blocks;
    F largest = V::zero(), check = V::zero();  // check: NaN where a value is infinite or NaN
    for (int b = 0; b < count; ++b) load_block<V>(a, row, (first + b) * kBlock, values + b * kBlock);
    for (int i = 0; i < count * kBlock; i += kLanes) {
      const F x = V::load(values + i);
      check = V::add(check, V::sub(x, x));
      largest = V::max(largest, V::max(x, V::sub(V::zero(), x)));
    }
    const float amax = V::largest(largest), poison = V::sum(check);
    const bool finite = poison == 0.0f;
    float inverse = finite ? 127.0f / amax : 0.0f;
    if (!std::isfinite(inverse)) inverse = 0.0f;
    const float scale = !finite ? poison : inverse == 0.0f ? 0.0f : amax / 127.0f;

    F sums[2] = {V::zero(), V::zero()};
    for (int b = 0; b < count; ++b) {
      int8_t* to = task.x.values + order.value(first + b, r * terms);
      int8_t* to_low = task.x.values + order.value(first + b, r * terms + terms - 1);
      for (int half = 0; half < 2; ++half) {
        F x = finite ? V::mul(V::load(values + b * kBlock + half * kLanes), V::broadcast(inverse)) : V::zero();
        const F high = V::round(x);
        sums[0] = V::add(sums[0], high);
        V::store_int8(to + half * kLanes, high, a.bits < 8);
        if (terms == 1) continue;
        const F low = V::round(V::mul(V::sub(x, high), V::broadcast(254.0f)));
        sums[1] = V::add(sums[1], low);
        V::store_int8(to_low + half * kLanes, low, a.bits < 8);
      }
    }
    const int64_t at = order.number(group, r * terms);
    float total = 0.0f;
    for (int t = 0; t < terms; ++t) {
      const float sum = V::sum(sums[t]);
      task.x.scales[at + t] = t == 0 ? scale : scale / 254.0f;
      task.x.sums[at + t] = static_cast<int32_t>(-zero * sum);
      total += task.x.scales[at + t] * sum;
    }
    if (a.offsets != nullptr) task.x.totals[at / terms] = total;
  }
}

}  // namespace llmpq

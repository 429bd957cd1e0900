// y = x @ w.T over panels (kernels.h) for x as int8, for an instruction set V that multiplies bytes.
//
// As in the kernel for floating x, weights go through registers and are decoded anew for every tile: beside the
// products of its rows the few instructions do not show.
#pragma once

#include "cpu/tile.h"

namespace llmpq {

// Rows of x against P panels from `panel` on. M rows of x are R = M * T rows of int8.
template <class V, int Bits, int T, int M, int P>
struct Int8Tile {
  using I = typename V::I;
  using F = typename V::F;
  static constexpr int R = M * T;
  static constexpr int kBlockBytes = Bits * kLanes * 4;
  // Additions to one sum follow each other: with few rows, several sums hide the latency.
  static constexpr int C = R * P >= V::kInt8Chains ? 1 : R * P * 2 >= V::kInt8Chains ? 2 : 4;

  typename V::Sum sums[P][R][C];

  // The product of four columns of a block. x is in the order in which they appear.
  LLMPQ_INLINE void add_columns(const I (&w)[P], const int8_t* x, int index) {
    LLMPQ_UNROLL for (int r = 0; r < R; ++r) {
      const auto xs = V::broadcast4(x + r * kBlock + index * 4);
      LLMPQ_UNROLL for (int p = 0; p < P; ++p) V::template dot<Bits>(sums[p][r][index % C], w[p], xs);
    }
  }

  LLMPQ_INLINE void add_block(const uint8_t* codes, int64_t panel_bytes, const int8_t* x) {
    LLMPQ_UNROLL for (int word = 0; word < (Bits == 8 ? 8 : 4); ++word) {
      I words[P], codes4[P];
      LLMPQ_UNROLL for (int p = 0; p < P; ++p) words[p] = block_word<V, Bits>(codes + p * panel_bytes, word);
      if constexpr (Bits == 8) {
        LLMPQ_UNROLL for (int p = 0; p < P; ++p) codes4[p] = V::int8_operand(words[p]);
        add_columns(codes4, x, word);
      } else {
        LLMPQ_UNROLL for (int p = 0; p < P; ++p) codes4[p] = V::template even_codes<Bits>(words[p]);
        add_columns(codes4, x, 2 * word);
        LLMPQ_UNROLL for (int p = 0; p < P; ++p) codes4[p] = V::template odd_codes<Bits>(words[p]);
        add_columns(codes4, x, 2 * word + 1);
      }
    }
    LLMPQ_UNROLL for (int p = 0; p < P; ++p) {
      LLMPQ_UNROLL for (int r = 0; r < R; ++r) {
        LLMPQ_UNROLL for (int c = 0; c < C; ++c) V::template end_block<Bits>(sums[p][r][c]);
      }
    }
  }

  LLMPQ_INLINE F value(int p, int r) const {
    I sum = V::value(sums[p][r][0]);
    LLMPQ_UNROLL for (int c = 1; c < C; ++c) sum = V::add(sum, V::value(sums[p][r][c]));
    return V::to_float(sum);
  }
};

template <class V, int Bits, Zero Z, int T, int M, int P>
void __attribute__((noinline)) int8_tile(const Int8Task& task, int first_row, int64_t panel, TileAhead ahead) {
  using I = typename V::I;
  using F = typename V::F;
  using Tile = Int8Tile<V, Bits, T, M, P>;
  const GemmArgs& a = *task.args;
  const int64_t blocks = task.blocks(), groups = ceil_div(a.k, a.group_size);
  const int64_t panel_bytes = blocks * Tile::kBlockBytes;
  const auto* codes = static_cast<const uint8_t*>(a.qweight) + panel * panel_bytes;
  const int8_t* x = task.x.values + first_row * T * blocks * kBlock;
  const int64_t x_groups = ceil_div(blocks, task.x.group_blocks);
  const float* x_scales = task.x.scales + first_row * T * x_groups;
  const int32_t* x_sums = task.x.sums + first_row * T * x_groups;
  const float* x_totals = task.x.totals + first_row * x_groups;
  const int64_t weight_group_blocks = a.group_size / kBlock;  // 0: k is less than a block
  const auto* zeros = static_cast<const uint8_t*>(a.zeros);
  const I offset = V::broadcast_int(-V::operand_offset(Bits));

  for (int p = 0; p < P; ++p) prefetch_tile<M>(task, first_row, panel + p);
  alignas(64) float y[P][M][kLanes] = {};
  int64_t group = 0, group_end = weight_group_blocks;
  for (int64_t block = 0; block < blocks; block += task.x.group_blocks) {
    if (block >= group_end && group + 1 < groups) ++group, group_end += weight_group_blocks;
    Tile tile;
    LLMPQ_UNROLL for (int p = 0; p < P; ++p) {
      const int64_t at = ((panel + p) * groups + group) * kLanes;
      if (Z != Zero::kInteger) {
        LLMPQ_UNROLL for (int r = 0; r < Tile::R; ++r) V::start(tile.sums[p][r][0], V::broadcast_int(x_sums[r]));
      } else {
        const I zero = V::add(V::load_uint8_int(zeros + at), offset);
        LLMPQ_UNROLL for (int r = 0; r < Tile::R; ++r) {
          V::start(tile.sums[p][r][0], V::multiply16(zero, V::broadcast_int(x_sums[r] & 0xffff)));
        }
      }
      LLMPQ_UNROLL for (int i = 0; i < Tile::R * (Tile::C - 1); ++i) {
        V::start(tile.sums[p][i / (Tile::C - 1)][1 + i % (Tile::C - 1)], V::broadcast_int(0));
      }
    }
    const int count = blocks - block < task.x.group_blocks ? static_cast<int>(blocks - block) : task.x.group_blocks;
    for (int b = 0; b < count; ++b) {
      if (ahead.bytes != 0) {
        const int64_t next = ahead.at((block + b) * Tile::kBlockBytes, panel_bytes, P);
        for (int p = 0; p < P; ++p) prefetch_block<Tile::kBlockBytes>(codes + p * panel_bytes + next);
      }
      tile.add_block(codes, panel_bytes, x);
      codes += Tile::kBlockBytes;
      x += Tile::R * kBlock;
    }
    LLMPQ_UNROLL for (int p = 0; p < P; ++p) {
      const int64_t at = ((panel + p) * groups + group) * kLanes;
      const F scale = load_scales<V>(a, a.scales, at);
      F shift = V::zero();
      if (Z == Zero::kOffset) shift = V::fma(scale, V::broadcast(1 << (Bits - 1)), load_scales<V>(a, a.offsets, at));
      LLMPQ_UNROLL for (int r = 0; r < M; ++r) {
        F value = V::mul(tile.value(p, r * T), V::broadcast(x_scales[r * T]));
        if (T == 2) value = V::fma(tile.value(p, r * T + 1), V::broadcast(x_scales[r * T + 1]), value);
        F total = V::load(y[p][r]);
        if (Z == Zero::kOffset) total = V::fma(shift, V::broadcast(x_totals[r]), total);
        V::store(y[p][r], V::fma(scale, value, total));
      }
    }
    x_scales += Tile::R;
    x_sums += Tile::R;
    if (Z == Zero::kOffset) x_totals += M;
  }
  for (int p = 0; p < P; ++p) write_tile<V, M>(task, y[p], first_row, panel + p);
}

template <class V, int Bits, Zero Z, int T>
void int8_with(const Int8Task& task, int64_t panel_begin, int64_t panel_end) {
  constexpr int kRows = V::kInt8Rows / T, kPairFrom = V::kInt8PairFrom / T;
  const int64_t panel_bytes = task.blocks() * Bits * kLanes * 4;
  for_tiles<kRows, kPairFrom, V::kPanels>(
      task, panel_bytes, panel_begin, panel_end,
      [&](auto rows, auto panels, int first_row, int64_t panel, TileAhead ahead) LLMPQ_LAMBDA {
        int8_tile<V, Bits, Z, T, decltype(rows)::value, decltype(panels)::value>(task, first_row, panel, ahead);
      });
}

template <class V>
void int8_panels(const Int8Task& task, int64_t panel_begin, int64_t panel_end) {
  const auto packed = [&](auto bits) LLMPQ_LAMBDA {
    with_zero(*task.args, [&](auto zero) LLMPQ_LAMBDA {
      constexpr int kBits = decltype(bits)::value;
      constexpr Zero kZero = decltype(zero)::value;
      if (task.x.terms == 1) return int8_with<V, kBits, kZero, 1>(task, panel_begin, panel_end);
      int8_with<V, kBits, kZero, 2>(task, panel_begin, panel_end);
    });
  };
  if (task.args->bits == 3) return packed(Index<3>{});
  if (task.args->bits == 4) return packed(Index<4>{});
  packed(Index<8>{});
}

}  // namespace llmpq

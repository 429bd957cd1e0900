// What the products of floating and of int8 rows have in common: reading panels, going over them in tiles, writing
// results.
#pragma once

#include <type_traits>

#include "cpu/half.h"
#include "cpu/kernels.h"
#include "cpu/unroll.h"

namespace llmpq {

// The words of a block, eight of bytes or four of nibbles, where a lane has a row's next 4 or 8 columns.
template <class V, int Bits>
LLMPQ_INLINE typename V::I block_word(const uint8_t* block, int index) {
  if (Bits != 3 || index < 3) return V::load_words(block + index * kLanes * 4);
  return V::top_bits(V::load_words(block), V::load_words(block + kLanes * 4), V::load_words(block + 2 * kLanes * 4));
}

// The 16 scales or offsets from `at` on.
template <class V>
LLMPQ_INLINE typename V::F load_scales(const GemmArgs& a, const void* scales, int64_t at) {
  const auto* halves = static_cast<const uint8_t*>(scales) + at * 2;
  return a.scale_dtype == Dtype::kFloat16 ? V::load_float16(halves) : V::load_bfloat16(halves);
}

// kernel(std::integral_constant<Zero, Z>) for the kind of zero that the weight has: kernels are compiled for each, so
// that no loop asks.
template <class Kernel>
LLMPQ_INLINE void with_zero(const GemmArgs& a, Kernel&& kernel) {
  switch (a.zero()) {
    case Zero::kSymmetric:
      return kernel(std::integral_constant<Zero, Zero::kSymmetric>{});
    case Zero::kInteger:
      return kernel(std::integral_constant<Zero, Zero::kInteger>{});
    case Zero::kOffset:
      return kernel(std::integral_constant<Zero, Zero::kOffset>{});
  }
}

// Hardware prefetchers stop at the end of a 4 KiB page and do not see through several streams side by side.
template <int Bytes>
LLMPQ_INLINE void prefetch_block(const uint8_t* codes) {
  for (int i = 0; i < Bytes; i += 64) __builtin_prefetch(codes + i);
}

// How far ahead of the codes it works on a tile fetches: a tile by itself, whose time is that of reading, so much that
// memory has time to answer; of several, the last one what comes after this panel or pair, which the first will want.
constexpr int64_t kAhead = 8192;  // any distance from 8 to 16 KiB does

struct TileAhead {
  int64_t bytes;       // 0: nothing is fetched
  int64_t last_bytes;  // from this place on, `bytes` ahead is beyond the panel's end: the pair's other panel is passed over

  LLMPQ_INLINE int64_t at(int64_t place, int64_t panel_bytes, int panels) const {
    return place < last_bytes ? bytes : bytes + (panels - 1) * panel_bytes;
  }
};

// tile(Index<rows>, Index<panels>, first_row, panel, ahead) for every tile of the task and every panel. All tiles
// for one panel, or a pair of them, then the next: from the second tile on its codes are in a near cache. Tiles of at
// least PairFrom rows take MaxPanels panels at once, which halves the loads of x.
template <int MaxRows, int PairFrom, int MaxPanels, class Task, class Body>
LLMPQ_INLINE void for_tiles(const Task& task, int64_t panel_bytes, int64_t panel_begin, int64_t panel_end,
                            Body&& tile) {
  for (int64_t panel = panel_begin; panel < panel_end;) {
    const bool pair = MaxPanels > 1 && task.tile_rows(task.tiles - 1) >= PairFrom && panel + MaxPanels <= panel_end;
    const int panels = pair ? MaxPanels : 1;
    for (int t = 0, row = 0; t < task.tiles; row += task.tile_rows(t), ++t) {
      const int rows = task.tile_rows(t);
      TileAhead ahead{t == task.tiles - 1 ? panels * panel_bytes : 0, panel_bytes};
      if (task.tiles == 1) {
        ahead.bytes = pair && panel_bytes < kAhead ? panel_bytes : kAhead;
        ahead.last_bytes = panel_bytes - ahead.bytes;
      }
      unroll<MaxRows>([&](auto r) LLMPQ_LAMBDA {
        constexpr int kRows = decltype(r)::value + 1;
        if (rows != kRows) return;
        if constexpr (MaxPanels > 1 && kRows >= PairFrom) {
          if (pair) return tile(Index<kRows>{}, Index<MaxPanels>{}, row, panel, ahead);
        }
        tile(Index<kRows>{}, Index<1>{}, row, panel, ahead);
      });
    }
    panel += panels;
  }
}

// Fetch for writing what write_tile will write: its rows lie far apart, and stores that miss the caches wait in line.
template <int M, class Task>
LLMPQ_INLINE void prefetch_tile(const Task& task, int first_row, int64_t panel) {
  const GemmArgs& a = *task.args;
  const int64_t size = a.x_dtype == Dtype::kFloat32 ? 4 : 2;
  for (int r = 0; r < M; ++r) {
    const int64_t at = task.y_row(first_row + r) * a.y_stride + panel * kLanes;
    __builtin_prefetch(static_cast<const uint8_t*>(a.y) + at * size, 1);
  }
}

// The 16 columns of a panel in y, for rows `first_row` to first_row + M of the task, with bias and residual added.
template <class V, int M, class Task>
LLMPQ_INLINE void write_tile(const Task& task, const float (&sums)[M][kLanes], int first_row, int64_t panel) {
  const GemmArgs& a = *task.args;
  const int64_t column = panel * kLanes;
  const int count = a.n - column < kLanes ? static_cast<int>(a.n - column) : kLanes;
  for (int r = 0; r < M; ++r) {
    auto value = V::load(sums[r]);
    if (a.bias != nullptr) value = V::add(value, V::load_first(static_cast<const float*>(a.bias) + column, count));
    const int64_t at = task.y_row(first_row + r) * a.y_stride + column;
    if (a.x_dtype == Dtype::kFloat32) {
      if (a.residual != nullptr) {
        value = V::add(value, V::load_first(static_cast<const float*>(a.residual) + at, count));
      }
      V::store_first(static_cast<float*>(a.y) + at, value, count);
    } else {
      alignas(64) float rounded[kLanes];
      V::store(rounded, value);
      for (int i = 0; i < count; ++i) static_cast<uint16_t*>(a.y)[at + i] = bfloat16_of_float(rounded[i]);
    }
  }
}

}  // namespace llmpq

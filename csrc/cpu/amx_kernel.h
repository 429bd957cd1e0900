// y = x @ w.T over panels (kernels.h) for many rows of x as int8, on registers that are tiles (amx_tiles.h), with an
// instruction set V for all else.
//
// A word of a panel, taken apart into bytes, is a row of a tile as the product wants it: 4 columns of each of 16 rows
// of w. A block is 8 such rows, and two make a tile. In bytes, codes have the zero taken off, or with 8 bits 128. The
// rows of x lie as [tiles][pairs of blocks][16 rows][64 columns], the columns in the order of kernels.h, and their
// scales as [tiles][groups][16 rows]: as many as a tile holds, whether there are so many or not.
//
// The work goes in units of four tiles of x and four panels. Panels are decoded first: all that L1 holds where the rows
// of x are met once, else all that L2 holds. Then, for each group of columns, two by two tiles are multiplied; their
// sums go through memory, and are scaled and added to y while the next four are multiplied. y stays in the order of the
// tiles until the end.
#pragma once

#include "cpu/amx_tiles.h"
#include "cpu/pack_x.h"
#include "cpu/scratch.h"
#include "cpu/tile.h"

namespace llmpq {

constexpr int kTile = 16;           // rows of a tile
constexpr int kTileBytes = 1024;    // of a whole one
constexpr int kBlockTile = 512;     // bytes of a block of a panel when decoded
constexpr int kUnit = 4;            // tiles of x, and panels, that are worked on together
constexpr int kHalf = kTile / 2;    // rows of sums that are scaled between two products
constexpr int kPieceBlocks = 128;   // of panels, that are decoded at once for L2: 256 KiB
constexpr int64_t kPanelStep = kUnit * kTileBytes;  // from a pair of decoded blocks to the next

// What must be done about a group beyond scale * x's scale * sum.
enum class Extra { kNone, kZero, kOffset };  // kZero: add (128 - zero) * sum(x) to the sum, for codes of 8 bits

struct TileOrder {  // as BlockOrder
  int64_t tile, pairs, groups;

  LLMPQ_INLINE TileOrder(const Int8Task& task, int tile)
      : tile(tile), pairs(ceil_div(task.blocks(), 2)), groups(ceil_div(task.blocks(), task.x.group_blocks)) {}
  LLMPQ_INLINE int64_t value(int64_t block, int row) const {
    return (tile * pairs + block / 2) * kTileBytes + row * 64 + block % 2 * kBlock;
  }
  LLMPQ_INLINE int64_t number(int64_t group, int row) const { return (tile * groups + group) * kTile + row; }
};

template <class V>
void quantize_tile_row(const Int8Task& task, int tile, int r) {
  quantize_row<V, TileOrder>(task, tile, r);
  if (r + 1 < task.tile_rows(tile)) return;
  const TileOrder order(task, tile);  // rows that are not there give zeros, rather than what memory happens to hold
  const int terms = task.x.terms;
  for (int64_t group = 0; group < order.groups; ++group) {
    for (int row = (r + 1) * terms; row < kTile; ++row) {
      const int64_t at = order.number(group, row);
      task.x.scales[at] = 0.0f;
      task.x.sums[at] = 0;
      if (task.args->offsets != nullptr) task.x.totals[at / terms] = 0.0f;
    }
  }
}

// The group of the weight in which a block lies.
LLMPQ_INLINE int64_t group_of(const GemmArgs& a, int64_t block) {
  const int64_t blocks = a.group_size / kBlock, last = ceil_div(a.k, a.group_size) - 1;
  if (blocks == 0 || block >= last * blocks) return last;  // the last may be a part of a block
  return static_cast<uint32_t>(block) / static_cast<uint32_t>(blocks);
}

using DecodePanel = void (*)(const GemmArgs& a, int64_t panel, int64_t first, int count, int64_t ahead, uint8_t* to);

// Blocks first to first + count of a panel, pairs of them kPanelStep apart; an odd one is followed by zeros.
template <class V, int Bits, bool Zeros>
void __attribute__((noinline)) decode_panel(const GemmArgs& a, int64_t panel, int64_t first, int count, int64_t ahead,
                                            uint8_t* to) {
  using I = typename V::I;
  constexpr int kBytes = Bits * kLanes * 4;
  const int64_t groups = ceil_div(a.k, a.group_size);
  const auto* codes = static_cast<const uint8_t*>(a.qweight) + (panel * ceil_div(a.k, kBlock) + first) * kBytes;
  const auto* zeros = static_cast<const uint8_t*>(a.zeros) + panel * groups * kLanes;
  I zero = V::broadcast_int(Bits == 8 ? 0 : (1 << (Bits % 8 - 1)) * 0x01010101);
  int64_t group = group_of(a, first) - 1, group_begin = 0;  // of the group after that
  for (int block = 0; block < count; ++block, codes += kBytes) {
    if (ahead != 0) prefetch_block<kBytes>(codes + ahead);
    if (Zeros && block >= group_begin && group + 1 < groups) {
      ++group;
      group_begin = (group + 1) * (a.group_size / kBlock) - first;
      zero = V::repeat_byte(V::load_uint8_int(zeros + group * kLanes));
    }
    uint8_t* rows = to + block / 2 * kPanelStep + block % 2 * kBlockTile;
    LLMPQ_UNROLL for (int word = 0; word < (Bits == 8 ? 8 : 4); ++word) {
      const I words = block_word<V, Bits>(codes, word);
      if constexpr (Bits == 8) {
        V::store_words(rows + word * 64, V::template flip<8>(words));
      } else {
        V::store_words(rows + word * 128, V::subtract_bytes(V::template even_codes<Bits>(words), zero));
        V::store_words(rows + word * 128 + 64, V::subtract_bytes(V::template odd_codes<Bits>(words), zero));
      }
    }
  }
  if (count % 2 == 0) return;
  uint8_t* rows = to + count / 2 * kPanelStep + kBlockTile;
  for (int row = 0; row < 8; ++row) V::store_words(rows + row * 64, V::broadcast_int(0));
}

// Sums of two by two tiles at most, on their way into y.
struct Sums {
  struct Panel {
    alignas(64) float scale[kLanes], shift[kLanes];
    alignas(64) int32_t zero[kLanes];  // less 128
  };
  struct Half {  // of a tile
    const int32_t (*sums)[kLanes];
    float (*y)[1][kLanes];
    int64_t number;  // of its first row, in the scales of x
    const Panel* panel;
  };

  alignas(64) int32_t tiles[2][2][kTile][kLanes];  // [tile of x][panel]
  Panel panels[2];
  Half halves[8];
  int count = 0;
};

// Memory that will be read, fetched a little at a time.
struct Ahead {
  const uint8_t *next = nullptr, *end = nullptr;
  int64_t lines = 0;  // a time

  LLMPQ_INLINE void start(const uint8_t* from, int64_t bytes, int64_t times) {
    next = from;
    end = from + bytes;
    lines = ceil_div(bytes, 64 * times);
  }
  LLMPQ_INLINE void fetch() {
    for (int64_t i = 0; i < lines && next < end; ++i, next += 64) __builtin_prefetch(next, 0, 2);
  }
};

template <class V, class Tiles, int T, Extra E>
struct TilePanels {
  using I = typename V::I;
  using F = typename V::F;
  using Rows = float[kTile / T][1][kLanes];  // of y, for a tile of x and a panel
  using UnitRows = Rows[kUnit][kUnit];

  const Int8Task& task;
  const GemmArgs& a = *task.args;
  const int64_t blocks = task.blocks(), groups = ceil_div(a.k, a.group_size);
  const int64_t x_groups = ceil_div(blocks, task.x.group_blocks), pairs = ceil_div(blocks, 2);
  const int step = task.x.group_blocks == 1 ? 1 : 2;  // blocks that are multiplied at once
  Sums sums[2];
  int turn = 0;  // which of them is next
  Ahead ahead;

  LLMPQ_INLINE explicit TilePanels(const Int8Task& task) : task(task) {}

  static LLMPQ_INLINE TileConfig config(int step) {  // tiles 0 to 3: sums; 4 and 5: x; 6 and 7: w
    TileConfig config = {};
    config.palette = 1;
    for (int tile = 0; tile < 8; ++tile) {
      const bool x = tile == 4 || tile == 5, w = tile >= 6;
      config.column_bytes[tile] = static_cast<uint16_t>(x ? step * kBlock : 64);
      config.rows[tile] = static_cast<uint8_t>(w ? step * 8 : kTile);
    }
    return config;
  }

  LLMPQ_INLINE void scale_half(Sums::Half half) {
    const float* x_scales = task.x.scales + half.number;
    const int32_t* x_sums = task.x.sums + half.number;
    const float* x_totals = task.x.totals + half.number / T;
    const F w = V::load(half.panel->scale);
    const F shift = E == Extra::kOffset ? V::load(half.panel->shift) : V::zero();
    const I zero = E == Extra::kZero ? V::load_ints(half.panel->zero) : V::broadcast_int(0);
    LLMPQ_UNROLL for (int i = 0; i < kHalf / T; ++i) {
      F value = V::zero();
      LLMPQ_UNROLL for (int t = 0; t < T; ++t) {
        const int row = i * T + t;
        I sum = V::load_ints(half.sums[row]);
        if (E == Extra::kZero) sum = V::add(sum, V::multiply16(zero, V::broadcast_int(x_sums[row] & 0xffff)));
        const F x_scale = V::broadcast(x_scales[row]);
        value = t == 0 ? V::mul(V::to_float(sum), x_scale) : V::fma(V::to_float(sum), x_scale, value);
      }
      F total = V::load(half.y[i][0]);
      if (E == Extra::kOffset) total = V::fma(shift, V::broadcast(x_totals[i]), total);
      V::store(half.y[i][0], V::fma(w, value, total));
    }
  }

  // The sums of a group of columns for M tiles of x from `tile` on and P panels from `panel` on, decoded at w; y is
  // theirs, [tile][panel]. Meanwhile those of the call before are scaled.
  template <int M, int P>
  void __attribute__((noinline)) multiply_group(int tile, int64_t panel, int64_t x_group, const uint8_t* w, Rows* y) {
    const int64_t first = x_group * task.x.group_blocks, rest = blocks - first;
    const int steps = (rest < task.x.group_blocks ? rest : task.x.group_blocks) > step ? 2 : 1;
    Sums &before = sums[1 - turn], &now = sums[turn];
    const Sums::Half *half = before.halves, *const end = half + before.count;
    const int products = M * P * steps, share = (before.count + products - 1) >> (M * P / 2 + steps - 1);

    unroll<M * P>([&](auto i) LLMPQ_LAMBDA {
      constexpr int kM = decltype(i)::value / P, kP = decltype(i)::value % P;
      Tiles::template zero<2 * kM + kP>();
    });
    const int8_t* x = task.x.values + (tile * pairs + first / 2) * kTileBytes + first % 2 * kBlock;
    for (int left = steps; left > 0; --left, x += kTileBytes, w += kPanelStep) {
      unroll<P>([&](auto p) LLMPQ_LAMBDA {
        constexpr int kP = decltype(p)::value;
        Tiles::template load<6 + kP>(w + kP * kTileBytes, 64);
      });
      unroll<M * P>([&](auto i) LLMPQ_LAMBDA {
        constexpr int kM = decltype(i)::value / P, kP = decltype(i)::value % P;
        if constexpr (kP == 0) Tiles::template load<4 + kM>(x + kM * pairs * kTileBytes, 64);
        Tiles::template dot<2 * kM + kP, 4 + kM, 6 + kP>();
        for (int j = 0; j < share && half < end; ++j) scale_half(*half++);
      });
    }
    unroll<M * P>([&](auto i) LLMPQ_LAMBDA {
      constexpr int kM = decltype(i)::value / P, kP = decltype(i)::value % P;
      Tiles::template store<2 * kM + kP>(now.tiles[kM][kP], 64);
    });

    const int64_t group = group_of(a, first);
    LLMPQ_UNROLL for (int p = 0; p < P; ++p) {
      const int64_t at = ((panel + p) * groups + group) * kLanes;
      const F scale = load_scales<V>(a, a.scales, at);
      V::store(now.panels[p].scale, scale);
      if (E == Extra::kOffset) {
        const F center = V::broadcast(static_cast<float>(1 << (a.bits - 1)));
        V::store(now.panels[p].shift, V::fma(scale, center, load_scales<V>(a, a.offsets, at)));
      }
      if (E == Extra::kZero) {
        const I zero = V::load_uint8_int(static_cast<const uint8_t*>(a.zeros) + at);
        V::store_words(reinterpret_cast<uint8_t*>(now.panels[p].zero), V::add(zero, V::broadcast_int(-128)));
      }
    }
    Sums::Half* to = now.halves;
    LLMPQ_UNROLL for (int m = 0; m < M; ++m) {
      const int64_t number = ((tile + m) * x_groups + x_group) * kTile;
      const int halves = task.tile_rows(tile + m) * T > kHalf ? 2 : 1;
      LLMPQ_UNROLL for (int p = 0; p < P; ++p) {
        for (int h = 0; h < halves; ++h) {
          *to++ = {now.tiles[m][p] + h * kHalf, y[m * kUnit + p] + h * (kHalf / T), number + h * kHalf, &now.panels[p]};
        }
      }
    }
    now.count = static_cast<int>(to - now.halves);
    turn = 1 - turn;
    ahead.fetch();
  }

  // Scale what is still to be scaled.
  LLMPQ_INLINE void finish() {
    Sums& before = sums[1 - turn];
    for (int i = 0; i < before.count; ++i) scale_half(before.halves[i]);
    before.count = 0;
  }

  // Add the product of blocks first to first + count, which are decoded, for some tiles of x and panels: at most kUnit.
  void multiply_unit(int tile, int tiles, int64_t panel, int panels, int64_t first, int64_t count, const uint8_t* w,
                     UnitRows& y) {
    for (int64_t block = first; block < first + count; block += task.x.group_blocks) {
      const uint8_t* codes = w + (block - first) / 2 * kPanelStep + (block - first) % 2 * kBlockTile;
      const int64_t group = block / task.x.group_blocks;
      for (int m = 0; m < tiles; m += 2) {
        for (int p = 0; p < panels; p += 2) {
          const auto multiply = [&](auto rows, auto columns) LLMPQ_LAMBDA {
            multiply_group<decltype(rows)::value, decltype(columns)::value>(tile + m, panel + p, group,
                                                                            codes + p * kTileBytes, &y[m][p]);
          };
          if (m + 1 < tiles) {
            p + 1 < panels ? multiply(Index<2>{}, Index<2>{}) : multiply(Index<2>{}, Index<1>{});
          } else {
            p + 1 < panels ? multiply(Index<1>{}, Index<2>{}) : multiply(Index<1>{}, Index<1>{});
          }
        }
      }
    }
  }

  static LLMPQ_INLINE void clear(UnitRows& y, int tiles) {
    auto* values = reinterpret_cast<float*>(&y);
    for (int i = 0; i < tiles * kUnit * kTile / T; ++i) V::store(values + i * kLanes, V::zero());
  }

  template <class Row>
  LLMPQ_INLINE void for_rows(int tile, int tiles, Row&& row) {
    for (int t = 0; t < tiles; ++t) {
      const int first = task.tile_begin(tile + t);
      for (int r = 0; r < task.tile_rows(tile + t); ++r) row(t, r, first + r);
    }
  }

  void run(int64_t panel_begin, int64_t panel_end, DecodePanel decode) {
    const bool once = task.tiles <= kUnit;
    const int64_t piece = once ? kMaxGroupBlocks : kPieceBlocks;
    const int64_t decoded = piece < blocks ? piece : blocks;
    const int64_t w_bytes = ceil_div(decoded, 2) * kPanelStep;
    const int64_t units = once || blocks <= piece ? 1 : ceil_div(task.tiles, kUnit);  // that y is kept of
    uint8_t* w = scratch(Scratch::kPanels, w_bytes + units * sizeof(UnitRows));
    auto* y = reinterpret_cast<UnitRows*>(w + w_bytes);
    const int64_t panel_bytes = blocks * a.bits * kLanes * 4;
    for (int64_t panel = panel_begin; panel < panel_end; panel += kUnit) {
      const int panels = panel_end - panel < kUnit ? static_cast<int>(panel_end - panel) : kUnit;
      if (!once) {
        const int64_t after = panel_end - panel - panels, many = after < kUnit ? after : kUnit;
        const auto* codes = static_cast<const uint8_t*>(a.qweight) + (panel + panels) * panel_bytes;
        ahead.start(codes, many * panel_bytes, x_groups * ceil_div(task.tiles, 2) * ceil_div(panels, 2));
      }
      for (int64_t first = 0; first < blocks; first += piece) {
        const int count = static_cast<int>(blocks - first < piece ? blocks - first : piece);
        for (int p = 0; p < panels; ++p) decode(a, panel + p, first, count, once ? kAhead : 0, w + p * kTileBytes);
        for (int tile = 0; tile < task.tiles; tile += kUnit) {
          const int tiles = task.tiles - tile < kUnit ? task.tiles - tile : kUnit;
          UnitRows& rows = y[units == 1 ? 0 : tile / kUnit];
          if (first == 0) clear(rows, tiles);
          if (first + count < blocks) {
            multiply_unit(tile, tiles, panel, panels, first, count, w, rows);
            continue;
          }
          for_rows(tile, tiles, [&](int, int, int row) LLMPQ_LAMBDA {
            for (int p = 0; p < panels; ++p) prefetch_tile<1>(task, row, panel + p);
          });
          multiply_unit(tile, tiles, panel, panels, first, count, w, rows);
          finish();
          for_rows(tile, tiles, [&](int t, int r, int row) LLMPQ_LAMBDA {
            for (int p = 0; p < panels; ++p) write_tile<V, 1>(task, rows[t][p][r], row, panel + p);
          });
        }
      }
    }
  }
};

// Tiles as wanted for as long as this lives; then as the thread had them configured, whoever that was for. (What tiles
// hold is nobody's to keep over a call.)
template <class Tiles>
class Configured {
 public:
  LLMPQ_INLINE explicit Configured(const TileConfig& config) {
    Tiles::read_config(before_);
    Tiles::configure(config);
  }
  LLMPQ_INLINE ~Configured() { before_.palette == 0 ? Tiles::release() : Tiles::configure(before_); }
  Configured(const Configured&) = delete;
  Configured& operator=(const Configured&) = delete;

 private:
  alignas(64) TileConfig before_;
};

template <class V, class Tiles, int T, Extra E>
void __attribute__((noinline)) tile_panels_with(const Int8Task& task, int64_t panel_begin, int64_t panel_end,
                                                DecodePanel decode) {
  TilePanels<V, Tiles, T, E> panels(task);
  alignas(64) const TileConfig config = panels.config(panels.step);
  const Configured<Tiles> configured(config);
  panels.run(panel_begin, panel_end, decode);
}

template <class V, class Tiles>
void tile_panels(const Int8Task& task, int64_t panel_begin, int64_t panel_end) {
  const GemmArgs& a = *task.args;
  const Zero zero = a.zero();
  const bool zeros = zero == Zero::kInteger;
  const auto multiply = [&](DecodePanel decode, auto extra) LLMPQ_LAMBDA {
    constexpr Extra kExtra = decltype(extra)::value;
    if (task.x.terms == 1) return tile_panels_with<V, Tiles, 1, kExtra>(task, panel_begin, panel_end, decode);
    tile_panels_with<V, Tiles, 2, kExtra>(task, panel_begin, panel_end, decode);
  };
  const DecodePanel decode = a.bits == 3   ? (zeros ? decode_panel<V, 3, true> : decode_panel<V, 3, false>)
                             : a.bits == 4 ? (zeros ? decode_panel<V, 4, true> : decode_panel<V, 4, false>)
                                           : decode_panel<V, 8, false>;
  if (zero == Zero::kOffset) return multiply(decode, std::integral_constant<Extra, Extra::kOffset>{});
  if (zeros && a.bits == 8) return multiply(decode, std::integral_constant<Extra, Extra::kZero>{});
  multiply(decode, std::integral_constant<Extra, Extra::kNone>{});
}

}  // namespace llmpq

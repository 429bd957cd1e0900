// y = x @ w.T over panels (kernels.h), for an instruction set V that offers vectors of 16 floats.
//
// A weight goes from the panel through a register into the sums of up to V::kTileRows rows of x and is gone: decoding
// it again for the next tile takes two instructions beside a dozen multiplications, less than keeping it would.
#pragma once

#include <utility>

#include "cpu/kernels.h"

#define LLMPQ_INLINE inline __attribute__((always_inline))
#define LLMPQ_LAMBDA __attribute__((always_inline))

namespace llmpq {

template <int N>
struct Index {
  static constexpr int value = N;
  LLMPQ_INLINE constexpr operator int() const { return N; }
};

template <class F, int... I>
LLMPQ_INLINE void unroll(F&& body, std::integer_sequence<int, I...>) {
  (body(Index<I>{}), ...);
}

// body(0), ..., body(N - 1) without a loop, so that arrays indexed by it live in registers.
template <int N, class F>
LLMPQ_INLINE void unroll(F&& body) {
  unroll(body, std::make_integer_sequence<int, N>{});
}

// How the columns of a block are read. A block is four planes of eight columns each.
template <class V, int Bits>
struct Codes {  // 3 and 4 bits: a plane is a vector of words with a code in each nibble
  static constexpr int kBlockBytes = Bits * kLanes * 4;
  using Plane = typename V::I;

  static LLMPQ_INLINE Plane plane(const uint8_t* block, int index) {
    if (Bits == 4 || index < 3) return V::load_words(block + index * kLanes * 4);
    return V::top_bits(V::load_words(block), V::load_words(block + kLanes * 4), V::load_words(block + 2 * kLanes * 4));
  }
  template <int J>
  static LLMPQ_INLINE typename V::F column(Plane plane) {
    return V::template field<Bits, J>(plane);
  }
};

template <class V>
struct Bytes {
  static constexpr int kBlockBytes = kBlock * kLanes;
  using Plane = const uint8_t*;
  static LLMPQ_INLINE Plane plane(const uint8_t* block, int index) { return block + index * 8 * kLanes; }
  template <int J>
  static LLMPQ_INLINE typename V::F column(Plane plane) {
    return V::load_int8(plane + J * kLanes);
  }
};

template <class V, Dtype D>
struct Halves {
  static constexpr int kBlockBytes = kBlock * kLanes * 2;
  using Plane = const uint8_t*;
  static LLMPQ_INLINE Plane plane(const uint8_t* block, int index) { return block + index * 8 * kLanes * 2; }
  template <int J>
  static LLMPQ_INLINE typename V::F column(Plane plane) {
    const uint8_t* halves = plane + J * kLanes * 2;
    return D == Dtype::kFloat16 ? V::load_float16(halves) : V::load_bfloat16(halves);
  }
};

// Several streams side by side, one for each block of a chunk, are more than hardware prefetchers see through: without
// this, 4 bits at m = 1 take two and a half times as long where the weights come from memory (Zen 5, 4096 x 4096). Any
// distance from 8 to 16 KiB does.
template <class Codec>
LLMPQ_INLINE void prefetch_chunk(const uint8_t* codes) {
  constexpr int kAhead = 8192;  // bytes
  for (int i = 0; i < kChunk * Codec::kBlockBytes; i += 64) __builtin_prefetch(codes + kAhead + i);
}

// Scales of a chunk, and what to add per unit of sum(x): 2^(bits - 1) - zero.
template <class V>
struct Scales {
  alignas(64) float scale[kChunk][kLanes];
  alignas(64) float shift[kChunk][kLanes];

  LLMPQ_INLINE void load(const GemmArgs& a, int64_t panel, int64_t first_block, int count) {
    const int64_t groups = ceil_div(a.k, a.group_size);
    const auto center = V::broadcast(static_cast<float>(1 << (a.bits - 1)));
    for (int b = 0; b < count; ++b) {
      if (a.scales == nullptr) {
        V::store(scale[b], V::broadcast(1.0f));
        continue;
      }
      const int64_t group = static_cast<uint32_t>(first_block + b) * kBlock / static_cast<uint32_t>(a.group_size);
      const int64_t at = (panel * groups + group) * kLanes;
      const auto* halves = static_cast<const uint8_t*>(a.scales) + at * 2;
      V::store(scale[b], a.scale_dtype == Dtype::kFloat16 ? V::load_float16(halves) : V::load_bfloat16(halves));
      if (a.zeros == nullptr) continue;
      V::store(shift[b], V::sub(center, V::load_uint8(static_cast<const uint8_t*>(a.zeros) + at)));
    }
  }
};

// What a tile of M rows of x and a panel have come to so far.
template <class V, class Codec, int M>
struct Tile {
  alignas(64) float y[M][kLanes] = {};

  // Add the product of B blocks at `codes`, as many chains of additions as hide the latency of one. x is [B][M][32].
  template <int B>
  LLMPQ_INLINE void add_blocks(const uint8_t* codes, const float (*scale)[kLanes], const float (*shift)[kLanes],
                               const float* x, const float* x_sums) {
    using F = typename V::F;
    F sums[B][M];
    unroll<B>([&](auto b) LLMPQ_LAMBDA { unroll<M>([&](auto r) LLMPQ_LAMBDA { sums[b][r] = V::zero(); }); });
    for (int index = 0; index < 4; ++index) {
      typename Codec::Plane planes[B];
      unroll<B>([&](auto b) LLMPQ_LAMBDA { planes[b] = Codec::plane(codes + b * Codec::kBlockBytes, index); });
      unroll<8>([&](auto j) LLMPQ_LAMBDA {
        unroll<B>([&](auto b) LLMPQ_LAMBDA {
          const F w = Codec::template column<decltype(j)::value>(planes[b]);
          unroll<M>([&](auto r) LLMPQ_LAMBDA {
            sums[b][r] = V::fma(w, V::broadcast(x[(b * M + r) * kBlock + index * 8 + j]), sums[b][r]);
          });
        });
      });
    }
    unroll<M>([&](auto r) LLMPQ_LAMBDA {
      F total = V::load(y[r]);
      unroll<B>([&](auto b) LLMPQ_LAMBDA {
        F sum = sums[b][r];
        if (x_sums != nullptr) sum = V::fma(V::load(shift[b]), V::broadcast(x_sums[b * M + r]), sum);
        total = V::fma(V::load(scale[b]), sum, total);
      });
      V::store(y[r], total);
    });
  }

  LLMPQ_INLINE void add_chunk(const uint8_t* codes, const Scales<V>& scales, int count, const float* x,
                              const float* x_sums) {
    constexpr int kWanted = V::kChains / M;
    constexpr int B = kWanted >= 4 ? 4 : kWanted >= 2 ? 2 : 1;
    const auto add = [&](auto blocks, int b) LLMPQ_LAMBDA {
      add_blocks<decltype(blocks)::value>(codes + b * Codec::kBlockBytes, scales.scale + b, scales.shift + b,
                                          x + b * M * kBlock, x_sums != nullptr ? x_sums + b * M : nullptr);
    };
    int block = 0;
    for (; block + B <= count; block += B) add(Index<B>{}, block);
    if (B == 1) return;
    for (; block < count; ++block) add(Index<1>{}, block);
  }

  LLMPQ_INLINE void write(const GemmArgs& a, int64_t first_row, int64_t panel) const {
    const int64_t column = panel * kLanes;
    const int count = a.n - column < kLanes ? static_cast<int>(a.n - column) : kLanes;
    for (int r = 0; r < M; ++r) {
      auto value = V::load(y[r]);
      if (a.bias != nullptr) value = V::add(value, V::load_first(static_cast<const float*>(a.bias) + column, count));
      V::store_first(static_cast<float*>(a.y) + (first_row + r) * a.y_stride + column, value, count);
    }
  }
};

template <class V, class Codec, int M>
void __attribute__((noinline)) gemm_tile(const GemmTask& task, int first_row, int64_t panel) {
  const GemmArgs& a = *task.args;
  const int64_t blocks = task.blocks();
  const auto* codes = static_cast<const uint8_t*>(a.qweight) + panel * blocks * Codec::kBlockBytes;
  const float* x = task.x + first_row * blocks * kBlock;
  const float* x_sums = a.zeros != nullptr ? task.x_sums + first_row * blocks : nullptr;
  Tile<V, Codec, M> tile;
  Scales<V> scales;
  for (int64_t block = 0; block < blocks; block += kChunk) {
    const int count = blocks - block < kChunk ? static_cast<int>(blocks - block) : kChunk;
    scales.load(a, panel, block, count);
    prefetch_chunk<Codec>(codes + block * Codec::kBlockBytes);
    tile.add_chunk(codes + block * Codec::kBlockBytes, scales, count, x + block * M * kBlock,
                   x_sums != nullptr ? x_sums + block * M : nullptr);
  }
  tile.write(a, task.first_row + first_row, panel);
}

// All tiles for one panel, then the next: from the second tile on the panel is in a near cache.
template <class V, class Codec>
void gemm_with(const GemmTask& task, int64_t panel_begin, int64_t panel_end) {
  for (int64_t panel = panel_begin; panel < panel_end; ++panel) {
    int row = 0;
    for (int tile = 0; tile < task.tiles; ++tile) {
      const int rows = task.tile_rows(tile);
      unroll<V::kTileRows>([&](auto r) LLMPQ_LAMBDA {
        constexpr int M = decltype(r)::value + 1;
        if (rows == M) gemm_tile<V, Codec, M>(task, row, panel);
      });
      row += rows;
    }
  }
}

template <class V>
void gemm_panels(const GemmTask& task, int64_t panel_begin, int64_t panel_end) {
  switch (task.args->bits) {
    case 3:
      return gemm_with<V, Codes<V, 3>>(task, panel_begin, panel_end);
    case 4:
      return gemm_with<V, Codes<V, 4>>(task, panel_begin, panel_end);
    case 8:
      return gemm_with<V, Bytes<V>>(task, panel_begin, panel_end);
    default:
      if (task.args->scale_dtype == Dtype::kFloat16) {
        return gemm_with<V, Halves<V, Dtype::kFloat16>>(task, panel_begin, panel_end);
      }
      return gemm_with<V, Halves<V, Dtype::kBFloat16>>(task, panel_begin, panel_end);
  }
}

}  // namespace llmpq

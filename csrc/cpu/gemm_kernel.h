// y = x @ w.T over panels (kernels.h) for floating x, for an instruction set V that offers vectors of 16 floats.
//
// A weight goes from the panel through a register into the sums of a tile's rows of x and is gone: decoding it again
// for the next tile takes two instructions beside a dozen multiplications, less than keeping it would.
#pragma once

#include "cpu/tile.h"

namespace llmpq {

// How the columns of a block are read. A block is four planes of eight columns each.
template <class V, int Bits, Zero Z>
struct Packed {  // a plane is a word of nibbles or two of bytes, a column the codes less kCenter
  // Codes of 8 bits as they are would cancel against the offset, which costs digits.
  static constexpr int kCenter = Z == Zero::kOffset && Bits < 8 ? 0 : 1 << (Bits - 1);
  static constexpr int kBlockBytes = Bits * kLanes * 4, kWords = Bits == 8 ? 2 : 1, kInWord = 8 / kWords;
  struct Plane {
    typename V::I words[kWords];
  };

  static LLMPQ_INLINE Plane plane(const uint8_t* block, int index) {
    Plane plane;
    for (int i = 0; i < kWords; ++i) {
      plane.words[i] = block_word<V, Bits>(block, index * kWords + i);
      if (kCenter != 0) plane.words[i] = V::template flip<Bits>(plane.words[i]);
    }
    return plane;
  }
  static LLMPQ_INLINE typename V::F column(const Plane& plane, int j) {
    return V::template field<Bits, kCenter>(plane.words[j / kInWord], j % kInWord);
  }
};

template <class V, Dtype D>
struct Halves {
  static constexpr int kCenter = 0;
  static constexpr int kBlockBytes = kBlock * kLanes * 2;
  using Plane = const uint8_t*;
  static LLMPQ_INLINE Plane plane(const uint8_t* block, int index) { return block + index * 8 * kLanes * 2; }
  static LLMPQ_INLINE typename V::F column(Plane plane, int j) {
    const uint8_t* halves = plane + j * kLanes * 2;
    return D == Dtype::kFloat16 ? V::load_float16(halves) : V::load_bfloat16(halves);
  }
};

// Scales of a chunk, and what to add per unit of sum(x): to the chain 2^(bits - 1) - zero, or to y the offset.
template <class V, Zero Z>
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
      V::store(scale[b], load_scales<V>(a, a.scales, at));
      if (Z == Zero::kOffset) {
        V::store(shift[b], load_scales<V>(a, a.offsets, at));
      } else if (Z == Zero::kInteger) {
        V::store(shift[b], V::sub(center, V::load_uint8(static_cast<const uint8_t*>(a.zeros) + at)));
      }
    }
  }
};

// What a tile of M rows of x and P panels have come to so far.
template <class V, class Codec, Zero Z, int M, int P>
struct Tile {
  using F = typename V::F;
  alignas(64) float y[P][M][kLanes] = {};

  // Add the product of B blocks at `codes`, as many chains of additions as hide the latency of one. x is [B][M][32].
  template <int B>
  LLMPQ_INLINE void add_blocks(const uint8_t* codes, int64_t panel_bytes, const Scales<V, Z>* scales, int first,
                               const float* x, const float* x_sums) {
    F sums[B][P][M];
    LLMPQ_UNROLL for (int i = 0; i < B * P * M; ++i) sums[i / (P * M)][i / M % P][i % M] = V::zero();
    for (int index = 0; index < 4; ++index) {
      typename Codec::Plane planes[B][P];
      LLMPQ_UNROLL for (int b = 0; b < B; ++b) {
        LLMPQ_UNROLL for (int p = 0; p < P; ++p) {
          planes[b][p] = Codec::plane(codes + p * panel_bytes + b * Codec::kBlockBytes, index);
        }
      }
      LLMPQ_UNROLL for (int j = 0; j < 8; ++j) {
        LLMPQ_UNROLL for (int b = 0; b < B; ++b) {
          F w[P];
          LLMPQ_UNROLL for (int p = 0; p < P; ++p) w[p] = Codec::column(planes[b][p], j);
          LLMPQ_UNROLL for (int r = 0; r < M; ++r) {
            const F xs = V::broadcast(x[(b * M + r) * kBlock + index * 8 + j]);
            LLMPQ_UNROLL for (int p = 0; p < P; ++p) sums[b][p][r] = V::fma(w[p], xs, sums[b][p][r]);
          }
        }
      }
    }
    LLMPQ_UNROLL for (int p = 0; p < P; ++p) {
      LLMPQ_UNROLL for (int r = 0; r < M; ++r) {
        F total = V::load(y[p][r]);
        LLMPQ_UNROLL for (int b = 0; b < B; ++b) {
          F sum = sums[b][p][r], offset = V::zero();
          if (Z != Zero::kSymmetric) {
            const F shift = V::load(scales[p].shift[first + b]), x_sum = V::broadcast(x_sums[b * M + r]);
            if (Z == Zero::kInteger) sum = V::fma(shift, x_sum, sum);
            if (Z == Zero::kOffset && Codec::kCenter != 0) sum = V::fma(V::broadcast(Codec::kCenter), x_sum, sum);
            if (Z == Zero::kOffset) offset = V::mul(shift, x_sum);
          }
          const F scale = V::load(scales[p].scale[first + b]);
          total = Z == Zero::kOffset ? V::add(V::fma(scale, sum, offset), total) : V::fma(scale, sum, total);
        }
        V::store(y[p][r], total);
      }
    }
  }

  LLMPQ_INLINE void add_chunk(const uint8_t* codes, int64_t panel_bytes, const Scales<V, Z>* scales, int count,
                              const float* x, const float* x_sums) {
    constexpr int kWanted = V::kChains / (M * P);
    constexpr int B = kWanted >= 8 ? 8 : kWanted >= 4 ? 4 : kWanted >= 2 ? 2 : 1;
    int block = 0;
    for (; block + B <= count; block += B) {
      add_blocks<B>(codes + block * Codec::kBlockBytes, panel_bytes, scales, block, x + block * M * kBlock,
                    x_sums + block * M);
    }
    if (B == 1) return;
    for (; block < count; ++block) {
      add_blocks<1>(codes + block * Codec::kBlockBytes, panel_bytes, scales, block, x + block * M * kBlock,
                    x_sums + block * M);
    }
  }
};

template <class V, class Codec, Zero Z, int M, int P>
void __attribute__((noinline)) gemm_tile(const FloatTask& task, int first_row, int64_t panel, TileAhead ahead) {
  const GemmArgs& a = *task.args;
  const int64_t blocks = task.blocks(), panel_bytes = blocks * Codec::kBlockBytes;
  const auto* codes = static_cast<const uint8_t*>(a.qweight) + panel * panel_bytes;
  const float* x = task.x.values + first_row * blocks * kBlock;
  const float* x_sums = task.x.sums + first_row * blocks;  // of no meaning in a symmetric weight
  for (int p = 0; p < P; ++p) prefetch_tile<M>(task, first_row, panel + p);
  Tile<V, Codec, Z, M, P> tile;
  Scales<V, Z> scales[P];
  for (int64_t block = 0; block < blocks; block += kChunk) {
    const int count = blocks - block < kChunk ? static_cast<int>(blocks - block) : kChunk;
    for (int p = 0; p < P; ++p) {
      scales[p].load(a, panel + p, block, count);
      if (ahead.bytes == 0) continue;
      const int64_t at = block * Codec::kBlockBytes, next = at + ahead.at(at, panel_bytes, P);
      prefetch_block<kChunk * Codec::kBlockBytes>(codes + p * panel_bytes + next);
    }
    tile.add_chunk(codes + block * Codec::kBlockBytes, panel_bytes, scales, count, x + block * M * kBlock,
                   x_sums + block * M);
  }
  for (int p = 0; p < P; ++p) write_tile<V, M>(task, tile.y[p], first_row, panel + p);
}

template <class V, class Codec, Zero Z>
void gemm_with(const FloatTask& task, int64_t panel_begin, int64_t panel_end) {
  for_tiles<V::kTileRows, V::kPairFrom, V::kPanels>(
      task, task.blocks() * Codec::kBlockBytes, panel_begin, panel_end,
      [&](auto rows, auto panels, int first_row, int64_t panel, TileAhead ahead) LLMPQ_LAMBDA {
        gemm_tile<V, Codec, Z, decltype(rows)::value, decltype(panels)::value>(task, first_row, panel, ahead);
      });
}

template <class V>
void gemm_panels(const FloatTask& task, int64_t panel_begin, int64_t panel_end) {
  const auto packed = [&](auto bits) LLMPQ_LAMBDA {
    with_zero(*task.args, [&](auto zero) LLMPQ_LAMBDA {
      constexpr Zero kZero = decltype(zero)::value;
      gemm_with<V, Packed<V, decltype(bits)::value, kZero>, kZero>(task, panel_begin, panel_end);
    });
  };
  const auto halves = [&](auto dtype) LLMPQ_LAMBDA {
    gemm_with<V, Halves<V, decltype(dtype)::value>, Zero::kSymmetric>(task, panel_begin, panel_end);
  };
  if (task.args->bits == 3) return packed(Index<3>{});
  if (task.args->bits == 4) return packed(Index<4>{});
  if (task.args->bits == 8) return packed(Index<8>{});
  if (task.args->scale_dtype == Dtype::kFloat16) return halves(std::integral_constant<Dtype, Dtype::kFloat16>{});
  halves(std::integral_constant<Dtype, Dtype::kBFloat16>{});
}

}  // namespace llmpq

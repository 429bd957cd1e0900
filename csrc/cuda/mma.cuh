// The tensor-core kernel, for up to 64 rows of 16-bit x. It reads each weight once.
//
// The weights are the left factor: 16 of their rows are the 16 rows of an instruction, and a step of 8 rows of x its
// columns. A block of 4 warps takes tiles of 128 rows of w (32 a warp) chunk by chunk of 128 columns of k; the next
// chunks are on their way to shared memory meanwhile. Codes less their zeros are multiplied, exact in 16 bits; sums are
// fp32, begin anew with every group (at most a chunk), and are added to the totals times the group's scale. Where a
// weight has offsets, the zero is 0, and the totals begin with the offset times the group's sum of x. Tensor cores add
// that up, too, by a left factor of ones: every thread then has the sums that it needs.
//
// For few rows of bfloat16 on Hopper nothing is taken off the codes (biased_kernel): they are multiplied with the power of
// two whose mantissa they were put into, which is exact as well, and once for each group that and the zero, times the sum
// of x, are taken off the sums. It is an instruction less for each pair of weights. The sums are larger by this base, some
// 30 times, and so is what fp32 rounds off; it is still far less than what bfloat16 rounds off the result.
//
// All tiles' chunks, one tile after the other, are dealt out evenly to the blocks, so that every block reads the same
// number of bytes. Where a tile is shared, its blocks leave totals in the workspace, and the last of them adds those in
// the order of k and writes the result: the same bits each time, no output written twice.
//
// What is dealt to which block does not depend on m, nor does the order in which a row of x is summed. So the bits of a
// row of y do not depend on the other rows of x, or on how many there are, where one of the two ways is taken for all m.
//
// On Hopper a kernel may begin while the one before it ends (programmatic dependent launch): it then reads the first
// chunks of its weight, which nobody writes any more, and waits before it touches anything else. Every block waits, so
// kernels end in the order in which they were queued.
#pragma once

#include "cuda/gemm.cuh"
#include "cuda/loader.cuh"
#include "cuda/numbers.cuh"

namespace llmpq {

template <class X>
struct PairOf;
template <>
struct PairOf<__half> {
  using type = Half2;
  static constexpr uint32_t kOnes = 0x3C003C00u;
};
template <>
struct PairOf<__nv_bfloat16> {
  using type = BFloat2;
  static constexpr uint32_t kOnes = 0x3F803F80u;
};

// What becomes of the totals of a block of so many warps, each of which has those of two panels of the weight.
template <class X, int Steps, int Warps>
struct Ending {
  using Sums = float[kWarpPanels][Steps][4];

  const CudaGemmArgs& args;
  const int lane = threadIdx.x % kLanes;
  const int warp = threadIdx.x / kLanes;

  // Keep what this block found of a tile, and write the result if nothing is missing.
  LLMPQ_DEVICE void finish(const Deal& deal, int tile, Sums& totals) const {
    constexpr int size = sizeof(Sums) / sizeof(float) * Warps * kLanes;
    const int begin = tile * args.split.chunks, first = deal.owner(begin), last = deal.owner(begin + args.split.chunks - 1);
    if (first != last) {
      const int first_slot = deal.first_slot(first, tile), block = static_cast<int>(blockIdx.x);
      const auto totals_of = [&](int i) {
        return args.workspace + int64_t{i == first ? first_slot : Deal::other_slot(i)} * size + threadIdx.x;
      };
      float* own = totals_of(block);
      each_of_part(totals, [&](float& total, int i) { own[i * Warps * kLanes] = total; });
      if (!is_last_of(static_cast<unsigned>(last - first + 1), args.counters + tile)) return;
      each(totals, [](float& total, int) { total = 0.0f; });
      constexpr int together = Steps <= 2 ? 4 : 1;  // reads take long to come, and one need not wait for another
#pragma unroll together
      for (int other = first; other <= last; ++other) {
        const float* part = totals_of(other);
        each_of_part(totals, [&](float& total, int i) { total += load_written_by_others(part + i * Warps * kLanes); });
      }
    }
    write(tile, totals);
  }

  // Calls use(total, its number) for the totals of rows of x that there are.
  template <class Use>
  LLMPQ_DEVICE void each(Sums& totals, const Use& use) const {
#pragma unroll
    for (int step = 0; step < Steps; ++step) {
#pragma unroll
      for (int column = 0; column < 2; ++column) {
        if (row(step, column) >= args.m) continue;
#pragma unroll
        for (int p = 0; p < kWarpPanels; ++p) {
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            const int i = half * 2 + column;
            use(totals[p][step][i], (p * Steps + step) * 4 + i);
          }
        }
      }
    }
  }

  // The same for all totals of `Together` steps after the other as long as there are rows, so that whatever is read need
  // not be waited for one by one.
  template <int Together, class Use>
  LLMPQ_DEVICE void each_in_steps(Sums& totals, const Use& use) const {
    constexpr int together = Steps < Together ? Steps : Together;
#pragma unroll
    for (int begin = 0; begin < Steps; begin += together) {
      if (begin * kStepRows >= args.m) break;
#pragma unroll
      for (int step = begin; step < begin + together; ++step) {
#pragma unroll
        for (int p = 0; p < kWarpPanels; ++p) {
#pragma unroll
          for (int i = 0; i < 4; ++i) use(totals[p][step][i], (p * Steps + step) * 4 + i);
        }
      }
    }
  }

  // The totals that blocks leave each other: of few rows just these, of more those that fill up steps, too.
  template <class Use>
  LLMPQ_DEVICE void each_of_part(Sums& totals, const Use& use) const {
    if constexpr (Steps <= 2) {
      each(totals, use);
    } else {
      each_in_steps<8>(totals, use);
    }
  }

  // The row of x that a sum belongs to.
  LLMPQ_DEVICE int row(int step, int column) const { return step * kStepRows + lane % kOctets * 2 + column; }

  // What is added is read before anything is written, and where there is no output, too: one read need not wait for
  // another.
  LLMPQ_DEVICE void write(int tile, Sums& totals) const {
    const int64_t first = int64_t{tile} * Warps * kWarpPanels * kPanel + warp * kWarpPanels * kPanel + lane / kOctets;
    const auto column = [&](int p, int i) { return first + p * kPanel + i / 2 * (kPanel / 2); };
    const auto add = [&](const void* values, int64_t stride) {
      each_in_steps<4>(totals, [&](float& total, int i) {  // the addresses of more need too many registers
        const int of_row = row(i / 4 % Steps, i % 2);
        const int64_t at = min(int64_t{of_row}, args.m - 1) * stride + min(column(i / 4 / Steps, i % 4), args.n - 1);
        total += to_float(static_cast<const X*>(values)[at]);
      });
    };
    if (args.bias) add(args.bias, 0);
    if (args.residual) {
      each(totals, [](float& total, int) { total = rounded<X>(total); });
      add(args.residual, args.residual_stride);
    }
    each(totals, [&](float& total, int i) {
      const int64_t to = column(i / 4 / Steps, i % 4);
      if (to < args.n) store(static_cast<X*>(args.y) + row(i / 4 % Steps, i % 2) * args.y_stride + to, total);
    });
  }
};

// What a thread does with the chunks. KeepsBase: codes are multiplied with their base (dequant.cuh), and it is taken off
// the sums, with the zero.
template <int Bits, class X, int Steps, int FlushBlocks, bool HasOffsets, bool KeepsBase>
class Multiplier {
  using Pair = typename PairOf<X>::type;
  using Memory = Stage<Bits, Steps, FlushBlocks>;
  static constexpr int kPanelWords = kChunkPlanes<Bits> * kPlane;
  static constexpr int kParts = KeepsBase ? Biased<Bits>::kParts : 1;  // of a code
  static constexpr bool kSumsX = HasOffsets || KeepsBase;
  static constexpr int kOffsets = HasOffsets ? kWarpPanels : 0;  // registers with scales, before those with offsets

 public:
  using Sums = float[kWarpPanels][Steps][4];

  LLMPQ_DEVICE explicit Multiplier(const CudaGemmArgs& arguments) : args(arguments) {
    const int lane = threadIdx.x % kLanes, panel = threadIdx.x / kLanes * kWarpPanels, groups = panel * Memory::kFlushes;
    const SharedAddress start = shared_address(shared_memory());
    weights_place = kept(start + Memory::kWeights + (panel + lane / kPanel) * (kPanelWords * 4) + lane % kPanel * kPiece);
    x_place = kept(Memory::kX + lane * kPiece);
    // Rows of scales: rows 0 to 7, and 8 to 15, of a panel; then those of the other panel; then offsets.
    scales_place = kept(start + Memory::kScales + groups * kPanel * 2 + lane % 2 * kPiece +
                        lane / 8 % 2 * (Memory::kFlushes * kPanel * 2) +
                        (HasOffsets ? lane / 16 * (Memory::kZeros - Memory::kScales) : 0));
    zeros_place = kept(!HasOffsets && args.zeros ? Memory::kZeros + groups * kPanel + lane / kOctets : -1);
#pragma unroll
    for (auto& zero : zeros) zero = kSymmetricZero<Bits>;
  }

  // totals += this warp's rows of the chunk in the stage at `stage` @ x.T
  LLMPQ_DEVICE void multiply(int stage, Sums& totals) {
    uint32_t words[kChunkPlanes<Bits>][kWarpPanels * 2];  // of rows g and g + 8 of each panel
#pragma unroll
    for (int flush = 0; flush < Memory::kFlushes; ++flush) {
      load_zeros(stage, flush);
      Sums sums = {};
      float x_sums[Steps][4] = {};  // over the columns of k, of the rows of x that the sums belong to
#pragma unroll
      for (int block = flush * FlushBlocks; block < (flush + 1) * FlushBlocks; ++block) {
#pragma unroll
        for (int plane = first_plane<Bits>(block); plane < first_plane<Bits>(block + 1); ++plane) {
          load_matrices(words[plane], weights_place + stage + plane * kPlane * 4);
        }
        Pair pairs[kWarpPanels][2][kParts][kOctet / 2];  // of rows g and g + 8
#pragma unroll
        for (int i = 0; i < kWarpPanels * 2; ++i) {
          const PackedOctet octet = octet_of<Bits>(block, [&](int plane) { return words[plane][i]; });
          if constexpr (KeepsBase) {
            Biased<Bits>::dequantize(octet, pairs[i / 2][i % 2]);
          } else {
            Shift<Bits, Pair>(zero(i)).dequantize(octet, pairs[i / 2][i % 2][0]);
          }
        }
#pragma unroll
        for (int step = 0; step < Steps; ++step) {
          const uint4 piece = reinterpret_cast<const uint4*>(shared_memory() + stage + x_place)[(block * Steps + step) * kLanes];
          const Pair first[2] = {{piece.x}, {piece.y}}, second[2] = {{piece.z}, {piece.w}};
#pragma unroll
          for (int p = 0; p < kWarpPanels; ++p) {
#pragma unroll
            for (int part = 0; part < kParts; ++part) {
              const Pair(&low)[4] = pairs[p][0][part], (&high)[4] = pairs[p][1][part];
              multiply_tile(sums[p][step], {low[0], high[0], low[1], high[1]}, first);
              multiply_tile(sums[p][step], {low[2], high[2], low[3], high[3]}, second);
            }
          }
          if constexpr (kSumsX) {
            const Pair one{PairOf<X>::kOnes}, ones[4] = {one, one, one, one};
            multiply_tile(x_sums[step], ones, first);
            multiply_tile(x_sums[step], ones, second);
          }
        }
      }
      // The compiler would begin the next ones meanwhile, with too many registers.
      if constexpr (Steps > 2 && Memory::kFlushes > 1) sync_warp();
      flush_sums(stage, flush, sums, x_sums, totals);
    }
  }

 private:
  // totals += scales * (sums - biases * x_sums) + offsets * x_sums
  LLMPQ_DEVICE void flush_sums(int stage, int flush, Sums& sums, float (&x_sums)[Steps][4], Sums& totals) const {
    uint32_t groups[kWarpPanels + kOffsets];  // of rows g and g + 8 of each panel
    load_transposed(groups, scales_place + stage + flush * kPanel * 2);
#pragma unroll
    for (int p = 0; p < kWarpPanels; ++p) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float scale = scale_of(groups[p] >> 16 * half, args.scale_dtype);
        const float offset = HasOffsets ? scale_of(groups[kOffsets + p] >> 16 * half, args.scale_dtype) : 0.0f;
#pragma unroll
        for (int step = 0; step < Steps; ++step) {
#pragma unroll
          for (int column = 0; column < 2; ++column) {
            float &total = totals[p][step][half * 2 + column], &sum = sums[p][step][half * 2 + column];
            if constexpr (KeepsBase) sum = fmaf(-Biased<Bits>::bias(zero(p * 2 + half)), x_sums[step][column], sum);
            if constexpr (HasOffsets) total = fmaf(offset, x_sums[step][column], total);
            total = fmaf(scale, sum, total);
          }
        }
      }
    }
  }

  // Those of a flush, if there are any.
  LLMPQ_DEVICE void load_zeros(int stage, int flush) {
    if constexpr (!HasOffsets) {
      if (zeros_place < 0) return;
#pragma unroll
      for (int i = 0; i < kWarpPanels * 2; ++i) {
        zeros[i] = shared_memory()[stage + zeros_place + (i / 2 * Memory::kFlushes + flush) * kPanel + i % 2 * (kPanel / 2)];
      }
    }
  }

  LLMPQ_DEVICE int zero(int i) const { return HasOffsets ? 0 : zeros[i]; }

  const CudaGemmArgs& args;
  SharedAddress weights_place, scales_place;  // of this lane in the first stage
  int x_place, zeros_place;                   // and from its start on
  int zeros[kWarpPanels * 2];                 // of rows g and g + 8 of each panel
};

// x and its rows start at multiples of 16 bytes.
template <int Bits, class X, int Steps, int FlushBlocks, bool HasOffsets, bool KeepsBase>
LLMPQ_DEVICE void multiply_tiles(const CudaGemmArgs& args) {
  using Memory = Stage<Bits, Steps, FlushBlocks>;
  using Multiply = Multiplier<Bits, X, Steps, FlushBlocks, HasOffsets, KeepsBase>;
  using Load = Loader<Bits, Steps, FlushBlocks, HasOffsets>;
  let_next_grid_begin();
  const Deal deal{args.split};
  const int begin = deal.begin(blockIdx.x), end = deal.begin(blockIdx.x + 1), chunks = args.split.chunks;
  int tile = deal.tile(begin);
  Load loader(args, tile, begin - tile * chunks);
  loader.begin(end - begin);
  Multiply multiplier(args);
  const Ending<X, Steps, kWarps> ending{args};

  const int end_of_loads = end - Load::kAhead;
  int stage = 0, free = (Memory::kCount - 1) * Memory::kBytes;  // what is multiplied, and where is loaded to
  for (int index = begin; index < end; ++tile) {
    const int tile_end = min((tile + 1) * chunks, end);
    typename Multiply::Sums totals = {};
    for (; index < tile_end; ++index) {
      wait_for_copies<Memory::kCount - 2>();
      sync_block();  // everyone's copies are done, and everyone has read the stage that is loaded next
      loader.next(free, index < end_of_loads);
      multiplier.multiply(stage, totals);
      free = stage;
      stage = stage == (Memory::kCount - 1) * Memory::kBytes ? 0 : stage + Memory::kBytes;
    }
    ending.finish(deal, tile, totals);
  }
}

template <int Bits, class X, int Steps, int FlushBlocks, bool HasOffsets>
__global__ void __launch_bounds__(kThreads, kResidentBlocks<Steps, FlushBlocks>) tile_kernel(const CudaGemmArgs args) {
  multiply_tiles<Bits, X, Steps, FlushBlocks, HasOffsets, false>(args);
}

// For few rows of bfloat16 and large groups, on Hopper (launch.cuh).
template <int Bits, int Steps, bool HasOffsets>
__global__ void __launch_bounds__(kThreads, kResidentBlocks<Steps, kChunkBlocks>) biased_kernel(const CudaGemmArgs args) {
#ifdef LLMPQ_HAS_WGMMA
  multiply_tiles<Bits, __nv_bfloat16, Steps, kChunkBlocks, HasOffsets, true>(args);
#endif
}

}  // namespace llmpq

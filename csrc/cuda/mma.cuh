// The tensor-core kernel, for up to 64 rows of 16-bit x. It reads each weight once.
//
// The weights are the left factor: 16 of their rows are the 16 rows of an instruction, and a step of 8 rows of x its
// columns. A block of 4 warps takes tiles of 128 rows of w (32 a warp) chunk by chunk of 128 columns of k; the next
// chunks are on their way to shared memory meanwhile. Codes less their zeros are multiplied, exact in 16 bits; sums are
// fp32, begin anew with every group (at most a chunk), and are added to the totals times the group's scale. Where a
// weight has offsets, the zero is 0, and the totals begin with the offset times the group's sum of x. Tensor cores add
// that up, too, by a left factor of ones: every thread then has the sums that it needs.
//
// All tiles' chunks, one tile after the other, are dealt out evenly to the blocks, so that every block reads the same
// number of bytes. Where a tile is shared, its blocks leave totals in the workspace, and the last of them adds those in
// the order of k and writes the result: the same bits each time, no output written twice.
//
// What is dealt to which block does not depend on m, nor does the order in which a row of x is summed. So the bits of a
// row of y do not depend on the other rows of x, or on how many there are.
//
// On Hopper a kernel may begin while the one before it ends (programmatic dependent launch): it then reads the first
// chunks of its weight, which nobody writes any more, and waits before it touches anything else. Every block waits, so
// kernels end in the order in which they were queued.
#pragma once

#include "cuda/gemm.cuh"
#include "cuda/numbers.cuh"

namespace llmpq {

constexpr int kWarps = 4;
constexpr int kThreads = kWarps * kLanes;
constexpr int kTilePanels = kTileRows / kPanel;
constexpr int kWarpPanels = kTilePanels / kWarps;
constexpr int kStepRows = 8;  // of x: the columns of an instruction
constexpr int kPiece = 16;  // bytes that a thread copies at once
constexpr int kBlocksPerProcessor = 4;  // that the work is dealt to

// Steps of 8 rows of x that one kernel takes. Sums that are flushed after every block leave registers for half as many,
// and so do sums of x.
template <int FlushBlocks, bool HasOffsets>
constexpr int kMaxSteps = FlushBlocks == 1 || HasOffsets ? 4 : 8;

// How many blocks of a kernel an SM is to hold at once: the sums of many rows need registers.
template <int Steps>
constexpr int kResidentBlocks = Steps <= 2 ? 4 : 2;

// Shared memory for the stages of a block: as many blocks fit an SM of Ampere or Hopper as are to be there, and all but
// the largest kernel one of Turing.
template <int Steps>
constexpr int kStageBytes = (Steps <= 2 ? 40 : Steps == 4 ? 60 : 80) * 1024;

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

// One chunk of everything in shared memory. Sums are flushed to the totals after every FlushBlocks blocks.
//   weights [kTilePanels][kChunkPlanes][kPlane] words
//   x       [kChunkBlocks][Steps][kLanes] pieces: for lane 4 g + t octet t of row g, which is what it needs
//   scales  [kTilePanels][flushes][kPanel] of 16 bits, and likewise offsets or, of 8 bits, zeros
template <int Bits, int Steps, int FlushBlocks>
struct Stage {
  static constexpr int kFlushes = kChunkBlocks / FlushBlocks;
  static constexpr int kWeights = 0;
  static constexpr int kX = kWeights + kTilePanels * kChunkPlanes<Bits> * kPlane * 4;
  static constexpr int kScales = kX + kChunkBlocks * Steps * kLanes * kPiece;
  static constexpr int kZeros = kScales + kTilePanels * kFlushes * kPanel * 2;
  static constexpr int kBytes = kZeros + kTilePanels * kFlushes * kPanel * 2;
  static constexpr int kCount = kBytes * 4 <= kStageBytes<Steps> ? 4 : kBytes * 3 <= kStageBytes<Steps> ? 3 : 2;
};

LLMPQ_DEVICE int quotient(int n, Divisor by) {
  return static_cast<int>(uint64_t{2 * static_cast<uint32_t>(n)} * by.multiplier >> 32 >> by.shift);
}

// Who works on which chunks. The host knows the divisors: divisions would take longer than a block's first bytes.
struct Deal {
  const Split& split;

  LLMPQ_DEVICE int begin(int block) const { return block * split.least + min(block, split.more); }
  LLMPQ_DEVICE int tile(int unit) const { return quotient(unit, split.by_chunks); }

  LLMPQ_DEVICE int owner(int unit) const {
    const bool most = unit < split.more * (split.least + 1);
    return quotient(most ? unit : unit - split.more, most ? split.by_most : split.by_least);
  }

  // Where a block leaves its totals of a tile. It shares at most the tile that it begins with and the one that it ends
  // with, and a tile's blocks but the first begin with it.
  LLMPQ_DEVICE int first_slot(int block, int of_tile) const { return 2 * block + (tile(begin(block)) != of_tile); }
  LLMPQ_DEVICE static int other_slot(int block) { return 2 * block; }
};

// Copies one chunk after the other to shared memory. What lies beyond n or k is not copied: its x is 0, or its result is
// not kept.
template <int Bits, int Steps, int FlushBlocks, bool HasOffsets>
class Loader {
  using Memory = Stage<Bits, Steps, FlushBlocks>;
  static constexpr int kAhead = Memory::kCount - 1;  // chunks on their way while one is multiplied
  static constexpr int kPlaneBytes = kPlane * 4;
  static constexpr int kPanelPieces = kChunkPlanes<Bits> * kPlaneBytes / kPiece;
  static constexpr int kCopies = kWarpPanels * kPanelPieces / kLanes;  // of a lane: a warp copies what it multiplies
  static constexpr int kRowPieces = kChunk / kOctet;                   // of a row of x
  static constexpr int kGroupRows = kTilePanels * Memory::kFlushes;    // of 16 scales, zeros or offsets
  static_assert(kThreads == kStepRows * kRowPieces && 4 * kGroupRows <= kThreads, "a thread copies one piece of each");

 public:
  // The block takes `count` chunks, the first of which is chunk `first` of the tile.
  LLMPQ_DEVICE Loader(const CudaGemmArgs& arguments, int tile, int first, int count)
      : args(arguments), left(count), chunk(first), to(shared_memory()) {
    const int warp = threadIdx.x / kLanes, lane = threadIdx.x % kLanes, panel = tile * kTilePanels + warp * kWarpPanels;
    panels_left = args.panels - tile * kTilePanels;
    weights = static_cast<const uint8_t*>(args.qweight) + lane * kPiece +
              (int64_t{panel} * args.panel_planes + chunk * kChunkPlanes<Bits>)*kPlaneBytes;
    weights_place = kept(Memory::kWeights + (warp * kWarpPanels * kPanelPieces + lane) * kPiece);
    first_panel = kept(warp * kWarpPanels);
  }

  // Begin with the first chunks: what is of the weight comes as the rest does, x is there when this returns, so that
  // none of the weight is waited for longer than it takes. Whatever is not needed for the first copies comes after them.
  LLMPQ_DEVICE void begin() {
    const int first = chunk, count = min(kAhead, left);
    for (int i = 0; i < kAhead; ++i) {
      if (i == 0 || i < count) {  // every block has a chunk
        load_weights();
        if (i == 0) find_groups();
        load_groups();
        advance();
      }
      end_copy_batch();
    }
    wait_for_grids_before();  // but for the weight, nothing was read before, and nothing written
    find_x(first);
    uint4 pieces[kAhead][Steps];
    int at = first;
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
#pragma unroll
      for (int step = 0; step < Steps; ++step) {
        pieces[i][step] = load_16_bytes(x + step * kStepRows * args.x_stride * 2, i < count && has_x(step));
      }
      at = at + 1 == args.split.chunks ? 0 : at + 1;
      advance_x(at);
    }
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
#pragma unroll
      for (int step = 0; step < Steps; ++step) {
        *reinterpret_cast<uint4*>(shared_memory() + i * Memory::kBytes + x_place + step * kLanes * kPiece) = pieces[i][step];
      }
    }
  }

  // Begin to copy the next chunk, or nothing at the end: the number of batches to wait for stays the same.
  LLMPQ_DEVICE void next() {
    if (left > 0) {
      load_weights();
      load_groups();
#pragma unroll
      for (int step = 0; step < Steps; ++step) {
        copy_16_bytes(to + x_place + step * kLanes * kPiece, x + step * kStepRows * args.x_stride * 2, has_x(step));
      }
      advance();
      advance_x(chunk);
    }
    end_copy_batch();
  }

 private:
  // The first threads copy scales, the next ones offsets or zeros.
  LLMPQ_DEVICE void find_groups() {
    constexpr unsigned scale_pieces = 2 * kGroupRows;
    const bool scales = threadIdx.x < scale_pieces, halves = scales || HasOffsets;
    const unsigned i = threadIdx.x - (scales ? 0 : scale_pieces), group_row = halves ? i / 2 : i;
    const void* source = scales ? args.scales : HasOffsets ? args.offsets : args.zeros;
    group_bytes = group_row < kGroupRows && source != nullptr ? halves ? 2 * kPanel : kPanel : 0;
    group_panel = kept(group_row / Memory::kFlushes);
    group_block = kept(group_row % Memory::kFlushes * FlushBlocks);
    groups = static_cast<const uint8_t*>(source) + (halves ? i % 2 * kPiece : 0) +
             int64_t{args.panels - panels_left + group_panel} * (args.num_groups * group_bytes);
    groups_place = kept((scales ? Memory::kScales : Memory::kZeros) + i * kPiece);
  }

  LLMPQ_DEVICE void find_x(int first) {
    const int row = threadIdx.x / kRowPieces, octet = threadIdx.x % kRowPieces;
    x = static_cast<const uint8_t*>(args.x) + (row * args.x_stride + first * kChunk + octet * kOctet) * 2;
    x_place = kept(Memory::kX + (octet / kOctets * Steps * kLanes + row * kOctets + octet % kOctets) * kPiece);
    rows_left = kept(static_cast<int>(args.m) - row);
    columns_left = static_cast<int>(args.k) - first * kChunk - octet * kOctet;
  }

  LLMPQ_DEVICE bool has_x(int step) const { return columns_left > 0 && step * kStepRows < rows_left; }

  LLMPQ_DEVICE void load_weights() const {
    const int lane = threadIdx.x % kLanes, planes_left = args.panel_planes - chunk * kChunkPlanes<Bits>;
#pragma unroll
    for (int i = 0; i < kCopies; ++i) {
      const int panel = (i * kLanes + lane) / kPanelPieces;
      const int plane = (i * kLanes + lane) % kPanelPieces / (kPlaneBytes / kPiece);
      if (first_panel + panel >= panels_left || plane >= planes_left) continue;
      const int past_panels = panel * (args.panel_planes - kChunkPlanes<Bits>)*kPlaneBytes;
      copy_16_bytes(to + weights_place + i * kLanes * kPiece, weights + i * kLanes * kPiece + past_panels);
    }
  }

  LLMPQ_DEVICE void load_groups() const {
    if (group_bytes == 0 || group_panel >= panels_left) return;
    // Beyond k there is no group, but the sum there, 0, is multiplied by a scale all the same.
    const int group = min((chunk * kChunkBlocks + group_block) >> args.group_shift, args.num_groups - 1);
    copy_16_bytes(to + groups_place, groups + group * group_bytes);
  }

  LLMPQ_DEVICE void advance() {
    to = to == shared_memory() + kAhead * Memory::kBytes ? shared_memory() : to + Memory::kBytes;
    weights += kChunkPlanes<Bits> * kPlaneBytes;
    --left;
    if (++chunk < args.split.chunks) return;
    weights += (int64_t{kTilePanels} * args.panel_planes - args.split.chunks * kChunkPlanes<Bits>)*kPlaneBytes;
    groups += int64_t{kTilePanels} * args.num_groups * group_bytes;
    panels_left -= kTilePanels;
    chunk = 0;
  }

  // To chunk `next`, which is the one after, or the first of the next tile.
  LLMPQ_DEVICE void advance_x(int next) {
    const int columns = next == 0 ? (1 - args.split.chunks) * kChunk : kChunk;
    x += columns * 2;
    columns_left -= columns;
  }

  const CudaGemmArgs& args;
  int left;         // chunks still to be copied
  int chunk;        // of the tile
  int panels_left;  // from the tile's first on
  uint8_t* to;      // the stage

  // Where this thread's first piece comes from and goes to in a stage, and what is left from there on.
  const uint8_t* weights;
  int weights_place, first_panel;
  const uint8_t* x;
  int x_place, rows_left, columns_left;
  const uint8_t* groups;
  int groups_place, group_bytes, group_panel, group_block;
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

// What a thread does with the chunks.
template <int Bits, class X, int Steps, int FlushBlocks, bool HasOffsets>
struct Multiplier {
  using Pair = typename PairOf<X>::type;
  using Memory = Stage<Bits, Steps, FlushBlocks>;
  using Sums = float[kWarpPanels][Steps][4];

  const CudaGemmArgs& args;
  const int lane = threadIdx.x % kLanes;
  const int warp = threadIdx.x / kLanes;

  // totals += this warp's rows of a loaded unit @ x.T
  LLMPQ_DEVICE void multiply(const uint8_t* stage, Sums& totals) const {
    const uint32_t* weights = reinterpret_cast<const uint32_t*>(stage + Memory::kWeights);
    const uint4* x = reinterpret_cast<const uint4*>(stage + Memory::kX);
    const int panel = warp * kWarpPanels;
#pragma unroll
    for (int flush = 0; flush < Memory::kFlushes; ++flush) {
      Sums sums = {};
      const Shift<Bits, Pair> shifts[kWarpPanels][2] = {{shift(stage, panel, flush, 0), shift(stage, panel, flush, 1)},
                                                        {shift(stage, panel + 1, flush, 0), shift(stage, panel + 1, flush, 1)}};
#pragma unroll
      for (int block = flush * FlushBlocks; block < (flush + 1) * FlushBlocks; ++block) {
        Pair pairs[kWarpPanels][2][kOctet / 2];  // of rows g and g + 8
#pragma unroll
        for (int p = 0; p < kWarpPanels; ++p) {
          const uint32_t* planes = weights + (panel + p) * kChunkPlanes<Bits> * kPlane;
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            shifts[p][half].dequantize(load_octet<Bits>(planes, block, half * kLanes + lane), pairs[p][half]);
          }
        }
#pragma unroll
        for (int step = 0; step < Steps; ++step) {
          const uint4 piece = x[(block * Steps + step) * kLanes + lane];
          const Pair first[2] = {{piece.x}, {piece.y}}, second[2] = {{piece.z}, {piece.w}};
#pragma unroll
          for (int p = 0; p < kWarpPanels; ++p) {
            const Pair(&low)[4] = pairs[p][0], (&high)[4] = pairs[p][1];
            multiply_tile(sums[p][step], {low[0], high[0], low[1], high[1]}, first);
            multiply_tile(sums[p][step], {low[2], high[2], low[3], high[3]}, second);
          }
        }
      }
      if constexpr (HasOffsets) add_offsets(stage, flush, totals);
#pragma unroll
      for (int p = 0; p < kWarpPanels; ++p) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const float scale = load_scale(stage + Memory::kScales, args.scale_dtype, group_index(panel + p, flush, i / 2));
#pragma unroll
          for (int step = 0; step < Steps; ++step) {
            totals[p][step][i] = fmaf(scale, sums[p][step][i], totals[p][step][i]);
          }
        }
      }
    }
  }

  // totals += offsets * sums of x over the columns of a flush
  LLMPQ_DEVICE void add_offsets(const uint8_t* stage, int flush, Sums& totals) const {
    const uint4* x = reinterpret_cast<const uint4*>(stage + Memory::kX);
    const Pair one{PairOf<X>::kOnes}, ones[4] = {one, one, one, one};
#pragma unroll
    for (int step = 0; step < Steps; ++step) {
      float x_sums[4] = {};  // of the rows of x that the sums belong to
#pragma unroll
      for (int block = flush * FlushBlocks; block < (flush + 1) * FlushBlocks; ++block) {
        const uint4 piece = x[(block * Steps + step) * kLanes + lane];
        const Pair first[2] = {{piece.x}, {piece.y}}, second[2] = {{piece.z}, {piece.w}};
        multiply_tile(x_sums, ones, first);
        multiply_tile(x_sums, ones, second);
      }
#pragma unroll
      for (int p = 0; p < kWarpPanels; ++p) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int index = group_index(warp * kWarpPanels + p, flush, i / 2);
          const float offset = load_scale(stage + Memory::kZeros, args.scale_dtype, index);
          totals[p][step][i] = fmaf(offset, x_sums[i], totals[p][step][i]);
        }
      }
    }
  }

  // Where the scale and the zero of row g or g + 8 of a panel are in a stage.
  LLMPQ_DEVICE int group_index(int panel, int flush, int half) const {
    return (panel * Memory::kFlushes + flush) * kPanel + half * (kPanel / 2) + lane / kOctets;
  }

  LLMPQ_DEVICE Shift<Bits, Pair> shift(const uint8_t* stage, int panel, int flush, int half) const {
    if constexpr (HasOffsets) return Shift<Bits, Pair>(0);
    const int zero = args.zeros ? stage[Memory::kZeros + group_index(panel, flush, half)] : kSymmetricZero<Bits>;
    return Shift<Bits, Pair>(zero);
  }
};

// x and its rows start at multiples of 16 bytes.
template <int Bits, class X, int Steps, int FlushBlocks, bool HasOffsets>
__global__ void __launch_bounds__(kThreads, kResidentBlocks<Steps>) tile_kernel(const CudaGemmArgs args) {
  using Memory = Stage<Bits, Steps, FlushBlocks>;
  using Multiply = Multiplier<Bits, X, Steps, FlushBlocks, HasOffsets>;
  let_next_grid_begin();
  const Deal deal{args.split};
  const int begin = deal.begin(blockIdx.x), end = deal.begin(blockIdx.x + 1), chunks = args.split.chunks;
  int tile = deal.tile(begin);
  const Multiply multiplier{args};
  const Ending<X, Steps, kWarps> ending{args};
  Loader<Bits, Steps, FlushBlocks, HasOffsets> loader(args, tile, begin - tile * chunks, end - begin);
  loader.begin();

  int stage = 0;
  for (int index = begin; index < end; ++tile) {
    const int tile_end = min((tile + 1) * chunks, end);
    typename Multiply::Sums totals = {};
    for (; index < tile_end; ++index) {
      wait_for_copies<Memory::kCount - 2>();
      sync_block();  // everyone's copies are done, and everyone has read the stage that is loaded next
      loader.next();
      multiplier.multiply(shared_memory() + stage * Memory::kBytes, totals);
      stage = stage + 1 == Memory::kCount ? 0 : stage + 1;
    }
    ending.finish(deal, tile, totals);
  }
}

}  // namespace llmpq

// The tensor-core kernel for Hopper and more than 16 rows of 16-bit x: products of warpgroups. It reads each weight once
// for 32, 64 or 128 rows of x.
//
// The weights are the left factor, as in mma.cuh, and come from registers; x is the right one, and comes from shared
// memory. A block is two warpgroups of 4 warps and takes tiles of 256 rows of w: each warp 2 panels of 16 rows, so that
// each warpgroup makes two products of 64 rows, one of the first panels of its warps and one of the second. Codes less
// their zeros are multiplied, exact in 16 bits; sums are fp32, begin anew with every group (at most a chunk), and are
// added to the totals times the group's scale. While products are made, the weights of the next batch are dequantized
// and the sums before are added; two sets of left factors take turns, and two of sums where registers allow.
//
// Which columns of k a thread dequantizes follows from how the weights lie (dequant.cuh), and products want x in that
// order: arrange_kernel puts it so beforehand, once for all blocks, with zeros beyond m and k. In a block of 32 columns,
// with x in words of two columns, core j (ptx.cuh) has words j of the four octets of a row; a product takes two cores. The
// sums of x that offsets need are made there, too.
//
// Chunks are dealt to the blocks and parts of tiles added as in mma.cuh, but to one block for each multiprocessor: tiles
// are larger, so that x is read less often, and so are the parts. For another number of columns the order of sums may be
// another: the bits of a row may depend on m.
#pragma once

#include "cuda/mma.cuh"

namespace llmpq {

constexpr int kWideWarps = 8;
constexpr int kWideThreads = kWideWarps * kLanes;
constexpr int kWidePanels = kWideWarps * kWarpPanels;
constexpr int kWideRows = kWidePanels * kPanel;  // of a tile
constexpr int kLeastWideRows = 16;               // of x, beyond which this kernel is the faster
constexpr int kMostColumns = 128;                // rows of x that a kernel takes at most
constexpr int kWideSharedBytes = 224 * 1024;     // of a multiprocessor, which a block has for itself
constexpr int kMostStages = 6;                   // as many as hide how long a copy takes
constexpr int kCoreRow = 16;                     // bytes of a row of a core

// One chunk of everything in shared memory, as in mma.cuh. There are `Columns` rows of x.
//   x       [kChunkBlocks * 4 cores][Columns] rows of cores
//   x sums  [flushes][Columns] floats, of all columns between flushes; only if there are offsets
template <int Bits, int Columns, int FlushBlocks>
struct WideStage {
  static constexpr int kFlushes = kChunkBlocks / FlushBlocks;
  static constexpr int kWeights = 0;
  static constexpr int kX = kWeights + kWidePanels * kChunkPlanes<Bits> * kPlane * 4;
  static constexpr int kXSums = kX + Columns * kChunk * 2;
  static constexpr int kScales = kXSums + kFlushes * Columns * 4;
  static constexpr int kZeros = kScales + kWidePanels * kFlushes * kPanel * 2;
  static constexpr int kBytes = kZeros + kWidePanels * kFlushes * kPanel * 2;
  static constexpr int kCount = kWideSharedBytes / kBytes < kMostStages ? kWideSharedBytes / kBytes : kMostStages;
  static_assert(kCount >= 3, "one is multiplied, one may still be read by products, one is loaded");
};

// Rows of x that one kernel takes. Sums that are flushed after every block, and sums of x, leave registers for half as many.
template <int FlushBlocks, bool HasOffsets>
constexpr int kMaxColumns = FlushBlocks == 1 || HasOffsets ? kMostColumns / 2 : kMostColumns;

// Bytes of arranged x of as many rows as a kernel takes, and of its sums.
inline int64_t arranged_bytes(int64_t k) { return (k + kChunk - 1) / kChunk * kChunk * kMostColumns * 2; }
inline int64_t x_sum_bytes(int64_t k) { return (k + kChunk - 1) / kChunk * kChunkBlocks * kMostColumns * 4; }

struct WideArgs : CudaGemmArgs {
  uint8_t* arranged;  // x as WideStage has it, one chunk after the other
  float* x_sums;      // likewise
  int columns;        // rows of x with those that fill up a product
};

// ---- x, arranged

constexpr int kArrangeThreads = 64;

// Each thread takes FlushBlocks blocks of a row of x, rows fastest: so whole cores are written at once.
template <class X, int FlushBlocks>
__global__ void __launch_bounds__(kArrangeThreads) arrange_kernel(const WideArgs args) {
  let_next_grid_begin();
  wait_for_grids_before();
  const unsigned columns = args.columns, index = blockIdx.x * kArrangeThreads + threadIdx.x;
  const int row = static_cast<int>(index % columns), flush = static_cast<int>(index / columns);
  const int flushes = (static_cast<int>(args.k) + kChunk - 1) / kChunk * (kChunkBlocks / FlushBlocks);
  if (flush >= flushes) return;
  const X* x = static_cast<const X*>(args.x) + row * args.x_stride;
  uint4 octets[FlushBlocks][kOctets];
  float sum = 0.0f;
#pragma unroll
  for (int block = 0; block < FlushBlocks; ++block) {
#pragma unroll
    for (int t = 0; t < kOctets; ++t) {
      const int column = (flush * FlushBlocks + block) * kBlock + t * kOctet;
      octets[block][t] = make_uint4(0, 0, 0, 0);
      if (row < args.m && column < args.k) octets[block][t] = *reinterpret_cast<const uint4*>(x + column);
    }
  }
#pragma unroll
  for (int block = 0; block < FlushBlocks; ++block) {
    const auto& octet = octets[block];
    uint4* to = reinterpret_cast<uint4*>(args.arranged) +
                int64_t{flush * FlushBlocks + block} * (kOctets * args.columns) + row;
    to[0 * args.columns] = make_uint4(octet[0].x, octet[1].x, octet[2].x, octet[3].x);
    to[1 * args.columns] = make_uint4(octet[0].y, octet[1].y, octet[2].y, octet[3].y);
    to[2 * args.columns] = make_uint4(octet[0].z, octet[1].z, octet[2].z, octet[3].z);
    to[3 * args.columns] = make_uint4(octet[0].w, octet[1].w, octet[2].w, octet[3].w);
    if (!args.offsets) continue;
#pragma unroll
    for (int t = 0; t < kOctets; ++t) {
      const X* values = reinterpret_cast<const X*>(&octet[t]);
#pragma unroll
      for (int i = 0; i < kOctet; ++i) sum += to_float(values[i]);
    }
  }
  if (args.offsets) args.x_sums[int64_t{flush} * args.columns + row] = sum;
}

// ---- products

// Copies one chunk after the other to shared memory, as Loader does.
template <int Bits, int Columns, int FlushBlocks, bool HasOffsets>
class WideLoader {
  using Memory = WideStage<Bits, Columns, FlushBlocks>;
  static constexpr int kPlaneBytes = kPlane * 4;
  static constexpr int kPanelPieces = kChunkPlanes<Bits> * kPlaneBytes / kPiece;
  static constexpr int kCopies = kWarpPanels * kPanelPieces / kLanes;  // of a lane: a warp copies what it multiplies
  static constexpr int kXPieces = Columns * kChunk * 2 / kPiece;
  static constexpr int kXSumPieces = Memory::kFlushes * Columns * 4 / kPiece;
  static constexpr int kGroupRows = kWidePanels * Memory::kFlushes;  // of 16 scales, zeros or offsets
  static_assert(kXPieces % kWideThreads == 0 && kXSumPieces <= kWideThreads && 4 * kGroupRows <= kWideThreads,
                "a thread copies as many pieces of x as the next, and at most one of sums and of groups");

 public:
  static constexpr int kAhead = Memory::kCount - 2;  // chunks on their way while one is multiplied and one pending

  // The first chunk to copy is chunk `first` of the tile.
  LLMPQ_DEVICE WideLoader(const WideArgs& arguments, int tile, int first)
      : args(arguments), chunk(first), tile_panel(tile * kWidePanels) {}

  // Begin to copy the first chunks, or as many as there are: the weights while x is being arranged.
  LLMPQ_DEVICE void begin(int count) {
    int x_chunk = chunk;
    for (int i = 0; i < kAhead; ++i) {
      if (i < count) {
        load_weights(stage(i));
        load_groups(stage(i));
        advance();
      }
      end_copy_batch();
    }
    wait_for_grids_before();  // but for the weight, nothing was read before, and nothing written
    for (int i = 0; i < kAhead; ++i) {
      if (i < count) load_x(stage(i), x_chunk);
      x_chunk = x_chunk + 1 == args.split.chunks ? 0 : x_chunk + 1;
      end_copy_batch();
    }
  }

  // Begin to copy the next chunk, or nothing if there is none: the number of batches to wait for stays the same.
  LLMPQ_DEVICE void next(int to, bool wanted) {
    if (wanted) {
      load_weights(stage(to));
      load_groups(stage(to));
      load_x(stage(to), chunk);
      advance();
    }
    end_copy_batch();
  }

 private:
  LLMPQ_DEVICE static uint8_t* stage(int number) { return shared_memory() + number * Memory::kBytes; }

  // Addresses are computed again for each chunk: kept in registers, they would leave too few for the sums.
  LLMPQ_DEVICE void load_weights(uint8_t* to) const {
    const int lane = threadIdx.x % kLanes, first = threadIdx.x / kLanes * kWarpPanels;
    const int plane = chunk * kChunkPlanes<Bits>, planes_left = args.panel_planes - plane;
    const uint8_t* from = static_cast<const uint8_t*>(args.qweight) +
                          (int64_t{tile_panel + first} * args.panel_planes + plane) * kPlaneBytes + lane * kPiece;
    to += Memory::kWeights + (first * kPanelPieces + lane) * kPiece;
#pragma unroll
    for (int i = 0; i < kCopies; ++i) {
      const int panel = (i * kLanes + lane) / kPanelPieces;
      const int past = (i * kLanes + lane) % kPanelPieces / (kPlaneBytes / kPiece);
      if (tile_panel + first + panel >= args.panels || past >= planes_left) continue;
      const int past_panels = panel * (args.panel_planes - kChunkPlanes<Bits>)*kPlaneBytes;
      copy_16_bytes(to + i * kLanes * kPiece, from + i * kLanes * kPiece + past_panels);
    }
  }

  // The first threads copy scales, the next ones offsets or zeros.
  LLMPQ_DEVICE void load_groups(uint8_t* to) const {
    constexpr int scale_pieces = 2 * kGroupRows;
    const int thread = static_cast<int>(threadIdx.x);
    const bool scales = thread < scale_pieces, halves = scales || HasOffsets;
    const void* source = scales ? args.scales : HasOffsets ? args.offsets : args.zeros;
    const int i = scales ? thread : thread - scale_pieces, row = halves ? i / 2 : i;
    const int panel = tile_panel + row / Memory::kFlushes, bytes = halves ? 2 * kPanel : kPanel;
    if (source == nullptr || row >= kGroupRows || panel >= args.panels) return;
    // Beyond k there is no group, but the sum there, 0, is multiplied by a scale all the same.
    const int block = chunk * kChunkBlocks + row % Memory::kFlushes * FlushBlocks;
    const int group = min(block >> args.group_shift, args.num_groups - 1);
    copy_16_bytes(to + (scales ? Memory::kScales : Memory::kZeros) + i * kPiece,
                  static_cast<const uint8_t*>(source) + (int64_t{panel} * args.num_groups + group) * bytes +
                      (halves ? i % 2 * kPiece : 0));
  }

  LLMPQ_DEVICE void load_x(uint8_t* to, int of_chunk) const {
    const int place = threadIdx.x * kPiece;
    const uint8_t* from = args.arranged + int64_t{of_chunk} * (kXPieces * kPiece) + place;
#pragma unroll
    for (int i = 0; i < kXPieces / kWideThreads; ++i) {
      copy_16_bytes(to + Memory::kX + place + i * kWideThreads * kPiece, from + i * kWideThreads * kPiece);
    }
    if (HasOffsets && threadIdx.x < kXSumPieces) {
      copy_16_bytes(to + Memory::kXSums + place,
                    reinterpret_cast<const uint8_t*>(args.x_sums) + int64_t{of_chunk} * (kXSumPieces * kPiece) + place);
    }
  }

  LLMPQ_DEVICE void advance() {
    if (++chunk < args.split.chunks) return;
    tile_panel += kWidePanels;
    chunk = 0;
  }

  const WideArgs& args;
  int chunk;       // of the tile
  int tile_panel;  // the tile's first
};

// What a thread does with the chunks of a tile.
template <int Bits, class X, int Columns, int FlushBlocks, bool HasOffsets>
class WideMultiplier {
  using Pair = typename PairOf<X>::type;
  using Memory = WideStage<Bits, Columns, FlushBlocks>;
  static constexpr int kSteps = Columns / kStepRows;
  static constexpr int kSets = Columns <= 64 ? 2 : 1;  // of sums: registers allow no more
  static constexpr int kBatchBlocks = FlushBlocks == 1 || Columns > 64 ? 1 : 2;
  static constexpr int kBatches = FlushBlocks / kBatchBlocks;  // of products for a set of sums
  // Whether sums are pending from one chunk to the next, so that products go on while the threads wait for it. Where
  // registers run short, ptxas would make one product after the other then, or use local memory.
  static constexpr bool kAcrossChunks = FlushBlocks > 1 && !HasOffsets && (Bits > 3 || Columns <= 64);
  using Sums = float[kSteps][4];
  using Totals = float[kWarpPanels][kSteps][4];

 public:
  Totals totals;

  LLMPQ_DEVICE explicit WideMultiplier(const WideArgs& arguments) : args(arguments) {}

  // Before the first chunk of a tile.
  LLMPQ_DEVICE void start() {
#pragma unroll
    for (int i = 0; i < kSteps * 4; ++i) {
#pragma unroll
      for (auto& total : totals) total[i / 4][i % 4] = 0.0f;
#pragma unroll
      for (auto& set : sums) set[i / 4][i % 4] = 0.0f;
    }
    scales[0] = scales[1] = 0.0f;
  }

  // totals += this warp's rows of a loaded chunk @ x.T, but for the sums of the second panel since the last flush: they
  // are pending until the next chunk's first are begun, or finish_chunks(), and the stage is read until then.
  LLMPQ_DEVICE void multiply(const uint8_t* stage) {
    const uint64_t x = matrix_in_shared(stage + Memory::kX, Columns * kCoreRow, kStepRows * kCoreRow);
#pragma unroll
    for (int flush = 0; flush < Memory::kFlushes; ++flush) {
#pragma unroll
      for (int p = 0; p < kWarpPanels; ++p) {
        Sums& set = sums[kSets == 1 ? 0 : p];
#pragma unroll
        for (int batch = 0; batch < kBatches; ++batch) {
          const int block = flush * FlushBlocks + batch * kBatchBlocks;
          auto& left = weights[((flush * kWarpPanels + p) * kBatches + batch) % 2];
          dequantize(stage, p, flush, block, left);
          const bool begins = batch == 0, first = begins && flush == 0 && p == 0;
          const bool pending = begins && (kAcrossChunks || !first);
          // Between chunks ptxas does not see that the sums which are in use are not those that are read.
          const bool drained = pending && (kSets == 1 || first);
          if (drained) {
            wait_for_products<0>();
            flush_pending(1 - p);
          }
          begin_products(left);
#pragma unroll
          for (int i = 0; i < kBatchBlocks * 2; ++i) {
            const uint64_t right = moved(x, (block * kOctets + i * 2) * Columns * kCoreRow);
            if (begins && i == 0) {
              set_product(set, left[i], right);
            } else {
              add_product(set, left[i], right);
            }
          }
          end_products();
          if (!drained) wait_for_products<1>();  // for the other left factors, and the sums before
          if (pending && !drained) flush_pending(1 - p);
          if (begins) load_groups(stage, p, flush);
        }
      }
    }
    if constexpr (!kAcrossChunks) flush_last();
  }

  // The pending sums, too.
  LLMPQ_DEVICE void finish_chunks() {
    if constexpr (kAcrossChunks) flush_last();
  }

  LLMPQ_DEVICE void flush_last() {
    wait_for_products<0>();
    flush_pending(1);
  }

 private:
  LLMPQ_DEVICE void dequantize(const uint8_t* stage, int p, int flush, int block, Pair (&left)[kBatchBlocks * 2][4]) const {
    const uint32_t* planes = reinterpret_cast<const uint32_t*>(stage + Memory::kWeights) +
                             (warp * kWarpPanels + p) * (kChunkPlanes<Bits> * kPlane);
#pragma unroll
    for (int half = 0; half < 2; ++half) {  // rows g and g + 8
      const int zero = HasOffsets ? 0
                       : args.zeros ? stage[Memory::kZeros + group_index(p, flush, half)]
                                    : kSymmetricZero<Bits>;
      const Shift<Bits, Pair> shift(zero);
#pragma unroll
      for (int i = 0; i < kBatchBlocks; ++i) {
        Pair pairs[kOctet / 2];
        shift.dequantize(load_octet<Bits>(planes, block + i, half * kLanes + lane), pairs);
        left[2 * i][half] = pairs[0];
        left[2 * i][half + 2] = pairs[1];
        left[2 * i + 1][half] = pairs[2];
        left[2 * i + 1][half + 2] = pairs[3];
      }
    }
  }

  // What the sums that are begun are to be multiplied by.
  LLMPQ_DEVICE void load_groups(const uint8_t* stage, int p, int flush) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int index = group_index(p, flush, half);
      scales[half] = load_scale(stage + Memory::kScales, args.scale_dtype, index);
      if constexpr (HasOffsets) offsets[half] = load_scale(stage + Memory::kZeros, args.scale_dtype, index);
    }
    x_sums = sums_of_x(stage, flush);
  }

  // Adds the sums that were begun last to the totals of panel p.
  LLMPQ_DEVICE void flush_pending(int p) {
    Sums& set = sums[kSets == 1 ? 0 : p];
    use_sums(set);
    if constexpr (HasOffsets) {
#pragma unroll
      for (int step = 0; step < kSteps; ++step) {
        const float2 both = *reinterpret_cast<const float2*>(x_sums + step * kStepRows);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          float& total = totals[p][step][i];
          total = fmaf(offsets[i / 2], i % 2 ? both.y : both.x, total);
        }
      }
    }
#pragma unroll
    for (int i = 0; i < kSteps * 4; ++i) {
      float& total = totals[p][i / 4][i % 4];
      total = fmaf(scales[i % 4 / 2], set[i / 4][i % 4], total);
    }
  }

  // Those of the columns of k between flushes, for this thread's first row of x.
  LLMPQ_DEVICE const float* sums_of_x(const uint8_t* stage, int flush) const {
    return reinterpret_cast<const float*>(stage + Memory::kXSums) + flush * Columns + lane % kOctets * 2;
  }

  // Where the scale and the zero of row g or g + 8 of a panel are in a stage.
  LLMPQ_DEVICE int group_index(int p, int flush, int half) const {
    return ((warp * kWarpPanels + p) * Memory::kFlushes + flush) * kPanel + half * (kPanel / 2) + lane / kOctets;
  }

  const WideArgs& args;
  const int lane = threadIdx.x % kLanes;
  const int warp = threadIdx.x / kLanes;
  Sums sums[kSets];
  Pair weights[2][kBatchBlocks * 2][4];

  // What the sums that were begun last are to be multiplied by.
  float scales[2], offsets[2];  // of rows g and g + 8
  const float* x_sums;          // of this thread's first column
};

template <int Bits, class X, int Columns, int FlushBlocks, bool HasOffsets>
__global__ void __launch_bounds__(kWideThreads, 1) wide_kernel(const WideArgs args) {
#ifdef LLMPQ_HAS_WGMMA
  using Memory = WideStage<Bits, Columns, FlushBlocks>;
  using Loader = WideLoader<Bits, Columns, FlushBlocks, HasOffsets>;
  let_next_grid_begin();
  const Deal deal{args.split};
  const int begin = deal.begin(blockIdx.x), end = deal.begin(blockIdx.x + 1), chunks = args.split.chunks;
  int tile = deal.tile(begin);
  WideMultiplier<Bits, X, Columns, FlushBlocks, HasOffsets> multiplier(args);
  const Ending<X, Columns / kStepRows, kWideWarps> ending{args};
  Loader loader(args, tile, begin - tile * chunks);
  loader.begin(end - begin);

  int stage = 0;
  for (int index = begin; index < end; ++tile) {
    const int tile_end = min((tile + 1) * chunks, end);
    multiplier.start();
    for (; index < tile_end; ++index) {
      wait_for_copies<Loader::kAhead - 1>();
      show_to_products();
      sync_block();  // everyone's copies are done, and everyone's products with the stage that is loaded next
      loader.next(stage < 2 ? stage + Loader::kAhead : stage - 2, index + Loader::kAhead < end);
      sync_warp();
      multiplier.multiply(shared_memory() + stage * Memory::kBytes);
      stage = stage + 1 == Memory::kCount ? 0 : stage + 1;
    }
    multiplier.finish_chunks();
    ending.finish(deal, tile, multiplier.totals);
  }
#endif
}

}  // namespace llmpq

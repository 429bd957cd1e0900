// How the tensor-core kernel's chunks (mma.cuh) are dealt out to thread blocks and come to shared memory.
#pragma once

#include "cuda/dequant.cuh"
#include "cuda/gemm.cuh"

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

}  // namespace llmpq

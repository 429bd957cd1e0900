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

// How many blocks of a kernel an SM is to hold at once: the sums of many rows need registers. Of the fewest rows, it is
// one more than work is dealt to, which the next kernel may begin with.
template <int Steps, int FlushBlocks>
constexpr int kResidentBlocks = Steps == 1 ? 5 : Steps == 2 ? 4 : Steps == 4 && FlushBlocks > 1 ? 3 : 2;

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
// not kept. Addresses are those of a tile's first chunk, and the chunk's number gives the rest.
template <int Bits, int Steps, int FlushBlocks, bool HasOffsets>
class Loader {
  using Memory = Stage<Bits, Steps, FlushBlocks>;
  static constexpr int kPlaneBytes = kPlane * 4;
  static constexpr int kRowPieces = kChunk / kOctet;                 // of a row of x
  static constexpr int kGroupRows = kTilePanels * Memory::kFlushes;  // of 16 scales, zeros or offsets
  static constexpr int kNever = 1 << 30;
  static_assert(kLanes == kWarpPanels * kPanel, "a lane copies a row of each plane: a warp copies what it multiplies");
  static_assert(kThreads == kStepRows * kRowPieces && 4 * kGroupRows <= kThreads, "a thread copies one piece of each");

 public:
  static constexpr int kAhead = Memory::kCount - 1;  // chunks on their way while one is multiplied

  // The first chunk to copy is chunk `first` of the tile.
  LLMPQ_DEVICE Loader(const CudaGemmArgs& arguments, int tile, int first) : args(arguments), chunk(first) {
    const int warp = threadIdx.x / kLanes, lane = threadIdx.x % kLanes;
    own_panel = kept(warp * kWarpPanels + lane / kPanel);
    weights = static_cast<const uint8_t*>(args.qweight) + lane % kPanel * kPiece +
              int64_t{tile * kTilePanels + own_panel} * (args.panel_planes * kPlaneBytes);
    start = shared_address(shared_memory());
    weights_place = kept(start + Memory::kWeights + own_panel * kChunkPlanes<Bits> * kPlaneBytes + lane % kPanel * kPiece);
    enter_tile(args.panels - tile * kTilePanels);
  }

  // Begin with the first chunks, or as many as there are: what is of the weight comes as the rest does, x is there when
  // this returns, so that none of the weight is waited for longer than it takes. Whatever is not needed for the first
  // copies comes after them.
  LLMPQ_DEVICE void begin(int count) {
    int at = chunk;
    for (int i = 0; i < kAhead; ++i) {
      if (i == 0 || i < count) {  // every block has a chunk
        load_weights(i * Memory::kBytes);
        if (i == 0) {
          if (count < 1) return;  // never: it has the compiler leave what follows behind the first copies
          find_groups();
        }
        load_groups(i * Memory::kBytes);
        advance();
      }
      end_copy_batch();
    }
    wait_for_grids_before();  // but for the weight, nothing was read before, and nothing written
    find_x();
    uint4 pieces[kAhead][Steps];
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
#pragma unroll
      for (int step = 0; step < Steps; ++step) {
        pieces[i][step] = load_16_bytes(x_of(at, step), i < count && has_x(at, step));
      }
      at = at + 1 == args.split.chunks ? 0 : at + 1;
    }
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
#pragma unroll
      for (int step = 0; step < Steps; ++step) {
        *reinterpret_cast<uint4*>(shared_memory() + i * Memory::kBytes + x_place + step * kLanes * kPiece) = pieces[i][step];
      }
    }
  }

  // Begin to copy the next chunk to the stage at `to`, or nothing if there is none: the number of batches to wait for
  // stays the same.
  LLMPQ_DEVICE void next(int to, bool wanted) {
    if (wanted) {
      load_weights(to);
      load_groups(to);
#pragma unroll
      for (int step = 0; step < Steps; ++step) {
        copy_16_bytes(start + to + x_place + step * kLanes * kPiece, x_of(chunk, step), has_x(chunk, step));
      }
      advance();
    }
    end_copy_batch();
  }

 private:
  LLMPQ_DEVICE void enter_tile(int panels_from_here) {
    panels_left = panels_from_here;
    own_planes = own_panel < panels_left ? args.panel_planes : 0;
  }

  // The first threads copy scales, the next ones offsets or zeros.
  LLMPQ_DEVICE void find_groups() {
    constexpr unsigned scale_pieces = 2 * kGroupRows;
    const bool scales = threadIdx.x < scale_pieces, halves = scales || HasOffsets;
    const unsigned i = threadIdx.x - (scales ? 0 : scale_pieces), group_row = halves ? i / 2 : i;
    const void* source = scales ? args.scales : HasOffsets ? args.offsets : args.zeros;
    const int panel = group_row / Memory::kFlushes;
    group_bytes = kept(halves ? 2 * kPanel : kPanel);
    groups = static_cast<const uint8_t*>(source) + (halves ? i % 2 * kPiece : 0) +
             int64_t{args.panels - panels_left + panel} * (args.num_groups * group_bytes);
    groups_place = kept(start + (scales ? Memory::kScales : Memory::kZeros) + i * kPiece);
    group_block = kept(group_row % Memory::kFlushes * FlushBlocks);
    group_panel = kept(group_row < kGroupRows && source != nullptr ? panel : kNever);
  }

  LLMPQ_DEVICE void find_x() {
    const int row = threadIdx.x / kRowPieces, octet = threadIdx.x % kRowPieces;
    x = kept(static_cast<const uint8_t*>(args.x) + (row * args.x_stride + octet * kOctet) * 2);
    x_place = kept(Memory::kX + (octet / kOctets * Steps * kLanes + row * kOctets + octet % kOctets) * kPiece);
    rows_left = static_cast<int>(args.m) - row;
    x_chunks = kept(rows_left > 0 ? (static_cast<int>(args.k) - octet * kOctet + kChunk - 1) / kChunk : 0);
  }

  LLMPQ_DEVICE const uint8_t* x_of(int of_chunk, int step) const {
    return x + int64_t{of_chunk} * (kChunk * 2) + step * kStepRows * args.x_stride * 2;
  }

  LLMPQ_DEVICE bool has_x(int of_chunk, int step) const {
    return of_chunk < x_chunks && (step == 0 || step * kStepRows < rows_left);
  }

  LLMPQ_DEVICE void load_weights(int to) const {
    const uint8_t* from = kept(weights + int64_t{chunk} * (kChunkPlanes<Bits> * kPlaneBytes));
    const SharedAddress at = kept(weights_place + to);
    const int planes_left = own_planes - chunk * kChunkPlanes<Bits>;
#pragma unroll
    for (int plane = 0; plane < kChunkPlanes<Bits>; ++plane) {
      constexpr int together = Bits == 8 ? 2 : 1;  // planes of a block: there are both, or neither
      if (planes_left <= plane / together * together) continue;
      copy_16_bytes(at + plane * kPlaneBytes, from + plane * kPlaneBytes);
    }
  }

  LLMPQ_DEVICE void load_groups(int to) const {
    if (group_panel >= panels_left) return;
    int group = (chunk * kChunkBlocks + group_block) >> args.group_shift;
    // Beyond k there is no group, but the sum there, 0, is multiplied by a scale all the same.
    if (FlushBlocks < kChunkBlocks) group = min(group, args.num_groups - 1);
    copy_16_bytes(groups_place + to, groups + int64_t{group} * kept(group_bytes));
  }

  LLMPQ_DEVICE void advance() {
    if (++chunk < args.split.chunks) return;
    chunk = 0;
    weights += int64_t{kTilePanels * kPlaneBytes} * args.panel_planes;
    groups += int64_t{kTilePanels * args.num_groups} * group_bytes;
    enter_tile(panels_left - kTilePanels);
  }

  const CudaGemmArgs& args;
  int chunk;        // of the tile, the next to copy
  int panels_left;  // from the tile's first on

  SharedAddress start;  // of the stages

  // Where this thread's first piece of a tile comes from and goes to in the first stage, and how much there is.
  const uint8_t* weights;
  SharedAddress weights_place, groups_place;
  int own_panel, own_planes;
  const uint8_t* x;
  int x_place, rows_left, x_chunks;
  const uint8_t* groups;
  int group_bytes, group_panel, group_block;
};

}  // namespace llmpq

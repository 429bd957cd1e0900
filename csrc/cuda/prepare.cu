// What a product needs that does not depend on x, such as how its chunks are split among blocks. It is computed once for
// each weight; calls and kernels only read it.
#include <algorithm>
#include <climits>
#include <cstdlib>
#include <cstring>

#include "cuda/wgmma.cuh"

namespace llmpq {
namespace {

constexpr int kUsefulChunks = 4;  // of a block: with fewer, more is spent on adding parts than is gained
constexpr int kMaxParts = 16;     // of a tile, which one block adds
constexpr int kMaxWideParts = 8;  // of one of 256 rows: a part takes as long to add as a chunk to multiply

// For n < 2^31, n / d == n * multiplier >> (31 + shift): with 2^shift >= d, what the multiplier is rounded up by adds
// less than 1 / d to the quotient. It has 32 bits, since 2^shift < 2 d.
Divisor divisor(int d) {
  int shift = 0;
  while ((int64_t{1} << shift) < d) ++shift;
  const int64_t power = int64_t{1} << (31 + shift);
  return {static_cast<uint32_t>((power + d - 1) / d), shift};
}

// How at most `most` blocks share the chunks of a product.
Split split(int64_t tiles, int chunks, int64_t most) {
  const int64_t units = tiles * chunks;
  Split found{};
  found.blocks = static_cast<int>(std::min({units, most, tiles * kMaxParts}));
  found.chunks = chunks;
  found.least = static_cast<int>(units / found.blocks);
  found.more = static_cast<int>(units % found.blocks);
  found.by_chunks = divisor(chunks);
  found.by_least = divisor(found.least);
  found.by_most = divisor(found.least + 1);
  return found;
}

// Whether products of warpgroups were compiled for this GPU (CMakeLists.txt), and nobody is measuring without them.
bool has_wide(const Processor& processor) {
#ifdef LLMPQ_WGMMA
  static const char* unwanted = std::getenv("LLMPQ_NO_WGMMA");
  constexpr int bytes = 227 * 1024;  // which all GPUs of this capability have
  return processor.capability == 90 && processor.shared_bytes >= bytes && (!unwanted || std::strcmp(unwanted, "1") != 0);
#else
  (void)processor;
  return false;
#endif
}

}  // namespace

cudaError_t prepare(CudaGemmArgs& args, int device, Processor& processor) {
  if (device < 0 || device >= kMaxDevices) return cudaErrorInvalidDevice;
  int major = 0, minor = 0;
  const auto attribute = [&](cudaDeviceAttr name, int& value) { return cudaDeviceGetAttribute(&value, name, device); };
  for (const cudaError_t error : {
           attribute(cudaDevAttrComputeCapabilityMajor, major),
           attribute(cudaDevAttrComputeCapabilityMinor, minor),
           attribute(cudaDevAttrMultiProcessorCount, processor.count),
           attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, processor.shared_bytes),
       }) {
    if (error != cudaSuccess) return error;
  }
  processor.device = device;
  processor.capability = 10 * major + minor;

  const int64_t tiles = (args.n + kTileRows - 1) / kTileRows, chunks = (args.k + kChunk - 1) / kChunk;
  if (tiles * chunks > INT_MAX / 8) return cudaErrorInvalidValue;
  args.group_shift = 0;
  while (args.group_size < args.k && (kBlock << args.group_shift) < args.group_size) ++args.group_shift;
  if (args.group_size >= args.k) args.group_shift = 31;  // the whole row is one group
  args.num_groups = static_cast<int>((args.k + args.group_size - 1) / args.group_size);
  args.panels = static_cast<int>((args.n + kPanel - 1) / kPanel);
  args.panel_planes = num_planes(args.bits, args.k);
  // A function of the weight and the GPU, not of m. A small weight keeps every SM busy first.
  const int64_t useful = std::max<int64_t>(tiles * chunks / kUsefulChunks, processor.count);
  const int64_t resident = int64_t{processor.count} * kBlocksPerProcessor;
  args.split = split(tiles, static_cast<int>(chunks), std::min(useful, resident));
  args.wide = {};
  if (has_wide(processor)) {
    const int64_t wide_tiles = (args.n + kWideRows - 1) / kWideRows;
    // As many blocks for each tile leave fewer parts of it, which is worth a tenth of the multiprocessors.
    const int64_t whole = processor.count / wide_tiles * wide_tiles;
    const int64_t most = 10 * whole >= 9 * processor.count ? whole : processor.count;
    args.wide = split(wide_tiles, static_cast<int>(chunks), std::min(most, wide_tiles * kMaxWideParts));
  }
  return cudaSuccess;
}

// Each block leaves at most two parts of a tile: 128 x 64 totals, or fewer where m is small. The kernel for more rows has
// fewer blocks and larger parts, and x in another order.
int64_t workspace_bytes(const CudaGemmArgs& args, int64_t m) {
  constexpr auto size = static_cast<int64_t>(sizeof(float));
  int64_t rows = kStepRows;
  while (rows < m && rows < kMaxSteps<kChunkBlocks, false> * kStepRows) rows *= 2;
  const int64_t bytes = 2 * args.split.blocks * kTileRows * rows * size;
  if (args.wide.blocks == 0 || m <= kLeastWideRows) return bytes;
  const int64_t columns = m <= 32 ? 32 : m <= 64 ? 64 : kMostColumns;
  return std::max(bytes, arranged_bytes(args.k) + x_sum_bytes(args.k) + 2 * args.wide.blocks * kWideRows * columns * size);
}

}  // namespace llmpq

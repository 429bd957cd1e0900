#include "cuda/launch.cuh"

// Each block leaves at most two parts of a tile: 128 x 64 totals, or fewer where m is small.
cudaError_t llmpq::workspace_bytes(const GemmArgs& args, int device, int64_t& bytes) {
  Processor processor{};
  if (const cudaError_t error = Processor::of(device, processor); error != cudaSuccess) return error;
  int64_t rows = kStepRows;
  while (rows < args.m && rows < kMaxSteps<kChunkBlocks, false> * kStepRows) rows *= 2;
  bytes = 2 * tile_blocks(args, processor) * kTileRows * rows * static_cast<int64_t>(sizeof(float));
  return cudaSuccess;
}

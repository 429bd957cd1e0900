// All that bindings_cuda.cpp sees of the CUDA kernels.
#pragma once

#include <cuda_runtime_api.h>

#include "gemm.h"

namespace llmpq {

constexpr int kTileRows = 128;
constexpr int kMaxDevices = 64;

// A divisor that the host knows: the kernel's quotients are a multiplication.
struct Divisor {
  uint32_t multiplier;
  int shift;
};

// Which thread block takes which chunks of the tiles (mma.cuh), numbered tile by tile. Block after block takes `least` of
// them, the first `more` blocks one more.
struct Split {
  int blocks;
  int chunks;  // of a tile
  int least, more;
  Divisor by_chunks, by_least, by_most;  // by `chunks`, `least` and `least` + 1
};

// A product on a GPU. Its weight is in the layout of llmpq/kernels/backends/gpu_layout.py; all pointers are on one device.
struct CudaGemmArgs : GemmArgs {
  int64_t residual_stride;
  float* workspace;    // workspace_bytes() of scratch memory; its contents do not matter
  unsigned* counters;  // one for every kTileRows rows of the weight; 0, and 0 again when the product is done
  bool early;          // may begin while what is queued before it runs: the weight was there before that began
  bool invariant;      // the bits of a row of y are not to depend on m
  int group_shift;     // this and what follows are set by prepare()
  int num_groups;      // of a row
  int panels, panel_planes;  // of 16 rows, and words x 64 of each (dequant.cuh)
  Split split;
  Split wide;  // of the larger tiles that wgmma.cuh has; no blocks: it has nothing for this GPU
};

// What a GPU has that decides on the kernel.
struct Processor {
  int device;
  int capability;  // 10 * major + minor
  int count;       // of multiprocessors
  int shared_bytes;

  // Turing's tensor cores know float16 only; Volta's take other shapes than ptx.cuh has.
  bool has_tensor_cores(Dtype dtype) const {
    return dtype == Dtype::kFloat16 ? capability >= 75 : dtype == Dtype::kBFloat16 && capability >= 80;
  }
};

// Looks up what `processor` is, and sets what does not depend on x: args has n, k, bits and group_size. A weight
// has less than 2^28 chunks of 128 x 128.
cudaError_t prepare(CudaGemmArgs& args, int device, Processor& processor);

// Bytes of scratch memory that gemm_cuda needs for m rows of x.
int64_t workspace_bytes(const CudaGemmArgs& args, int64_t m);

// Queues y = x @ w.T + bias + residual, rounded before the residual is added and after, on `stream` of the processor's
// device, and makes that the thread's current one, as does the next. args.bits == Bits; k < 2^26; group_size is 32, 64,
// 128, 256, or k for the whole row.
template <int Bits>
cudaError_t gemm_cuda(const CudaGemmArgs& args, const Processor& processor, cudaStream_t stream);

// Queues the dequantization of args.m rows from `first_row` on, a multiple of 16, to y [m, k]: contiguous, of x_dtype, at
// a multiple of 16 bytes.
template <int Bits>
cudaError_t dequantize_cuda(const CudaGemmArgs& args, int64_t first_row, const Processor& processor,
                            cudaStream_t stream);

}  // namespace llmpq

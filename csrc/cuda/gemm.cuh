// All that bindings_cuda.cpp sees of the CUDA kernels.
#pragma once

#include <cuda_runtime_api.h>

#include "gemm.h"

namespace llmpq {

// A product on a GPU. Its weight is in the layout of llmpq/kernels/backends/gpu_layout.py; all pointers are on one device.
struct CudaGemmArgs : GemmArgs {
  float* workspace;    // workspace_bytes() of scratch memory; its contents do not matter
  unsigned* counters;  // one for every kTileRows rows of the weight; 0, and 0 again when the product is done
  int group_shift;     // set by gemm_cuda, as the next
  int blocks;
};

constexpr int kTileRows = 128;

// Queues y = x @ w.T + bias on `stream` of `device`, and makes `device` the thread's current one, as the others here do.
// args.bits == Bits; k < 2^26; group_size is 32, 64, 128, 256, or k for the whole row.
template <int Bits>
cudaError_t gemm_cuda(const CudaGemmArgs& args, int device, cudaStream_t stream);

// Bytes of scratch memory that gemm_cuda needs for args.m, n and k.
cudaError_t workspace_bytes(const GemmArgs& args, int device, int64_t& bytes);

// Queues the dequantization of args.m rows from `first_row` on, a multiple of 16, to y [m, k]: contiguous, of x_dtype, at
// a multiple of 16 bytes.
template <int Bits>
cudaError_t dequantize_cuda(const CudaGemmArgs& args, int64_t first_row, int device, cudaStream_t stream);

}  // namespace llmpq

// All that bindings_cuda.cpp sees of the CUDA kernels.
#pragma once

#include <cuda_runtime_api.h>

#include "gemm.h"

namespace llmpq {

// Queues y = x @ w.T + bias on `stream` of `device`, and makes `device` the thread's current one.
// All pointers are on that device and 4-byte aligned at least; args.bits == Bits; k < 2^31 - 256.
template <int Bits>
cudaError_t gemm_cuda(const GemmArgs& args, int device, cudaStream_t stream);

}  // namespace llmpq

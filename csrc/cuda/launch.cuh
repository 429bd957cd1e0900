// Defines gemm_cuda: from the run-time arguments to the instantiation that handles them.
#pragma once

#include <cuda_runtime.h>

#include <climits>

#include "cuda/gemm.cuh"
#include "cuda/gemv.cuh"

namespace llmpq {

template <int Bits, class X, int Rows>
cudaError_t launch(GemmArgs args, cudaStream_t stream) {
  constexpr int64_t columns = kWarps * kColumns;
  const int64_t blocks = (args.m + Rows - 1) / Rows * ((args.n + columns - 1) / columns);
  if (blocks > INT_MAX) return cudaErrorInvalidConfiguration;
  void* parameters[] = {&args};
  return cudaLaunchKernel(reinterpret_cast<const void*>(&gemm_kernel<Bits, X, Rows>),
                          dim3(static_cast<unsigned>(blocks)), dim3(kWarps * kLanes), parameters, 0, stream);
}

// The row tile only decides how often the weights are read; the sums are the same.
template <int Bits, class X>
cudaError_t launch_for_rows(const GemmArgs& args, cudaStream_t stream) {
  if (args.m == 1) return launch<Bits, X, 1>(args, stream);
  if (args.m == 2) return launch<Bits, X, 2>(args, stream);
  if (args.m <= 4) return launch<Bits, X, 4>(args, stream);
  return launch<Bits, X, 8>(args, stream);
}

template <int Bits>
cudaError_t gemm_cuda(const GemmArgs& args, int device, cudaStream_t stream) {
  if (args.m == 0 || args.n == 0) return cudaSuccess;
  if (const cudaError_t error = cudaSetDevice(device); error != cudaSuccess) return error;
  switch (args.x_dtype) {
    case Dtype::kFloat32:
      return launch_for_rows<Bits, float>(args, stream);
    case Dtype::kFloat16:
      return launch_for_rows<Bits, __half>(args, stream);
    case Dtype::kBFloat16:
      return launch_for_rows<Bits, __nv_bfloat16>(args, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace llmpq

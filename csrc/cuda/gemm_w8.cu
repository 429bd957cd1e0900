#include "cuda/launch.cuh"

template cudaError_t llmpq::gemm_cuda<8>(const CudaGemmArgs&, const Processor&, cudaStream_t);
template cudaError_t llmpq::dequantize_cuda<8>(const CudaGemmArgs&, int64_t, const Processor&, cudaStream_t);

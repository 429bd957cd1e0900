#include "cuda/launch.cuh"

template cudaError_t llmpq::gemm_cuda<4>(const GemmArgs&, int, cudaStream_t);

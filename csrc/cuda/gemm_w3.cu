#include "cuda/launch.cuh"

template cudaError_t llmpq::gemm_cuda<3>(const GemmArgs&, int, cudaStream_t);

#include "cuda/launch.cuh"

template cudaError_t llmpq::gemm_cuda<8>(const GemmArgs&, int, cudaStream_t);

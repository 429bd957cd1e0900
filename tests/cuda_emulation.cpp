// Runs the CUDA kernels on the host: the same source and the same launch, one warp at a time.
//
// The 32 lanes of a warp are coroutines that take turns. They hand over at each shuffle, so when a lane goes on, all
// lanes have reached that shuffle: what a warp does in lockstep. The kernels share no memory between warps.
#include <cuda_runtime.h>
#include <ucontext.h>

#include <vector>

namespace emulation {

constexpr int kLanes = 32;
constexpr size_t kStackBytes = 1 << 16;

struct Lane {
  ucontext_t context;
  std::vector<char> stack = std::vector<char>(kStackBytes);
  bool done;
};

Lane lanes[kLanes];
float exchanged[kLanes];
ucontext_t scheduler;
int current;
uint3 thread_index, block_index;
void (*entry)(void*);
void* parameters;

void run_lane() {
  entry(parameters);
  lanes[current].done = true;
}

void hand_over() { swapcontext(&lanes[current].context, &scheduler); }

float shuffle_xor(float value, int distance) {
  const int lane = current;
  exchanged[lane] = value;
  hand_over();
  const float result = exchanged[lane ^ distance];
  hand_over();
  return result;
}

void run_warp(unsigned first_thread) {
  for (Lane& lane : lanes) {
    getcontext(&lane.context);
    lane.context.uc_stack.ss_sp = lane.stack.data();
    lane.context.uc_stack.ss_size = kStackBytes;
    lane.context.uc_link = &scheduler;
    lane.done = false;
    makecontext(&lane.context, run_lane, 0);
  }
  for (bool running = true; running;) {
    running = false;
    for (current = 0; current < kLanes; ++current) {
      if (lanes[current].done) continue;
      thread_index.x = first_thread + current;
      swapcontext(&scheduler, &lanes[current].context);
      running = true;
    }
  }
}

}  // namespace emulation

#define __launch_bounds__(threads)
#define threadIdx emulation::thread_index
#define blockIdx emulation::block_index
#define __shfl_xor_sync(mask, value, distance) emulation::shuffle_xor(value, distance)

#include "cuda/launch.cuh"

extern "C" cudaError_t cudaSetDevice(int) { return cudaSuccess; }

extern "C" cudaError_t cudaLaunchKernel(const void* kernel, dim3 blocks, dim3 threads, void** arguments, size_t,
                                        cudaStream_t) {
  static const void* launched;
  launched = kernel;
  emulation::parameters = arguments[0];
  emulation::entry = [](void* argument) {
    reinterpret_cast<void (*)(llmpq::GemmArgs)>(const_cast<void*>(launched))(*static_cast<llmpq::GemmArgs*>(argument));
  };
  for (unsigned block = 0; block < blocks.x; ++block) {
    emulation::block_index.x = block;
    for (unsigned thread = 0; thread < threads.x; thread += emulation::kLanes) emulation::run_warp(thread);
  }
  return cudaSuccess;
}

// The arguments of llmpq._cuda.gemm that matter here. Returns a cudaError_t.
extern "C" int gemm(const void* x, const void* qweight, const void* scales, const void* zeros, const void* bias,
                    void* y, int64_t m, int64_t n, int64_t k, int64_t x_stride, int64_t y_stride, int64_t group_size,
                    int bits, int x_dtype, int scale_dtype) {
  llmpq::GemmArgs args{};
  args.x = x;
  args.qweight = qweight;
  args.scales = scales;
  args.zeros = zeros;
  args.bias = bias;
  args.y = y;
  args.m = m;
  args.n = n;
  args.k = k;
  args.x_stride = x_stride;
  args.y_stride = y_stride;
  args.group_size = group_size;
  args.bits = bits;
  args.x_dtype = static_cast<llmpq::Dtype>(x_dtype);
  args.scale_dtype = static_cast<llmpq::Dtype>(scale_dtype);
  if (bits == 3) return llmpq::gemm_cuda<3>(args, 0, nullptr);
  if (bits == 4) return llmpq::gemm_cuda<4>(args, 0, nullptr);
  return llmpq::gemm_cuda<8>(args, 0, nullptr);
}

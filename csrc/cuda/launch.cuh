// Defines what gemm.cuh declares: from the run-time arguments to the instantiation that handles them.
#pragma once

#include <atomic>
#include <climits>
#include <cstdlib>

#include "cuda/dequantize.cuh"
#include "cuda/fma.cuh"
#include "cuda/mma.cuh"
#include "cuda/wgmma.cuh"

namespace llmpq {

// ---- tensor cores

// LLMPQ_NO_PDL=1: each kernel begins when all before it have ended.
inline bool may_begin_early() {
  static const char* const no = std::getenv("LLMPQ_NO_PDL");
  return no == nullptr || *no != '1';
}

// What is done and looked up once for a kernel on each device.
struct Readiness {
  std::atomic<uint64_t> ready{0}, waits{0};  // a bit for each device; waits: the code there does

  // early: whether the kernel may begin early, as far as it and the processor go.
  template <class Args>
  cudaError_t find(void (*kernel)(Args), int bytes, const Processor& processor, bool& early) {
    const uint64_t device = uint64_t{1} << processor.device;
    if (!(ready & device)) {
      int architecture = 0;
      if (const cudaError_t error = make_ready(kernel, bytes, architecture); error != cudaSuccess) return error;
      if (architecture >= 90) waits |= device;
      ready |= device;
    }
    early = processor.capability >= 90 && (waits & device) && may_begin_early();
    return cudaSuccess;
  }
};

// Queues a kernel that takes up to 8 Steps rows of x for the product of the first `rows`: as many as it takes, or all.
template <int Bits, int Steps, int FlushBlocks>
cudaError_t launch_few(void (*kernel)(CudaGemmArgs), Readiness& readiness, const CudaGemmArgs& args,
                       const Processor& processor, cudaStream_t stream, int64_t& rows) {
  using Memory = Stage<Bits, Steps, FlushBlocks>;
  constexpr int bytes = Memory::kCount * Memory::kBytes;
  bool early = false;
  if (const cudaError_t error = readiness.find(kernel, bytes, processor, early); error != cudaSuccess) return error;
  CudaGemmArgs part = args;
  part.m = rows = args.m < Steps * kStepRows ? args.m : Steps * kStepRows;
  // For up to 8 rows it does not pay: on an H200 the first copies of a product get in the way of the equal one before it,
  // and 28672 x 8192 at 4 bits takes 51 us instead of 42. For 16 rows it takes 52 instead of 54.
  early = early && args.early && Steps > 1;
  return launch(kernel, part, {static_cast<unsigned>(args.split.blocks), kThreads, bytes, early}, stream);
}

template <int Bits, class X, int Steps, int FlushBlocks, bool HasOffsets>
cudaError_t launch_tile(const CudaGemmArgs& args, const Processor& processor, cudaStream_t stream, int64_t& rows) {
  using Memory = Stage<Bits, Steps, FlushBlocks>;
  constexpr int bytes = Memory::kCount * Memory::kBytes;
  if constexpr (Steps > 1) {
    if (bytes > processor.shared_bytes || args.m <= Steps * kStepRows / 2) {
      return launch_tile<Bits, X, Steps / 2, FlushBlocks, HasOffsets>(args, processor, stream, rows);
    }
  }
  static Readiness readiness;
  return launch_few<Bits, Steps, FlushBlocks>(&tile_kernel<Bits, X, Steps, FlushBlocks, HasOffsets>, readiness, args,
                                              processor, stream, rows);
}

template <int Bits, class X, int FlushBlocks, bool HasOffsets>
cudaError_t launch_tiles(CudaGemmArgs args, const Processor& processor, cudaStream_t stream) {
  for (int64_t rows = 0; args.m > 0; args.m -= rows) {
    constexpr int steps = kMaxSteps<FlushBlocks, HasOffsets>;
    const cudaError_t error = launch_tile<Bits, X, steps, FlushBlocks, HasOffsets>(args, processor, stream, rows);
    if (error != cudaSuccess) return error;
    args.x = static_cast<const X*>(args.x) + rows * args.x_stride;
    args.early = true;  // the weight is an older one now
    if (args.residual) args.residual = static_cast<const X*>(args.residual) + rows * args.residual_stride;
    args.y = static_cast<X*>(args.y) + rows * args.y_stride;
  }
  return cudaSuccess;
}

// ---- products of warpgroups

template <int Bits, class X, int Columns, int FlushBlocks, bool HasOffsets>
cudaError_t launch_wide(WideArgs args, const Processor& processor, cudaStream_t stream) {
  using Memory = WideStage<Bits, Columns, FlushBlocks>;
  args.columns = Columns;
  constexpr int blocks = HasOffsets ? FlushBlocks : 1;  // that a thread takes: many threads wait for less
  const int64_t threads = (args.k + kChunk - 1) / kChunk * (kChunkBlocks / blocks) * Columns;
  const auto arrange_blocks = static_cast<unsigned>((threads + kArrangeThreads - 1) / kArrangeThreads);
  const auto arrange = &arrange_kernel<X, blocks>;
  const auto multiply = &wide_kernel<Bits, X, Columns, FlushBlocks, HasOffsets>;
  constexpr int bytes = Memory::kCount * Memory::kBytes;
  static Readiness arranges, multiplies;
  bool first_early = false, early = false;
  if (const cudaError_t error = arranges.find(arrange, 0, processor, first_early); error != cudaSuccess) return error;
  if (const cudaError_t error = multiplies.find(multiply, bytes, processor, early); error != cudaSuccess) return error;
  first_early = first_early && args.early;
  const cudaError_t error = launch(arrange, args, {arrange_blocks, kArrangeThreads, 0, first_early}, stream);
  if (error != cudaSuccess) return error;
  return launch(multiply, args, {static_cast<unsigned>(args.split.blocks), kWideThreads, bytes, early}, stream);
}

inline bool takes_wide(const CudaGemmArgs& args) {
  return args.wide.blocks > 0 && args.m > kLeastWideRows && !args.invariant;
}

template <int Bits, class X, int FlushBlocks, bool HasOffsets>
cudaError_t launch_wides(const CudaGemmArgs& given, const Processor& processor, cudaStream_t stream) {
  constexpr int most = kMaxColumns<FlushBlocks, HasOffsets>;
  WideArgs args{};
  static_cast<CudaGemmArgs&>(args) = given;
  args.split = given.wide;
  args.arranged = reinterpret_cast<uint8_t*>(given.workspace);
  args.x_sums = given.workspace + arranged_bytes(given.k) / static_cast<int64_t>(sizeof(float));
  args.workspace = args.x_sums + x_sum_bytes(given.k) / static_cast<int64_t>(sizeof(float));
  for (int64_t left = given.m; left > 0; left -= most) {
    args.m = left < most ? left : most;
    cudaError_t error = cudaSuccess;
    if (args.m <= 32) {
      error = launch_wide<Bits, X, 32, FlushBlocks, HasOffsets>(args, processor, stream);
    } else if (args.m <= 64) {
      error = launch_wide<Bits, X, 64, FlushBlocks, HasOffsets>(args, processor, stream);
    } else if constexpr (most > 64) {
      error = launch_wide<Bits, X, 128, FlushBlocks, HasOffsets>(args, processor, stream);
    }
    if (error != cudaSuccess) return error;
    args.early = true;
    args.x = static_cast<const X*>(args.x) + most * args.x_stride;
    args.y = static_cast<X*>(args.y) + most * args.y_stride;
    if (args.residual) args.residual = static_cast<const X*>(args.residual) + most * args.residual_stride;
  }
  return cudaSuccess;
}

// ---- codes that keep their base

// Where more rows go to another kernel, too: a row of x has the same bits in all products of up to kLeastWideRows rows.
inline bool takes_biased(const CudaGemmArgs& args, bool large_groups) {
  return large_groups && args.x_dtype == Dtype::kBFloat16 && args.wide.blocks > 0 && args.m <= kLeastWideRows &&
         !args.invariant;
}

template <int Bits, int Steps, bool HasOffsets>
cudaError_t launch_biased(const CudaGemmArgs& args, const Processor& processor, cudaStream_t stream) {
  static Readiness readiness;
  int64_t rows = 0;
  return launch_few<Bits, Steps, kChunkBlocks>(&biased_kernel<Bits, Steps, HasOffsets>, readiness, args, processor, stream,
                                               rows);
}

template <int Bits, bool HasOffsets>
cudaError_t launch_biased(const CudaGemmArgs& args, const Processor& processor, cudaStream_t stream) {
  static_assert(kLeastWideRows == 2 * kStepRows, "there are kernels for all m");
  return args.m <= kStepRows ? launch_biased<Bits, 1, HasOffsets>(args, processor, stream)
                             : launch_biased<Bits, 2, HasOffsets>(args, processor, stream);
}

// ---- fused multiply-adds

template <int Bits, class X, int Rows>
cudaError_t launch_fma(const CudaGemmArgs& args, cudaStream_t stream) {
  constexpr int64_t columns = kFmaWarps * kWarpColumns;
  const int64_t blocks = (args.m + Rows - 1) / Rows * ((args.n + columns - 1) / columns);
  if (blocks > INT_MAX) return cudaErrorInvalidConfiguration;
  const auto kernel = args.offsets ? &fma_kernel<Bits, X, Rows, true> : &fma_kernel<Bits, X, Rows, false>;
  return launch(kernel, args, {static_cast<unsigned>(blocks), kFmaWarps * kLanes}, stream);
}

// The row tile only decides how often the weights are read; the sums are the same.
template <int Bits, class X>
cudaError_t launch_fma(const CudaGemmArgs& args, cudaStream_t stream) {
  if (args.m == 1) return launch_fma<Bits, X, 1>(args, stream);
  if (args.m <= 4) return launch_fma<Bits, X, 4>(args, stream);
  return launch_fma<Bits, X, 8>(args, stream);
}

template <int Bits, class X>
cudaError_t launch_gemm(const CudaGemmArgs& args, const Processor& processor, cudaStream_t stream) {
  if constexpr (sizeof(X) == 2) {
    if (processor.has_tensor_cores(args.x_dtype)) {
      const bool large_groups = args.group_size >= kChunk || args.group_size >= args.k;
#ifdef LLMPQ_WGMMA
      if (takes_wide(args)) {
        if (args.offsets) {
          return large_groups ? launch_wides<Bits, X, kChunkBlocks, true>(args, processor, stream)
                              : launch_wides<Bits, X, 1, true>(args, processor, stream);
        }
        return large_groups ? launch_wides<Bits, X, kChunkBlocks, false>(args, processor, stream)
                            : launch_wides<Bits, X, 1, false>(args, processor, stream);
      }
      if (takes_biased(args, large_groups)) {
        return args.offsets ? launch_biased<Bits, true>(args, processor, stream)
                            : launch_biased<Bits, false>(args, processor, stream);
      }
#endif
      if (args.offsets) {
        return large_groups ? launch_tiles<Bits, X, kChunkBlocks, true>(args, processor, stream)
                            : launch_tiles<Bits, X, 1, true>(args, processor, stream);
      }
      return large_groups ? launch_tiles<Bits, X, kChunkBlocks, false>(args, processor, stream)
                          : launch_tiles<Bits, X, 1, false>(args, processor, stream);
    }
  }
  return launch_fma<Bits, X>(args, stream);
}

template <int Bits, class X>
cudaError_t launch_dequantize(const CudaGemmArgs& args, int64_t first_panel, cudaStream_t stream) {
  constexpr int64_t columns = kDequantizeBlocks * kBlock;
  const int64_t blocks = (args.m + kPanel - 1) / kPanel * ((args.k + columns - 1) / columns);
  if (blocks > INT_MAX) return cudaErrorInvalidConfiguration;
  const DequantizeArgs rows{args, first_panel};
  return launch(&dequantize_kernel<Bits, X>, rows, {static_cast<unsigned>(blocks), kDequantizeThreads}, stream);
}

// ---- the interface

// Calls use(X()) with the type of `dtype`.
template <class Use>
cudaError_t with_type(Dtype dtype, const Use& use) {
  switch (dtype) {
    case Dtype::kFloat32:
      return use(float());
    case Dtype::kFloat16:
      return use(__half());
    case Dtype::kBFloat16:
      return use(__nv_bfloat16());
  }
  return cudaErrorInvalidValue;
}

template <int Bits>
cudaError_t gemm_cuda(const CudaGemmArgs& args, const Processor& processor, cudaStream_t stream) {
  if (args.m == 0 || args.n == 0) return cudaSuccess;
  if (const cudaError_t error = cudaSetDevice(processor.device); error != cudaSuccess) return error;
  return with_type(args.x_dtype, [&](auto x) { return launch_gemm<Bits, decltype(x)>(args, processor, stream); });
}

template <int Bits>
cudaError_t dequantize_cuda(const CudaGemmArgs& args, int64_t first_row, const Processor& processor,
                            cudaStream_t stream) {
  if (args.m == 0) return cudaSuccess;
  if (const cudaError_t error = cudaSetDevice(processor.device); error != cudaSuccess) return error;
  return with_type(args.x_dtype,
                   [&](auto x) { return launch_dequantize<Bits, decltype(x)>(args, first_row / kPanel, stream); });
}

}  // namespace llmpq

// What the kernels need of the machine beyond C++: the only place with PTX.
//
// Tensor cores and asynchronous copies came in steps, and what an architecture lacks is made of what it has. The tests
// compile the kernels for the host with a file of this name of their own (tests/support/emulation/cuda/ptx.cuh).
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>

#define LLMPQ_DEVICE __device__ __forceinline__

// The products of warpgroups are Hopper's alone: only code for sm_90a has them.
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define LLMPQ_HAS_WGMMA
#endif

namespace llmpq {

constexpr int kLanes = 32;  // of a warp

// Two 16-bit floats in a register, the first in the lower half. Their types name the arithmetic.
struct Half2 {
  uint32_t bits;
};
struct BFloat2 {
  uint32_t bits;
};

// `value`, which the compiler is to keep in a register: it would rather compute it again, in every turn of a loop, or in
// every branch.
LLMPQ_DEVICE int kept(int value) {
  asm volatile("" : "+r"(value));
  return value;
}

LLMPQ_DEVICE const uint8_t* kept(const uint8_t* value) {
  asm volatile("" : "+l"(value));
  return value;
}

LLMPQ_DEVICE float float_of_bits(uint32_t bits) { return __uint_as_float(bits); }

// Bytes chosen by the nibbles of `selector`: 0-3 are those of a, 4-7 those of b.
LLMPQ_DEVICE uint32_t choose_bytes(uint32_t a, uint32_t b, uint32_t selector) { return __byte_perm(a, b, selector); }

// (a & mask) | bits, in one instruction: of two constants the compiler would make two.
LLMPQ_DEVICE uint32_t masked_or(uint32_t a, uint32_t mask, uint32_t bits) {
  uint32_t d;
  asm("lop3.b32 %0, %1, %2, %3, 0xEA;" : "=r"(d) : "r"(a), "r"(mask), "r"(bits));
  return d;
}

LLMPQ_DEVICE Half2 subtract(Half2 a, Half2 b) {
  Half2 d;
  asm("sub.rn.f16x2 %0, %1, %2;" : "=r"(d.bits) : "r"(a.bits), "r"(b.bits));
  return d;
}

// a * b + c, rounded once
LLMPQ_DEVICE Half2 multiply_add(Half2 a, Half2 b, Half2 c) {
  Half2 d;
  asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(d.bits) : "r"(a.bits), "r"(b.bits), "r"(c.bits));
  return d;
}

// a - b, exact where it can be. Hopper's subtraction of bfloat16 is a multiplication by one elsewhere.
LLMPQ_DEVICE BFloat2 subtract(BFloat2 a, BFloat2 b) {
  BFloat2 d{};
#if __CUDA_ARCH__ >= 900
  asm("sub.rn.bf16x2 %0, %1, %2;" : "=r"(d.bits) : "r"(a.bits), "r"(b.bits));
#elif __CUDA_ARCH__ >= 800
  asm("fma.rn.bf16x2 %0, %1, %2, %3;"
      : "=r"(d.bits)
      : "r"(b.bits), "r"(0xBF80BF80u), "r"(a.bits));  // -1 * b + a
#endif
  return d;
}

LLMPQ_DEVICE BFloat2 rounded_pair(float first, float second) {
  BFloat2 d{};
#if __CUDA_ARCH__ >= 800
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(d.bits) : "f"(second), "f"(first));
#endif
  return d;
}

// sums += a @ b by the 32 lanes of a warp: a is 16 x 16, b 16 x 8, sums 16 x 8 in fp32. Lane 4 g + t has of
//   a     rows g, g + 8, g, g + 8 at columns 2 t, 2 t, 2 t + 8, 2 t + 8, and at the column after each
//   b     rows 2 t, 2 t + 8 and the row after each, at column g
//   sums  rows g, g, g + 8, g + 8 at columns 2 t, 2 t + 1, 2 t, 2 t + 1
// (PTX ISA, "Matrix Fragments for mma.m16n8k16".) Turing takes two products of half the depth.
LLMPQ_DEVICE void multiply_tile(float (&sums)[4], const Half2 (&a)[4], const Half2 (&b)[2]) {
#if __CUDA_ARCH__ >= 800
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
      : "r"(a[0].bits), "r"(a[1].bits), "r"(a[2].bits), "r"(a[3].bits), "r"(b[0].bits), "r"(b[1].bits));
#elif __CUDA_ARCH__ >= 750
  for (int half = 0; half < 2; ++half) {
    asm("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5}, {%6}, {%0,%1,%2,%3};"
        : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
        : "r"(a[2 * half].bits), "r"(a[2 * half + 1].bits), "r"(b[half].bits));
  }
#endif
}

LLMPQ_DEVICE void multiply_tile(float (&sums)[4], const BFloat2 (&a)[4], const BFloat2 (&b)[2]) {
#if __CUDA_ARCH__ >= 800
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
      : "r"(a[0].bits), "r"(a[1].bits), "r"(a[2].bits), "r"(a[3].bits), "r"(b[0].bits), "r"(b[1].bits));
#endif
}

// The block's dynamic shared memory, 16-byte aligned.
LLMPQ_DEVICE uint8_t* shared_memory() {
  extern __shared__ uint4 memory[];
  return reinterpret_cast<uint8_t*>(memory);
}

// Where something is in shared memory: an address of 32 bits, which is computed once where a pointer may be many times.
struct SharedAddress {
  uint32_t bytes;

  LLMPQ_DEVICE SharedAddress operator+(int more) const { return {bytes + more}; }
};

LLMPQ_DEVICE SharedAddress shared_address(const void* in_shared) {
  return {static_cast<uint32_t>(__cvta_generic_to_shared(in_shared))};
}

LLMPQ_DEVICE SharedAddress kept(SharedAddress value) { return {static_cast<uint32_t>(kept(static_cast<int>(value.bytes)))}; }

// Four matrices of 8 rows of 16 bytes from shared memory, by all lanes of a warp: lane 8 i + r says where row r of matrix
// i is, a multiple of 16 bytes, and lane 4 g + t gets word t of row g of each. (PTX ISA, "ldmatrix".)
LLMPQ_DEVICE void load_matrices(uint32_t (&words)[4], SharedAddress row) {
#if __CUDA_ARCH__ >= 750
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
               : "r"(row.bytes)
               : "memory");
#endif
}

// Two, or four, matrices as before, transposed: lane 4 g + t gets value g, of 16 bits, of rows 2 t and 2 t + 1 of each.
LLMPQ_DEVICE void load_transposed(uint32_t (&pairs)[2], SharedAddress row) {
#if __CUDA_ARCH__ >= 750
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0,%1}, [%2];"
               : "=r"(pairs[0]), "=r"(pairs[1])
               : "r"(row.bytes)
               : "memory");
#endif
}

LLMPQ_DEVICE void load_transposed(uint32_t (&pairs)[4], SharedAddress row) {
#if __CUDA_ARCH__ >= 750
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(pairs[0]), "=r"(pairs[1]), "=r"(pairs[2]), "=r"(pairs[3])
               : "r"(row.bytes)
               : "memory");
#endif
}

// Copies 16 bytes from global to shared memory, both at multiples of 16, or writes zeros where they are not `wanted` and
// reads nothing. It is done when wait_for_copies says so.
LLMPQ_DEVICE void copy_16_bytes(SharedAddress to, const void* from, bool wanted = true) {
#if __CUDA_ARCH__ >= 800
  const int bytes = wanted ? 16 : 0;
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to.bytes), "l"(from), "r"(bytes) : "memory");
#else
  *reinterpret_cast<uint4*>(shared_memory() + (to.bytes - shared_address(shared_memory()).bytes)) =
      wanted ? *static_cast<const uint4*>(from) : make_uint4(0, 0, 0, 0);
#endif
}

LLMPQ_DEVICE void copy_16_bytes(void* to, const void* from, bool wanted = true) {
  copy_16_bytes(shared_address(to), from, wanted);
}

// 16 bytes at a multiple of 16 that another kernel wrote, or zeros where they are not `wanted`.
LLMPQ_DEVICE uint4 load_16_bytes(const void* from, bool wanted) {
  return wanted ? __ldcg(static_cast<const uint4*>(from)) : make_uint4(0, 0, 0, 0);
}

// Ends a batch of the copies that this thread began.
LLMPQ_DEVICE void end_copy_batch() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

// Waits until all but the last `Batches` batches that this thread ended are done.
template <int Batches>
LLMPQ_DEVICE void wait_for_copies() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.wait_group %0;" ::"n"(Batches) : "memory");
#endif
}

LLMPQ_DEVICE void sync_block() { __syncthreads(); }

// The lanes of a warp go on together, as products of warpgroups want them to.
LLMPQ_DEVICE void sync_warp() { __syncwarp(); }

// ---- products of a warpgroup: 4 warps of Hopper (PTX ISA, "Asynchronous Warpgroup Level Matrix Instructions")
//
// They are made while the threads go on. Batches of them are begun by begin_products, given by add_product and ended by
// end_products; until wait_for_products says that a batch is done, nobody touches its sums and its left factors.

// A matrix in shared memory, 16 columns of k wide, that is made of cores: 8 rows of 8 columns, 128 bytes one row after
// the other. `k_step` bytes lie between the two cores of 8 rows, `row_step` between one core and that of the next 8 rows.
// (PTX ISA, "Matrix Descriptor", without swizzling.)
LLMPQ_DEVICE uint64_t matrix_in_shared(const void* start, int k_step, int row_step) {
  const uint64_t address = __cvta_generic_to_shared(start);
  return address >> 4 | static_cast<uint64_t>(k_step >> 4) << 16 | static_cast<uint64_t>(row_step >> 4) << 32;
}

// The matrix that begins `bytes` further on, a multiple of 16.
LLMPQ_DEVICE uint64_t moved(uint64_t matrix, int bytes) { return matrix + (bytes >> 4); }

// What this thread has written or copied to shared memory is there for products, once others know of it by a barrier.
LLMPQ_DEVICE void show_to_products() {
#ifdef LLMPQ_HAS_WGMMA
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
}

// Before each batch, when its left factors are there: products see registers as they are here.
template <int Count, class Pair>
LLMPQ_DEVICE void begin_products(Pair (&left)[Count][4]) {
#pragma unroll
  for (int i = 0; i < Count; ++i) {
#pragma unroll
    for (int j = 0; j < 4; ++j) asm volatile("" : "+r"(left[i][j].bits));
  }
#ifdef LLMPQ_HAS_WGMMA
  asm volatile("wgmma.fence.sync.aligned;");
#endif
}

LLMPQ_DEVICE void end_products() {
#ifdef LLMPQ_HAS_WGMMA
  asm volatile("wgmma.commit_group.sync.aligned;");
#endif
}

// Waits until all but the last `Batches` batches are done.
template <int Batches>
LLMPQ_DEVICE void wait_for_products() {
#ifdef LLMPQ_HAS_WGMMA
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(Batches));
#endif
}

// Sums that are used from here on, after a wait: the compiler is to read them no earlier.
template <int Steps>
LLMPQ_DEVICE void use_sums(float (&sums)[Steps][4]) {
#pragma unroll
  for (int i = 0; i < Steps * 4; ++i) asm volatile("" : "+f"(sums[i / 4][i % 4]));
}

// set_product: sums = left @ right.T; add_product: sums += left @ right.T; by the 128 lanes of a warpgroup. left is 64 x 16,
// 16 rows for each warp, whose lanes have of them what multiply_tile says; right has 32, 64 or 128 rows; a warp's sums are
// those of its 16 rows, and lie in steps of 8 rows of right, each as the sums of multiply_tile.
#define LLMPQ_SUM_4(io, i) io(sums[i][0]), io(sums[i][1]), io(sums[i][2]), io(sums[i][3])
#define LLMPQ_SUM_16(io, i) LLMPQ_SUM_4(io, i), LLMPQ_SUM_4(io, i + 1), LLMPQ_SUM_4(io, i + 2), LLMPQ_SUM_4(io, i + 3)
#define LLMPQ_NAMES_0 "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15"
#define LLMPQ_NAMES_1 "%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31"
#define LLMPQ_NAMES_2 "%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47"
#define LLMPQ_NAMES_3 "%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63"
#ifdef LLMPQ_HAS_WGMMA
#define LLMPQ_PRODUCT(columns, type, names, rest, ...)                                                      \
  asm volatile("wgmma.mma_async.sync.aligned.m64n" columns "k16.f32." type "." type " {" names "}, " rest   \
               : __VA_ARGS__                                                                                \
               : "r"(left[0].bits), "r"(left[1].bits), "r"(left[2].bits), "r"(left[3].bits), "l"(right))
#else
#define LLMPQ_PRODUCT(columns, type, names, rest, ...)
#endif
#define LLMPQ_DEFINE_PRODUCTS(name, io, scale, pair, type)                                                        \
  LLMPQ_DEVICE void name(float (&sums)[4][4], const pair (&left)[4], uint64_t right) {                            \
    LLMPQ_PRODUCT("32", type, LLMPQ_NAMES_0, "{%16,%17,%18,%19}, %20, " scale ", 1, 1, 0;", LLMPQ_SUM_16(io, 0)); \
  }                                                                                                               \
  LLMPQ_DEVICE void name(float (&sums)[8][4], const pair (&left)[4], uint64_t right) {                            \
    LLMPQ_PRODUCT("64", type, LLMPQ_NAMES_0 "," LLMPQ_NAMES_1, "{%32,%33,%34,%35}, %36, " scale ", 1, 1, 0;",     \
                  LLMPQ_SUM_16(io, 0), LLMPQ_SUM_16(io, 4));                                                      \
  }                                                                                                               \
  LLMPQ_DEVICE void name(float (&sums)[16][4], const pair (&left)[4], uint64_t right) {                           \
    LLMPQ_PRODUCT("128", type, LLMPQ_NAMES_0 "," LLMPQ_NAMES_1 "," LLMPQ_NAMES_2 "," LLMPQ_NAMES_3,               \
                  "{%64,%65,%66,%67}, %68, " scale ", 1, 1, 0;", LLMPQ_SUM_16(io, 0), LLMPQ_SUM_16(io, 4),        \
                  LLMPQ_SUM_16(io, 8), LLMPQ_SUM_16(io, 12));                                                     \
  }
#define LLMPQ_IN_AND_OUT(sum) "+f"(sum)
LLMPQ_DEFINE_PRODUCTS(set_product, LLMPQ_IN_AND_OUT, "0", Half2, "f16")
LLMPQ_DEFINE_PRODUCTS(set_product, LLMPQ_IN_AND_OUT, "0", BFloat2, "bf16")
LLMPQ_DEFINE_PRODUCTS(add_product, LLMPQ_IN_AND_OUT, "1", Half2, "f16")
LLMPQ_DEFINE_PRODUCTS(add_product, LLMPQ_IN_AND_OUT, "1", BFloat2, "bf16")
#undef LLMPQ_IN_AND_OUT
#undef LLMPQ_DEFINE_PRODUCTS
#undef LLMPQ_PRODUCT
#undef LLMPQ_SUM_16
#undef LLMPQ_SUM_4
#undef LLMPQ_NAMES_0
#undef LLMPQ_NAMES_1
#undef LLMPQ_NAMES_2
#undef LLMPQ_NAMES_3

// True for the one of `count` blocks that calls last; it sees what the others wrote before they called, and leaves the
// counter as it was before the first. All threads of a block call. The counter is 0 to begin with.
//
// By the PTX memory model: what any thread of a block wrote precedes the block's barrier, and the barrier its first
// thread's atomic, which releases all of that to the GPU (causality order is transitive). The atomics on a counter read
// one another, so the last acquires what each of them released, and the barrier hands it on to the last block's threads.
LLMPQ_DEVICE bool is_last_of(unsigned count, unsigned* counter) {
  __shared__ bool last;
  __syncthreads();
  if (threadIdx.x == 0) {
    unsigned before;
    asm volatile("atom.acq_rel.gpu.global.inc.u32 %0, [%1], %2;"
                 : "=r"(before)
                 : "l"(__cvta_generic_to_global(counter)), "r"(count - 1)
                 : "memory");
    last = before == count - 1;
  }
  __syncthreads();
  return last;
}

// A value that another block wrote: not from this SM's own cache.
LLMPQ_DEVICE float load_written_by_others(const float* from) { return __ldcg(from); }

// Sums over the lanes of a warp, as a binary tree.
LLMPQ_DEVICE float warp_sum(float value) {
#pragma unroll
  for (int distance = kLanes / 2; distance > 0; distance /= 2) value += __shfl_xor_sync(0xFFFFFFFFu, value, distance);
  return value;
}

// Lets kernels that are queued to begin early begin once all blocks of this one have come here.
LLMPQ_DEVICE void let_next_grid_begin() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// Waits until the kernels that are queued before have ended and all that they wrote can be seen. A kernel that may begin
// early calls it in every thread, before it reads what others may write, and before it writes: who comes after relies on
// this one to end later than those before it. Where the kernel was not queued so, all that is true from its beginning.
LLMPQ_DEVICE void wait_for_grids_before() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// Lets the current device run a kernel with so much shared memory for a block, and finds what its code there was compiled
// for: 10 * major + minor of the architecture, which may be an older one than the device's.
template <class Args>
cudaError_t make_ready(void (*kernel)(Args), int shared_bytes, int& architecture) {
  const void* function = reinterpret_cast<const void*>(kernel);
  cudaFuncAttributes attributes{};
  if (const cudaError_t error = cudaFuncGetAttributes(&attributes, function); error != cudaSuccess) return error;
  architecture = attributes.ptxVersion;
  return cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
}

// A kernel's one-dimensional thread blocks.
struct Grid {
  unsigned blocks, threads;
  size_t shared_bytes = 0;
  bool early = false;  // it was compiled to wait_for_grids_before, and may begin while they run
};

template <class Args>
cudaError_t launch(void (*kernel)(Args), const Args& args, const Grid& grid, cudaStream_t stream) {
  cudaLaunchAttribute early{};
  early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  early.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(grid.blocks);
  config.blockDim = dim3(grid.threads);
  config.dynamicSmemBytes = grid.shared_bytes;
  config.stream = stream;
  config.attrs = &early;
  config.numAttrs = grid.early;
  void* parameters[] = {const_cast<Args*>(&args)};
  return cudaLaunchKernelExC(&config, reinterpret_cast<const void*>(kernel), parameters);
}

}  // namespace llmpq

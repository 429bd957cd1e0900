// What one instruction set's kernels do, and the table through which they are called.
//
// The weights lie in panels of 16 rows, so that a vector of 16 lanes holds one column of a panel: lane = row. A panel
// is a sequence of blocks, each 32 columns wide (columns beyond k and rows beyond n are there, and are never used):
//
//   3, 4 bits   the packed words of llmpq/quant/packing.py, [bits words][16 rows] uint32
//   8 bits      [32 columns][16 rows] bytes
//   16 bits     [32 columns][16 rows] float16 or bfloat16
//
// A code stands in its field as code - 2^(bits - 1) in two's complement: a symmetric weight is then scale * field. The
// scales are [panel][group][16 rows] of the 16-bit type they came in, the zeros the same in bytes.
//
// The sum over k has one fixed order, whatever m, the threads and the way a weight was decoded: within a block one
// chain of fused multiply-adds, from the first column to the last, on the integer fields; then, block by block,
// y += scale * (chain + (2^(bits - 1) - zero) * sum(x in the block)), again fused. With a unit vector for x this is
// exactly the weight.
#pragma once

#include <cstddef>
#include <cstdint>

#include "gemm.h"

namespace llmpq {

constexpr int kLanes = 16;       // rows of a panel
constexpr int kBlock = 32;       // columns of a block
constexpr int kChunk = 4;        // blocks for which scales are converted at a time
constexpr int kTilesAtOnce = 4;  // tiles of x in a task: few enough to stay in the L2 cache

static inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Some rows of x against all of w, split over panels. Tile t has tile_rows(t) rows, which in x are laid out
// [blocks][rows][32], columns beyond k being 0, and in x_sums (sums over the 32) [blocks][rows].
struct GemmTask {
  const GemmArgs* args;
  const float* x;
  const float* x_sums;
  int64_t first_row;  // of y
  int rows, tiles;

  int tile_rows(int tile) const { return rows / tiles + (tile < rows % tiles); }
  int64_t blocks() const { return (args->k + kBlock - 1) / kBlock; }
};

// Causal attention of packed sequences over a cache, all float32. Token i of sequence s is its query_lens[s] - i'th
// last.
struct AttentionArgs {
  const float* q;        // [tokens, heads, head_dim], tokens q_stride elements apart
  const float* k_cache;  // [slots, kv_heads, max_len, head_dim]
  const float* v_cache;
  float* out;  // [tokens, heads, head_dim]
  const int32_t *slots, *query_lens, *context_lens;
  int64_t sequences, heads, kv_heads, head_dim, max_len, q_stride;
  float scale;
};

// A few successive tokens of one sequence, for the heads that share one kv head.
struct AttentionTask {
  const AttentionArgs* args;
  int64_t slot, kv_head;
  int64_t first_token;     // in q and out
  int64_t first_position;  // of first_token in its sequence
  int tokens;
};

struct NormArgs {
  const float* x;  // [rows, size], rows x_stride elements apart
  const float* weight;
  const float* bias;  // layer norm only; null: none
  float* y;           // [rows, size]
  int64_t rows, size, x_stride;
  float eps;
};

struct Kernels {
  const char* isa;
  int tile_rows;  // most rows in a tile of x
  void (*gemm)(const GemmTask&, int64_t panel_begin, int64_t panel_end);
  // scratch: attention_scratch(...) floats
  void (*attention)(const AttentionTask&, float* scratch);
  void (*rms_norm)(const NormArgs&, int64_t row);
  void (*layer_norm)(const NormArgs&, int64_t row);
};

static inline int64_t attention_scratch(int64_t rows, int64_t head_dim) {
  return rows * (2 * ceil_div(head_dim, kLanes) * kLanes + 2);
}

// The widest instruction set that the processor has and that $LLMPQ_ISA (portable, avx2, avx512) allows. Throws
// std::invalid_argument on another value of it.
const Kernels& kernels();

// The operations, on up to `threads` threads.
void gemm(const GemmArgs& args, int threads);  // x, bias and y float32
void attention(const AttentionArgs& args, int threads);
void rms_norm(const NormArgs& args, int threads);
void layer_norm(const NormArgs& args, int threads);

// Rows ids[0..m) of w, dequantized, to y [m, k] of float32: args.x holds the ids, int64; bias and x_dtype are not used.
void embedding(const GemmArgs& args, int threads);

}  // namespace llmpq

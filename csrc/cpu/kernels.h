// What one instruction set's kernels do, and the table through which they are called.
//
// The weights lie in panels of 16 rows, so that a vector of 16 lanes holds a column of a panel, or four or eight
// packed ones: lane = row. A panel is a sequence of blocks, each 32 columns wide (columns beyond k and rows beyond n
// are there, and are never used):
//
//   3, 4, 8 bits  the packed words of llmpq/quant/packing.py, [bits words][16 rows] uint32
//   16 bits       [32 columns][16 rows] float16 or bfloat16
//
// The scales are [panel][group][16 rows] of the 16-bit type they came in, the offsets likewise, the zeros in bytes.
//
// The sum over k has one fixed order, whatever m, the threads and the way a weight was decoded. For floating x: within
// a block one chain of fused multiply-adds, from the first column to the last, on the integers code - 2^(bits - 1);
// then, block by block, y += scale * (chain + (2^(bits - 1) - zero) * sum(x in the block)), again fused. With an offset
// for a zero the zero in this is 0, with 3 and 4 bits the chain is on the codes themselves, and offset * sum(x in the
// block) is added to the block before y is. With a unit vector for x this is exactly the weight, whose one rounding is
// the last operation's. For x in int8: within a group of x the integer sum of (code - zero) * x, in which no order
// shows; then, group by group, y += scale * (x's scale * sum), for two terms scale * (s1 * sum1 + s2 * sum2), fused.
// With an offset, the zero in this is 2^(bits - 1), and y += (scale * zero + offset) * (the group's sum of x as
// rounded) goes before. (Portable x86 has no fused operations, and so bits of its own.)
#pragma once

#include <cstddef>
#include <cstdint>

#include "cpu/unroll.h"
#include "gemm.h"

namespace llmpq {

constexpr int kLanes = 16;          // rows of a panel
constexpr int kBlock = 32;          // columns of a block
constexpr int kChunk = 8;           // blocks for which scales are converted at a time
constexpr int kMaxGroupBlocks = 4;  // blocks of x in int8 that share a scale, at most
constexpr int kChunkKeys = 128;     // keys that share a largest score in attention
constexpr int kBlockKeys = 64;      // positions of a block of a KV cache
static_assert(kChunkKeys % kBlockKeys == 0 && kBlockKeys % kLanes == 0);

static inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Rows of x as they are read. A tile is some rows; within each it is laid out [blocks][rows][32], columns beyond k
// being 0.
struct FloatRows {
  float* values;
  float* sums;  // over the 32 columns: [blocks][rows]
};

// The same for int8, where each row of x is as many rows as it has terms. The columns of a block stand in the order in
// which they appear when words of w are taken apart: with 3 and 4 bits the even ones of eight, then the odd ones.
// (AMX has the same columns in other places: amx_kernel.h.)
struct Int8Rows {
  int8_t* values;
  float* scales;  // of the groups, for a tile [groups][rows * terms]
  int32_t* sums;  // minus the sums over the groups' columns, times the zero where all have the same; alike
  float* totals;  // sums over the groups' columns of x as rounded: [groups][rows]; only where there are offsets
  int terms, group_blocks;
};

// Some rows of x, in tiles of about equal size, against all of w. Its functions are inlined, since a copy of one that
// is compiled for a wide instruction set must not be called by others.
template <class Rows>
struct GemmTask {
  const GemmArgs* args;
  int64_t first_row;  // of x and y; where there are lists of rows, of these
  int rows, tiles;
  Rows x;
  const int32_t *x_rows = nullptr, *y_rows = nullptr;  // which rows of x and of y are meant; null: all, in order

  LLMPQ_INLINE int64_t x_row(int row) const { return x_rows != nullptr ? x_rows[first_row + row] : first_row + row; }
  LLMPQ_INLINE int64_t y_row(int row) const { return y_rows != nullptr ? y_rows[first_row + row] : first_row + row; }
  LLMPQ_INLINE int tile_rows(int tile) const { return rows / tiles + (tile < rows % tiles); }
  LLMPQ_INLINE int tile_begin(int tile) const {
    const int larger = tile < rows % tiles ? tile : rows % tiles;  // tiles before it that have a row more
    return tile * (rows / tiles) + larger;
  }
  LLMPQ_INLINE int64_t blocks() const { return ceil_div(args->k, kBlock); }
};
using FloatTask = GemmTask<FloatRows>;
using Int8Task = GemmTask<Int8Rows>;

// New tokens of several sequences, packed one after the other: what changes from step to step. Token i of sequence s is
// at position context_lens[s] - query_lens[s] + i. The blocks of its cache are, in their order, row s of `tables`, or
// where that is null those of its slot.
struct Sequences {
  const int32_t *slots, *query_lens, *context_lens, *tables;
  int64_t count, columns;  // of `tables`
};

// Some successive tokens of one sequence.
struct TokenRun {
  int64_t slot;
  const int32_t* table;    // null: the blocks of its slot
  int64_t first_token;     // in q and out
  int64_t first_position;  // of first_token in its sequence
  int tokens;
};

// Keys and values of one layer: a pool of blocks of kBlockKeys positions, of which a sequence has those that its table
// says, or those of its slot. A layer that is a ring keeps the latest positions of a slot, in its blocks in turn. Of a
// block's keys 16 positions lie together, so that a vector of 16 lanes holds one dimension of 16 keys: lane = position.
// What belongs to positions that a sequence has not reached may hold anything.
//
//   keys    [kv_heads][blocks][kBlockKeys / 16][head_dim][16]
//   values  [kv_heads][blocks][kBlockKeys][value_dim]: head_dim, filled up to whole vectors
//   scales  [kv_heads][blocks][kBlockKeys], of keys and of values that are codes: a number is its code times the scale
//
// Of one head, blocks that follow each other are read as one.
struct KvCache {
  void *keys, *values;
  float *key_scales, *value_scales;  // null: there are no codes
  int64_t kv_heads, head_dim, blocks;
  int64_t slot_blocks;  // that each slot has of its own, where no table says otherwise
  bool ring;
  int bytes;  // of a number: 4 of float32, 2 of float16, 1 of a code, which is int8

  LLMPQ_INLINE int64_t value_dim() const { return (head_dim + kLanes - 1) / kLanes * kLanes; }
  // The block where a position is kept.
  LLMPQ_INLINE int64_t block(const TokenRun& run, int64_t position) const {
    const int64_t index = position / kBlockKeys;
    if (ring) return run.slot * slot_blocks + index % slot_blocks;
    return run.table != nullptr ? run.table[index] : run.slot * slot_blocks + index;
  }
  template <class T>
  LLMPQ_INLINE T* keys_of(int64_t block, int64_t kv_head) const {
    return static_cast<T*>(keys) + (kv_head * blocks + block) * kBlockKeys * head_dim;
  }
  template <class T>
  LLMPQ_INLINE T* values_of(int64_t block, int64_t kv_head) const {
    return static_cast<T*>(values) + (kv_head * blocks + block) * kBlockKeys * value_dim();
  }
  // Of keys or of values.
  LLMPQ_INLINE float* scales_of(float* scales, int64_t block, int64_t kv_head) const {
    return scales + (kv_head * blocks + block) * kBlockKeys;
  }
};

// Rotary embedding of new queries and keys, and keys and values on their way into the cache.
struct StoreArgs {
  float* qkv;  // [tokens, heads + 2 kv_heads, head_dim], tokens `stride` elements apart; rotated in place
  // [>= context_len, rotated], of the angles by which dimensions j and j + rotated / 2 are rotated at each position.
  // The sine's first half has the sign that it is used with: minus.
  const float *cos, *sin;
  KvCache cache;
  Sequences sequences;
  int64_t heads, stride;
  int64_t rotated;  // dimensions of a head; 0: none
};

// Causal attention to the cache, which holds the new tokens' keys and values already. Scores are q.k * scale, to which
// slope * (key position - query position) is added; with a cap they become cap * tanh(score / cap).
struct AttentionArgs {
  const float* q;  // [tokens, heads, head_dim], tokens q_stride elements apart
  float* out;      // [tokens, heads, head_dim]
  KvCache cache;
  Sequences sequences;
  int64_t heads, q_stride;
  float scale;
  int64_t window;       // keys that a query sees at most: its own and the latest before it
  float cap;            // 0: none
  const float* sinks;   // [heads]: a further score, which has no value; null: none
  const float* slopes;  // [heads]; null: none
};

// Keys of a chunk, from one to another.
struct Keys {
  int begin, end;

  // Those of them that lie in the chunk's blocks from one to another; `end` is less than `begin` if none does.
  LLMPQ_INLINE Keys in_blocks(int block, int after) const {
    const int first = block * kBlockKeys, last = after * kBlockKeys;
    return Keys{begin > first ? begin : first, end < last ? end : last};
  }
  LLMPQ_INLINE int first_block() const { return begin / kBlockKeys; }
  LLMPQ_INLINE int end_block() const { return (end + kBlockKeys - 1) / kBlockKeys; }
};

// A run's attention, for the heads that share one kv head: its rows are tokens x heads.
struct AttentionTask {
  const AttentionArgs* args;
  TokenRun run;
  int64_t kv_head;

  LLMPQ_INLINE int64_t heads() const { return args->heads / args->cache.kv_heads; }
  LLMPQ_INLINE int64_t rows() const { return run.tokens * heads(); }
  // The chunks that its rows see.
  LLMPQ_INLINE int64_t first_chunk() const {
    const int64_t unseen = run.first_position + 1 - args->window;
    return unseen > 0 ? unseen / kChunkKeys : 0;
  }
  LLMPQ_INLINE int64_t end_chunk() const { return (run.first_position + run.tokens - 1) / kChunkKeys + 1; }
  LLMPQ_INLINE int64_t chunks() const { return end_chunk() - first_chunk(); }
  // The keys of a chunk that queries see whose positions are `first` to `last`.
  LLMPQ_INLINE Keys seen(int64_t chunk, int64_t first, int64_t last) const {
    const auto within = [](int64_t key) LLMPQ_LAMBDA {
      return static_cast<int>(key < 0 ? 0 : key < kChunkKeys ? key : kChunkKeys);
    };
    const int64_t start = chunk * kChunkKeys;
    return Keys{within(first + 1 - args->window - start), within(last + 1 - start)};
  }
  // Those that any of its rows sees.
  LLMPQ_INLINE Keys seen(int64_t chunk) const {
    return seen(chunk, run.first_position, run.first_position + run.tokens - 1);
  }
  // Where keys and values of a block of a chunk lie.
  template <class T>
  LLMPQ_INLINE const T* keys(int64_t chunk, int block) const {
    return args->cache.template keys_of<T>(place(chunk, block), kv_head);
  }
  template <class T>
  LLMPQ_INLINE const T* values(int64_t chunk, int block) const {
    return args->cache.template values_of<T>(place(chunk, block), kv_head);
  }
  // The scales of a chunk's keys or values as far as these lie together with a block's.
  LLMPQ_INLINE const float* scales(float* scales, int64_t chunk, int block) const {
    return args->cache.scales_of(scales, place(chunk, block), kv_head) - block * kBlockKeys;
  }
  LLMPQ_INLINE int64_t place(int64_t chunk, int block) const {
    return args->cache.block(run, chunk * kChunkKeys + block * kBlockKeys);
  }
  // The end, `end` at most, of a chunk's blocks that follow each other in the cache from one on.
  LLMPQ_INLINE int piece_end(int64_t chunk, int block, int end) const {
    const int64_t ahead = place(chunk, block) - block;
    do {
      ++block;
    } while (block < end && place(chunk, block) == ahead + block);
    return block;
  }
  // Floats of the partial results of one chunk: of each row the sum of weighted values, the largest score, the sum of
  // weights.
  LLMPQ_INLINE int64_t partial_floats() const {
    return rows() * args->cache.value_dim() + 2 * ((rows() + kLanes - 1) / kLanes * kLanes);
  }
  LLMPQ_INLINE int64_t scratch_floats() const { return rows() * args->cache.head_dim + 2 * partial_floats(); }
};

// A task's chunk.
struct TaskChunk {
  const AttentionTask* task;
  int64_t chunk;
};

struct NormArgs {
  const float* x;  // [rows, size], rows x_stride elements apart
  const float* weight;
  const float* bias;      // layer norm only; null: none
  const float* residual;  // RMS norm only: [rows, size] that is added; null: none
  float* y;               // [rows, size]
  int64_t rows, size, x_stride;
  float eps;
};

// RMS norm in place of every group of a token's.
struct HeadNormArgs {
  float* x;  // [tokens, groups, size], tokens `stride` elements apart
  const float* weight;
  int64_t tokens, groups, size, stride;
  float eps;
};

// kGeluTanh: tanh in place of erf. kSwigluClamped is always gated.
enum class Activation : int { kSilu = 0, kRelu = 1, kGelu = 2, kGeluTanh = 3, kSwigluClamped = 4 };

// In place: x[:, :size] = activation(x[:, :size]), times x[:, size:] where it is gated.
struct ActivationArgs {
  float* x;  // [rows, size], gated [rows, 2 * size]; rows `stride` elements apart
  int64_t rows, size, stride;
  Activation activation;
  bool gated;
};

// In place: x *= factor, then x = cap * tanh(x / cap).
struct ScaleArgs {
  float* x;  // [rows, size], rows `stride` elements apart
  int64_t rows, size, stride;
  float factor, cap;  // cap 0: none
};

// y[i] += table[position of token i].
struct PositionArgs {
  const float* table;  // [positions, size]
  float* y;            // [tokens, size]
  int64_t size;
  Sequences sequences;
};

// y[s] = x[the last token of sequence s].
struct LastRowsArgs {
  const float* x;  // [tokens, size]
  float* y;        // [sequences, size]
  int64_t size;
  Sequences sequences;
};

// The columns of the largest numbers of rows; of equal ones the first.
struct ArgmaxArgs {
  const float* x;    // [rows, size]
  int64_t* columns;  // [rows]
  int64_t rows, size;
};

struct EmbeddingArgs {
  GemmArgs table;      // [n, k]; its x and y are not used
  const int64_t* ids;  // [rows]
  float* y;            // [rows, k]
  int64_t rows;
};

// Rows of a weight, or of its scales, on their way into panels.
struct PanelArgs {
  const void* rows;  // [count, columns], row_stride elements apart
  void* panels;      // [panels][panel_columns][16]
  int64_t first_row, count;  // rows of the weight
  int64_t columns, row_stride, panel_columns;
  int bytes;  // of an element: 1, 2 or 4
};

// The product for one kind of x: first the rows of a task are packed, each by itself, then the panels multiplied.
template <class Rows>
struct GemmKernel {
  int tile_rows;  // most rows in a tile, counting each term
  int panels;     // that are best worked on together
  void (*pack)(const GemmTask<Rows>&, int tile, int row_of_tile);
  void (*multiply)(const GemmTask<Rows>&, int64_t panel_begin, int64_t panel_end);
  bool whole_tiles = false;  // every tile takes the memory of tile_rows rows, and of an even number of blocks
};

struct Kernels {
  const char* isa;
  GemmKernel<FloatRows> gemm;
  GemmKernel<Int8Rows> gemm_int8;
  void (*store)(const StoreArgs&, const TokenRun&);
  // A task in one go; or each of its chunks' partial results, [chunks][partial_floats()], and then all together.
  // scratch: scratch_floats() floats; next: what the thread will read after these, to be fetched ahead
  void (*attention)(const AttentionTask&, const TaskChunk& next, float* scratch);
  void (*attention_chunk)(const TaskChunk&, const TaskChunk& next, float* partial, float* scratch);
  void (*attention_merge)(const AttentionTask&, float* partials);
  void (*rms_norm)(const NormArgs&, int64_t row);
  void (*layer_norm)(const NormArgs&, int64_t row);
  void (*activate)(const ActivationArgs&, int64_t row);
  void (*scale)(const ScaleArgs&, int64_t row);
  int64_t (*argmax)(const float* x, int64_t size);
  // For x as int8, the same bits sooner where there are so many rows at least, counting each term; 0: there is none.
  int many_rows = 0;
  GemmKernel<Int8Rows> gemm_int8_many = {};

  LLMPQ_INLINE const GemmKernel<Int8Rows>& int8_kernel(int64_t rows) const {
    return many_rows != 0 && rows >= many_rows ? gemm_int8_many : gemm_int8;
  }
};

// The widest instruction set that the processor has and that $LLMPQ_ISA (portable, avx2, avxvnni, avx512, amx) allows;
// without that, the default of dispatch.cpp. Throws std::invalid_argument on another value of it.
const Kernels& kernels();

// The operations, on up to `threads` threads.
void gemm(const GemmArgs& args, int threads);  // x and y float32 or bfloat16, bias float32
void rotate_and_store(const StoreArgs& args, int threads);
void attention(const AttentionArgs& args, int threads);
void rms_norm(const NormArgs& args, int threads);
void layer_norm(const NormArgs& args, int threads);
void head_norm(const HeadNormArgs& args, int threads);
void activate(const ActivationArgs& args, int threads);
void scale(const ScaleArgs& args, int threads);
void add_positions(const PositionArgs& args, int threads);
void last_rows(const LastRowsArgs& args, int threads);
void argmax(const ArgmaxArgs& args, int threads);
void fill_panels(const PanelArgs& args);
void embedding(const EmbeddingArgs& args, int threads);  // rows of a weight, dequantized to float32

}  // namespace llmpq

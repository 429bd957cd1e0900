// Attention, and what writes its cache: cut into runs of a few tokens of one sequence, shared out to threads.
#include <algorithm>
#include <vector>

#include "cpu/kernels.h"
#include "cpu/scratch.h"
#include "cpu/threads.h"

namespace llmpq {
namespace {

constexpr int64_t kTaskRows = 48;              // tokens x heads that use a chunk of keys while it is in a near cache
constexpr int64_t kWorkPerThread = 1 << 16;    // multiplications below which another thread costs more than it gives
constexpr int64_t kStoredPerThread = 1 << 12;  // numbers rotated or stored, likewise
constexpr int64_t kTasksPerThread = 4;         // with fewer, chunks are shared out
constexpr int64_t kStoredTokens = 32;          // of a run that is stored

// body(run) for all tokens, in runs of at most `most`.
template <class Body>
void for_runs(const Sequences& sequences, int64_t most, const Body& body) {
  int64_t token = 0;
  for (int64_t s = 0; s < sequences.count; ++s) {
    const int64_t length = sequences.query_lens[s];
    const int32_t* table = sequences.tables == nullptr ? nullptr : sequences.tables + s * sequences.columns;
    for (int64_t first = 0; first < length; first += most) {
      body(TokenRun{sequences.slots[s], table, token + first, sequences.context_lens[s] - length + first,
                    static_cast<int>(std::min(most, length - first))});
    }
    token += length;
  }
}

float* thread_scratch(size_t floats) { return scratch_floats(Scratch::kAttention, floats); }

struct Chunk {
  TaskChunk of;
  float* partial;
};

// Each chunk by itself, for a few tasks with long contexts.
void attend_by_chunks(const std::vector<AttentionTask>& tasks, int threads) {
  const Kernels& isa = kernels();
  thread_local std::vector<Chunk> chunk_list;
  std::vector<Chunk>& chunks = chunk_list;  // the caller's, on whichever thread it is read
  chunks.clear();
  int64_t floats = 0;
  for (const AttentionTask& task : tasks) floats += task.chunks() * task.partial_floats();
  float* memory = scratch_floats(Scratch::kPartials, floats);
  for (const AttentionTask& task : tasks) {
    for (int64_t i = task.first_chunk(); i < task.end_chunk(); ++i, memory += task.partial_floats()) {
      chunks.push_back({{&task, i}, memory});
    }
  }
  const auto count = static_cast<int64_t>(chunks.size());
  parallel_for(count, threads, [&](int64_t item) {
    const Chunk &chunk = chunks[item], &next = chunks[std::min(item + threads, count - 1)];
    isa.attention_chunk(chunk.of, next.of, chunk.partial, thread_scratch(chunk.of.task->scratch_floats()));
  });
  for (const Chunk& chunk : chunks) {
    const AttentionTask& task = *chunk.of.task;
    if (chunk.of.chunk == task.first_chunk()) isa.attention_merge(task, chunk.partial);
  }
}

}  // namespace

void rotate_and_store(const StoreArgs& args, int threads) {
  const Kernels& isa = kernels();
  thread_local std::vector<TokenRun> run_list;
  std::vector<TokenRun>& runs = run_list;
  runs.clear();
  int64_t tokens = 0;
  for_runs(args.sequences, kStoredTokens, [&](const TokenRun& run) {
    runs.push_back(run);
    tokens += run.tokens;
  });
  const int64_t work = tokens * (args.heads + 2 * args.cache.kv_heads) * args.cache.head_dim;
  parallel_for(static_cast<int64_t>(runs.size()), useful_threads(work, kStoredPerThread, threads),
               [&](int64_t item) { isa.store(args, runs[item]); });
}

void attention(const AttentionArgs& args, int threads) {
  const Kernels& isa = kernels();
  thread_local std::vector<AttentionTask> task_list;
  std::vector<AttentionTask>& tasks = task_list;
  tasks.clear();
  const int64_t tokens_at_once = std::max<int64_t>(1, kTaskRows * args.cache.kv_heads / args.heads);
  int64_t work = 0, chunks = 0;
  for_runs(args.sequences, tokens_at_once, [&](const TokenRun& run) {
    for (int64_t kv_head = 0; kv_head < args.cache.kv_heads; ++kv_head) tasks.push_back({&args, run, kv_head});
    const int64_t keys = run.tokens + std::min(run.first_position, args.window);
    work += run.tokens * keys * args.heads * args.cache.head_dim;
    chunks = std::max(chunks, tasks.back().chunks());
  });
  const int used = useful_threads(work, kWorkPerThread, threads);
  const auto count = static_cast<int64_t>(tasks.size());
  if (used > 1 && chunks > 1 && count < used * kTasksPerThread) return attend_by_chunks(tasks, used);
  parallel_for(count, used, [&](int64_t item) {
    const AttentionTask& task = tasks[count - 1 - item];  // those with the longest contexts first
    const AttentionTask& next = tasks[std::max<int64_t>(count - 1 - item - used, 0)];
    isa.attention(task, {&next, next.first_chunk()}, thread_scratch(task.scratch_floats()));
  });
}

}  // namespace llmpq

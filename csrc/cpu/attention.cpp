// Attention: cut into tasks of a few tokens of one sequence and kv head, shared out to threads.
#include <algorithm>
#include <memory>
#include <vector>

#include "cpu/kernels.h"
#include "cpu/threads.h"

namespace llmpq {

constexpr int64_t kTaskRows = 48;            // tokens x heads that use a tile of keys while it is in the L1 cache
constexpr int64_t kWorkPerThread = 1 << 17;  // keys and values below which another thread costs more than it gives

void attention(const AttentionArgs& args, int threads) {
  const Kernels& isa = kernels();
  const int64_t heads = args.heads / args.kv_heads;
  const int64_t tokens_at_once = std::max<int64_t>(1, kTaskRows / heads);
  std::vector<AttentionTask> tasks;
  int64_t token = 0, work = 0;
  for (int64_t s = 0; s < args.sequences; ++s) {
    const int64_t length = args.query_lens[s];
    for (int64_t first = 0; first < length; first += tokens_at_once) {
      const int tokens = static_cast<int>(std::min(tokens_at_once, length - first));
      const int64_t position = args.context_lens[s] - length + first;
      for (int64_t kv_head = 0; kv_head < args.kv_heads; ++kv_head) {
        tasks.push_back({&args, args.slots[s], kv_head, token + first, position, tokens});
      }
      work += tokens * (position + tokens) * args.heads * args.head_dim;
    }
    token += length;
  }
  const int used = static_cast<int>(std::min<int64_t>(threads, 1 + work / kWorkPerThread));
  parallel_for(tasks.size(), used, [&](int64_t item) {
    std::unique_ptr<float[]> scratch(new float[attention_scratch(tasks[item].tokens * heads, args.head_dim)]);
    isa.attention(tasks[item], scratch.get());
  });
}

}  // namespace llmpq

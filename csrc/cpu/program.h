// The operations of a pass, recorded once and run again for any number of rows.
#pragma once

#include <functional>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "cpu/kernels.h"

namespace llmpq {

// What differs from one pass to the next.
struct Pass {
  int64_t rows;           // of every operation, up to one that leaves only the last of each sequence
  const int64_t* tokens;  // [rows], for the embedding; null where there is none
  Sequences sequences;    // for attention, and what else goes by positions
};

// An operation's arguments as those of another pass: buffers stay where they are, and begin with the rows in use.
inline void adapt(GemmArgs& args, const Pass& pass) { args.m = pass.rows; }
inline void adapt(NormArgs& args, const Pass& pass) { args.rows = pass.rows; }
inline void adapt(ActivationArgs& args, const Pass& pass) { args.rows = pass.rows; }
inline void adapt(ArgmaxArgs& args, const Pass& pass) { args.rows = pass.rows; }
inline void adapt(PositionArgs& args, const Pass& pass) { args.sequences = pass.sequences; }
inline void adapt(LastRowsArgs& args, const Pass& pass) { args.sequences = pass.sequences; }
inline void adapt(StoreArgs& args, const Pass& pass) { args.sequences = pass.sequences; }
inline void adapt(AttentionArgs& args, const Pass& pass) { args.sequences = pass.sequences; }
inline void adapt(EmbeddingArgs& args, const Pass& pass) {
  args.rows = pass.rows;
  args.ids = pass.tokens;
  for (int64_t i = 0; i < args.rows; ++i) {
    if (args.ids[i] < 0 || args.ids[i] >= args.table.n) {
      throw std::invalid_argument("there is a token " + std::to_string(args.ids[i]) + ", but the table has " +
                                  std::to_string(args.table.n) + " rows");
    }
  }
}

class Program {
 public:
  template <class Args>
  void add(const char* name, void (*operation)(const Args&, int), const Args& args) {
    names_.emplace_back(name);
    operations_.push_back([operation, args](const Pass& pass, int threads) {
      Args adapted = args;
      adapt(adapted, pass);
      operation(adapted, threads);
    });
    if constexpr (std::is_same_v<Args, LastRowsArgs>) before_last_rows_ = operations_.size();
  }

  const std::vector<std::string>& names() const { return names_; }

  // Throws std::invalid_argument for tokens that a table has not. `seconds`: null, or where the time of each operation
  // goes.
  void run(const Pass& pass, int threads, double* seconds) const;

 private:
  size_t before_last_rows_ = static_cast<size_t>(-1);  // operations that work on all rows
  std::vector<std::string> names_;
  std::vector<std::function<void(const Pass&, int)>> operations_;
};

}  // namespace llmpq

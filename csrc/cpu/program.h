// The operations of a pass, recorded once and run again for any number of rows.
#pragma once

#include <functional>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "cpu/experts.h"
#include "cpu/kernels.h"

namespace llmpq {

// What differs from one pass to the next.
struct Pass {
  int64_t rows;           // of every operation, up to one that leaves only the last of each sequence
  const int64_t* tokens;  // [rows], for the embedding; null where there is none
  Sequences sequences;    // for attention, and what else goes by positions
};

// On how many rows an operation works: as many as a pass has, or so many times as many. (Others go by sequences.)
inline int64_t& rows_of(GemmArgs& args) { return args.m; }
inline int64_t& rows_of(GroupedGemmArgs& args) { return args.tokens; }
inline int64_t& rows_of(HeadNormArgs& args) { return args.tokens; }
inline int64_t& rows_of(NormArgs& args) { return args.rows; }
inline int64_t& rows_of(ActivationArgs& args) { return args.rows; }
inline int64_t& rows_of(ScaleArgs& args) { return args.rows; }
inline int64_t& rows_of(RouteArgs& args) { return args.rows; }
inline int64_t& rows_of(CombineArgs& args) { return args.rows; }
inline int64_t& rows_of(ArgmaxArgs& args) { return args.rows; }
inline int64_t& rows_of(EmbeddingArgs& args) { return args.rows; }

template <class Args, class = void>
struct HasRows : std::false_type {};
template <class Args>
struct HasRows<Args, std::void_t<decltype(rows_of(std::declval<Args&>()))>> : std::true_type {};

// The arguments as those of another pass: buffers stay where they are, and begin with the rows in use.
template <class Args>
void adapt(Args& args, const Pass& pass, int64_t times) {
  if constexpr (HasRows<Args>::value) {
    rows_of(args) = pass.rows * times;
  } else {
    args.sequences = pass.sequences;
  }
}
inline void adapt(EmbeddingArgs& args, const Pass& pass, int64_t) {
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
  // The first operation says how many rows the pass has that is recorded. Throws std::runtime_error for a later one of
  // which the number of rows is no multiple of that.
  template <class Args>
  void add(const char* name, void (*operation)(const Args&, int), const Args& args) {
    int64_t times = 1;
    if constexpr (HasRows<Args>::value) {
      Args recorded = args;
      times = times_recorded(name, rows_of(recorded));
    }
    names_.emplace_back(name);
    operations_.push_back([operation, args, times](const Pass& pass, int threads) {
      Args adapted = args;
      adapt(adapted, pass, times);
      operation(adapted, threads);
    });
    if constexpr (std::is_same_v<Args, LastRowsArgs>) {
      before_last_rows_ = operations_.size();
      recorded_rows_ = args.sequences.count;
    }
  }

  const std::vector<std::string>& names() const { return names_; }

  // Throws std::invalid_argument for tokens that a table has not. `seconds`: null, or where the time of each operation
  // goes.
  void run(const Pass& pass, int threads, double* seconds) const;

 private:
  int64_t times_recorded(const char* name, int64_t rows);

  int64_t recorded_rows_ = 0;
  size_t before_last_rows_ = static_cast<size_t>(-1);  // operations that work on all rows
  std::vector<std::string> names_;
  std::vector<std::function<void(const Pass&, int)>> operations_;
};

}  // namespace llmpq

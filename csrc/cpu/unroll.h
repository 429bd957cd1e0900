// Loops that are written out, so that the arrays they index can live in registers, and their index be a constant.
#pragma once

#include <utility>

#define LLMPQ_INLINE inline __attribute__((always_inline))
#define LLMPQ_LAMBDA __attribute__((always_inline))

// Before a loop over a small constant range.
#if defined(__clang__)
#define LLMPQ_UNROLL _Pragma("unroll")
#else
#define LLMPQ_UNROLL _Pragma("GCC unroll 32")
#endif

namespace llmpq {

template <int N>
struct Index {
  static constexpr int value = N;
  LLMPQ_INLINE constexpr operator int() const { return N; }
};

template <class F, int... I>
LLMPQ_INLINE void unroll(F&& body, std::integer_sequence<int, I...>) {
  (body(Index<I>{}), ...);
}

// body(Index<0>), ..., body(Index<N - 1>): slow to compile, for where a template needs the index.
template <int N, class F>
LLMPQ_INLINE void unroll(F&& body) {
  unroll(body, std::make_integer_sequence<int, N>{});
}

}  // namespace llmpq

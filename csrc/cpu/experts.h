// A mixture of experts: which of them each token goes to, their products, and the sum of what they give.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "gemm.h"

namespace llmpq {

// The experts of each row's largest logits, the largest first, of equal ones the first expert; and their weights: the
// softmax over all experts or the sigmoid, divided by the sum of the chosen where they are normalized.
struct RouteArgs {
  const float* logits;  // [rows, experts], rows `stride` elements apart
  int32_t* chosen;      // [rows, per_token]
  float* weights;       // [rows, per_token]
  int64_t rows, experts, per_token, stride;
  bool normalized, sigmoid;
};

// Row i * per_token + j of y = a row of x, times the weight of expert chosen[i, j]. Of x that is row i, or the same row
// as of y where it has one for each choice. All have the bits that `gemm` gives them.
struct GroupedGemmArgs {
  std::shared_ptr<const std::vector<GemmArgs>> experts;  // weights and biases of one n, k and kind
  const void* x;                                         // rows x_stride elements apart
  const int32_t* chosen;                                 // [tokens, per_token]
  void* y;                                               // [tokens * per_token, n]
  int64_t tokens, per_token, x_stride;
  bool row_for_each_choice;
  Dtype x_dtype;
  Activations activations;
};

// y[i] = the sum over j, in this order, of weights[i, j] * x[i * per_token + j], plus residual[i].
struct CombineArgs {
  const float* x;        // [rows * per_token, size]
  const float* weights;  // [rows, per_token]
  const float* residual;  // [rows, size]
  float* y;               // [rows, size]; may be the residual
  int64_t rows, per_token, size;
};

void route(const RouteArgs& args, int threads);
void grouped_gemm(const GroupedGemmArgs& args, int threads);  // throws std::invalid_argument for experts not there
void combine(const CombineArgs& args, int threads);

}  // namespace llmpq

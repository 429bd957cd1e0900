// One product of a warpgroup over the emulated machine, right or with a fault that the machine is to show.
//
//     products FAULT HASTY
//
// It says "right" or "wrong", or ends where the machine notices.
#include <string>

#include "cuda/ptx.cuh"

namespace {

using namespace llmpq;

constexpr int kRows = 32, kDepth = 16;  // of x; the left factor has 64 rows

std::string fault;

float left_at(int row, int k) { return static_cast<float>((row * 7 + k * 3) % 11 - 5); }
float x_at(int row, int k) { return static_cast<float>((row * 5 + k * 2) % 13 - 6); }

struct Args {
  const uint4* x;  // its two cores of 8 columns, each of all rows
  float* y;        // [64, kRows]
};

void kernel(const Args args) {
  const int thread = static_cast<int>(threadIdx.x), lane = thread % kLanes, row = thread / kLanes * 16 + lane / 4;
  const auto pair = [&](int row, int k) { return BFloat2::of(left_at(row, k), left_at(row, k + 1)); };
  const int k = lane % 4 * 2;
  BFloat2 left[1][4] = {{pair(row, k), pair(row + 8, k), pair(row, k + 8), pair(row + 8, k + 8)}};
  float sums[kRows / 8][4] = {};
  if (thread < 2 * kRows) copy_16_bytes(shared_memory() + 16 * thread, args.x + thread);
  end_copy_batch();
  wait_for_copies<0>();
  if (fault != "not shown") show_to_products();
  sync_block();
  const int k_step = kRows * 16, row_step = 8 * 16;
  const uint64_t x = fault == "steps swapped" ? matrix_in_shared(shared_memory(), row_step, k_step)
                                              : matrix_in_shared(shared_memory(), k_step, row_step);
  if (fault != "no fence") begin_products(left);
  set_product(sums, left[0], x);
  end_products();
  if (fault == "left factor overwritten") left[0][2] = BFloat2{0};
  if (fault == "sums overwritten") sums[1][2] = 0.0f;
  if (fault != "no wait") wait_for_products<0>();
  for (int i = 0; i < kRows / 2; ++i) {
    args.y[(row + i % 4 / 2 * 8) * kRows + i / 4 * 8 + lane % 4 * 2 + i % 2] = sums[i / 4][i % 4];
  }
  wait_for_products<0>();
}

}  // namespace

int main(int, char** arguments) {
  fault = arguments[1];
  emulation::hasty = arguments[2] == std::string("1");
  std::vector<uint4> x(2 * kRows);
  for (int i = 0; i < 2 * kRows; ++i) {
    const auto word = [&](int j) {
      const int row = i % kRows, k = i / kRows * 8 + 2 * j;
      return BFloat2::of(x_at(row, k), x_at(row, k + 1)).bits;
    };
    x[i] = {word(0), word(1), word(2), word(3)};
  }
  std::vector<float> y(64 * kRows);
  launch(&kernel, Args{x.data(), y.data()}, {1, 128, 4096}, nullptr);
  bool right = true;
  for (int row = 0; row < 64; ++row) {
    for (int column = 0; column < kRows; ++column) {
      float expected = 0.0f;  // whole numbers: exact in any order
      for (int k = 0; k < kDepth; ++k) expected += left_at(row, k) * x_at(column, k);
      right = right && y[row * kRows + column] == expected;
    }
  }
  std::puts(right ? "right" : "wrong");
}

// Matrices that a warp loads from shared memory of the emulated machine, rightly or with a fault that it is to show.
//
//     matrices FAULT HASTY
//
// It says "right" or "wrong", or ends where the machine notices.
#include <string>

#include "cuda/ptx.cuh"

namespace {

using namespace llmpq;

constexpr int kMatrices = 4, kRows = 8, kRowBytes = 16;

std::string fault;

uint32_t value_at(int matrix, int row, int column) { return matrix * 64 + row * 8 + column; }

struct Args {
  bool* right;
};

void kernel(const Args args) {
  const int lane = static_cast<int>(threadIdx.x), g = lane / 4, t = lane % 4;
  auto* values = reinterpret_cast<uint16_t*>(shared_memory());
  for (int column = 0; column < 8; ++column) values[lane * 8 + column] = value_at(lane / 8, lane % 8, column);
  sync_block();
  SharedAddress row = shared_address(shared_memory()) + lane * kRowBytes;
  if (fault == "not aligned") row = row + 4;
  if (fault == "outside") row = row + 4096;
  if (fault == "rows swapped") row = shared_address(shared_memory()) + (lane ^ 1) * kRowBytes;
  if (fault == "a lane missing" && lane == 5) return;
  uint32_t words[kMatrices], pairs[kMatrices], two[2];
  load_matrices(words, row);
  load_transposed(pairs, row);
  load_transposed(two, row);
  for (int i = 0; i < kMatrices; ++i) {
    const bool right = words[i] == (value_at(i, g, 2 * t) | value_at(i, g, 2 * t + 1) << 16) &&
                       pairs[i] == (value_at(i, 2 * t, g) | value_at(i, 2 * t + 1, g) << 16) &&
                       (i >= 2 || two[i] == pairs[i]);
    *args.right = *args.right && right;
  }
}

}  // namespace

int main(int, char** arguments) {
  fault = arguments[1];
  emulation::hasty = arguments[2] == std::string("1");
  bool right = true;
  launch(&kernel, Args{&right}, {1, 32, 2048}, nullptr);
  std::puts(right ? "right" : "wrong");
}

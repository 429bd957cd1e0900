// Memory for the time of a call.
#pragma once

#include <cstddef>
#include <cstdint>

namespace llmpq {

// What it is for: a thread may use one of each at once.
enum class Scratch : int { kRows, kPanels, kAttention, kPartials, kCount };

// Memory of the calling thread, on a cache line's boundary, that is kept for its next call: getting pages anew takes as
// long as a small product. What lies in it is of no meaning.
uint8_t* scratch(Scratch use, size_t bytes);

inline float* scratch_floats(Scratch use, size_t count) {
  return reinterpret_cast<float*>(scratch(use, count * sizeof(float)));
}

}  // namespace llmpq

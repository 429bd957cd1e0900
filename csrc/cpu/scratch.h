// Memory of a thread that is kept for its next call, since getting pages anew takes as long as a small operation.
#pragma once

#include <cstddef>
#include <vector>

namespace llmpq {

class Scratch {
 public:
  float* floats(size_t count) {
#if defined(__SANITIZE_ADDRESS__)
    std::vector<float>(count).swap(memory_);  // so that nothing beyond what was asked for goes unseen
#else
    if (memory_.size() < count) memory_.resize(count);
#endif
    return memory_.data();
  }

 private:
  std::vector<float> memory_;
};

}  // namespace llmpq

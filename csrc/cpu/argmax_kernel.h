// The column of the largest number of a row, for an instruction set V.
#pragma once

#include "cpu/kernels.h"

namespace llmpq {

// Of equal ones the first. A NaN counts as the smallest.
template <class V>
int64_t argmax_row(const float* x, int64_t size) {
  constexpr int64_t kStretch = 64 * kLanes;
  float largest = -__builtin_inff();
  int64_t stretch = 0;  // where it is
  for (int64_t first = 0; first < size; first += kStretch) {
    const int64_t end = first + kStretch < size ? first + kStretch : size;
    auto found = V::broadcast(largest);
    int64_t i = first;
    for (; i + kLanes <= end; i += kLanes) found = V::max(V::load(x + i), found);
    float larger = V::largest(found);
    for (; i < end; ++i) larger = x[i] > larger ? x[i] : larger;
    if (larger > largest) largest = larger, stretch = first;
  }
  while (stretch < size - 1 && x[stretch] != largest) ++stretch;
  return x[stretch] == largest ? stretch : 0;
}

}  // namespace llmpq

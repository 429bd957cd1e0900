// Rows of a weight on their way into panels, once, when it is loaded. One thread: this is faster than reading a file.
#include <algorithm>
#include <type_traits>

#include "cpu/kernels.h"

namespace llmpq {
namespace {

// Rows [first, first + count) of a weight, of which there are no others in their panel.
template <class T>
void fill_panel(const PanelArgs& args, int64_t first, int count) {
  const T* rows = static_cast<const T*>(args.rows) + (first - args.first_row) * args.row_stride;
  T* panel = static_cast<T*>(args.panels) + first / kLanes * args.panel_columns * kLanes + first % kLanes;
  const auto fill = [&](auto lanes) {
    for (int64_t column = 0; column < args.columns; ++column) {
      for (int i = 0; i < lanes; ++i) panel[column * kLanes + i] = rows[i * args.row_stride + column];
    }
  };
  if (count == kLanes) {
    fill(std::integral_constant<int, kLanes>{});  // whose loop is unrolled
  } else {
    fill(count);
  }
}

template <class T>
void fill(const PanelArgs& args) {
  const int64_t end = args.first_row + args.count;
  for (int64_t first = args.first_row, next; first < end; first = next) {
    next = std::min(end, (first / kLanes + 1) * kLanes);
    fill_panel<T>(args, first, static_cast<int>(next - first));
  }
}

}  // namespace

void fill_panels(const PanelArgs& args) {
  switch (args.bytes) {
    case 1: return fill<uint8_t>(args);
    case 2: return fill<uint16_t>(args);
    default: return fill<uint32_t>(args);
  }
}

}  // namespace llmpq

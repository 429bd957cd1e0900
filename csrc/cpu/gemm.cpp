// Matrix products, of one weight or of many experts', and look-ups: cut into tasks, put x in the order the kernels read
// it, share the panels out to threads.
#include <algorithm>
#include <atomic>
#include <cstring>
#include <numeric>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <vector>

#include "cpu/experts.h"
#include "cpu/half.h"
#include "cpu/kernels.h"
#include "cpu/scratch.h"
#include "cpu/threads.h"

namespace llmpq {
namespace {

constexpr int64_t kWorkPerThread = 1 << 19;  // multiplications below which another thread costs more than it gives
constexpr int kTasksPerThread = 4;           // so that a thread that is held up does not hold up all
constexpr int64_t kPackedBytes = 3 << 18;    // of x in a task, so that they stay in an L2 cache of 1 MiB
constexpr int kReadingRows = 2;              // of x whose product with a weight takes as long as reading it

const GemmKernel<FloatRows>& kernel_for(const FloatRows&, int64_t) { return kernels().gemm; }
const GemmKernel<Int8Rows>& kernel_for(const Int8Rows& x, int64_t rows) { return kernels().int8_kernel(rows * x.terms); }

int terms_of(const FloatRows&) { return 1; }
int terms_of(const Int8Rows& x) { return x.terms; }

// Of a row of x whose blocks come in so many together.
int64_t value_bytes(const GemmArgs& a, const FloatRows&, int blocks) {
  return ceil_div(a.k, blocks * kBlock) * blocks * kBlock * sizeof(float);
}
int64_t value_bytes(const GemmArgs& a, const Int8Rows& x, int blocks) {
  return ceil_div(a.k, blocks * kBlock) * blocks * kBlock * x.terms;
}

// What `rows` rows, of `bytes` each, and the numbers that go with them take.
int64_t packed_bytes(const GemmArgs& a, const FloatRows&, int64_t rows, int64_t bytes) {
  return rows * (bytes + ceil_div(a.k, kBlock) * sizeof(float));
}
int64_t numbers_of(const GemmArgs& a, const Int8Rows& x, int64_t rows) {
  return rows * x.terms * ceil_div(ceil_div(a.k, kBlock), x.group_blocks);
}
int64_t packed_bytes(const GemmArgs& a, const Int8Rows& x, int64_t rows, int64_t bytes) {
  const int64_t numbers = numbers_of(a, x, rows), totals = a.offsets != nullptr ? numbers / x.terms : 0;
  return rows * bytes + numbers * (sizeof(float) + sizeof(int32_t)) + totals * sizeof(float);
}

// Give them their memory.
void place(const GemmArgs&, FloatRows& x, int64_t rows, int64_t bytes, uint8_t* memory) {
  x.values = reinterpret_cast<float*>(memory);
  x.sums = reinterpret_cast<float*>(memory + rows * bytes);
}
void place(const GemmArgs& a, Int8Rows& x, int64_t rows, int64_t bytes, uint8_t* memory) {
  const int64_t numbers = numbers_of(a, x, rows);
  x.values = reinterpret_cast<int8_t*>(memory);
  x.scales = reinterpret_cast<float*>(memory + rows * bytes);
  x.sums = reinterpret_cast<int32_t*>(x.scales + numbers);
  x.totals = reinterpret_cast<float*>(x.sums + numbers);
}

// Some rows of x with one weight.
template <class Rows>
struct Product {
  const GemmKernel<Rows>* kernel;
  GemmTask<Rows> task;
  int64_t first_tile, first_share;  // among those of all products that are computed together
  int64_t share_panels;             // a share of the work is so many panels

  int64_t panels() const { return ceil_div(task.args->n, kLanes); }
  int64_t row_bytes() const { return value_bytes(*task.args, task.x, kernel->whole_tiles ? 2 : 1); }
  int64_t packed_rows() const {
    return kernel->whole_tiles ? task.tiles * (kernel->tile_rows / terms_of(task.x)) : task.rows;
  }
  int64_t bytes() const { return packed_bytes(*task.args, task.x, packed_rows(), row_bytes()); }
};

// The product that an item belongs to, where each one's items begin at its `first`.
template <class Rows>
const Product<Rows>& holder(const Product<Rows>* products, int64_t count, int64_t item,
                            int64_t Product<Rows>::*first) {
  const auto* after = std::upper_bound(products, products + count, item, [&](int64_t i, const Product<Rows>& product) {
    return i < product.*first;
  });
  return after[-1];
}

// Products side by side, of weights of one n and k: all rows of x are packed before panels are multiplied.
template <class Rows>
void multiply_together(Product<Rows>* products, int64_t count, int threads) {
  constexpr int64_t kLine = 64;
  int64_t bytes = 0, tiles = 0, shares = 0, rows = 0;
  for (int64_t i = 0; i < count; ++i) bytes = ceil_div(bytes, kLine) * kLine + products[i].bytes();
  uint8_t* memory = scratch(Scratch::kRows, bytes);
  for (int64_t i = 0; i < count; ++i) {
    Product<Rows>& product = products[i];
    place(*product.task.args, product.task.x, product.packed_rows(), product.row_bytes(), memory);
    memory += ceil_div(product.bytes(), kLine) * kLine;
    product.first_tile = tiles;
    tiles += product.task.tiles;
    rows += product.task.rows;
  }
  const GemmArgs& args = *products->task.args;
  const int used = useful_threads(rows * args.n * args.k, kWorkPerThread, threads);
  // Each gets shares by its part in the work, so that they take about equally long.
  const int64_t work = rows + count * kReadingRows;
  for (int64_t i = 0; i < count; ++i) {
    Product<Rows>& product = products[i];
    const int64_t wanted = ceil_div(used * kTasksPerThread * (product.task.rows + kReadingRows), work);
    const int64_t share = used == 1 ? product.panels() : ceil_div(product.panels(), wanted);
    product.share_panels = ceil_div(share, product.kernel->panels) * product.kernel->panels;
    product.first_share = shares;
    shares += ceil_div(product.panels(), product.share_panels);
  }
  // One loop for both, since handing over takes as long as packing a few rows. Items are begun in order, so those that
  // pack are done or under way when the first share asks for them.
  std::atomic<int64_t> packed{0};
  parallel_for(tiles + shares, used, [&](int64_t item) {
    if (item < tiles) {
      const Product<Rows>& product = holder(products, count, item, &Product<Rows>::first_tile);
      const int tile = static_cast<int>(item - product.first_tile);
      for (int r = 0; r < product.task.tile_rows(tile); ++r) product.kernel->pack(product.task, tile, r);
      packed.fetch_add(1, std::memory_order_release);
      return;
    }
    spin_until([&] { return packed.load(std::memory_order_acquire) == tiles; });
    const Product<Rows>& product = holder(products, count, item - tiles, &Product<Rows>::first_share);
    const int64_t begin = (item - tiles - product.first_share) * product.share_panels;
    product.kernel->multiply(product.task, begin, std::min(product.panels(), begin + product.share_panels));
  });
}

// In parts whose packed rows fit kPackedBytes, as those of each product do.
template <class Rows>
void multiply(std::vector<Product<Rows>>& products, int threads) {
  for (size_t begin = 0, end = 0; begin < products.size(); begin = end) {
    int64_t bytes = products[end++].bytes();
    while (end < products.size() && (bytes += products[end].bytes()) <= kPackedBytes) ++end;
    multiply_together(&products[begin], end - begin, threads);
  }
}

// Products of the rows from first_row on of those that `args`, or lists of rows, mean: as many as fit kPackedBytes each.
template <class Rows>
void add_products(std::vector<Product<Rows>>& products, const GemmArgs& args, const Rows& x, int64_t first_row = 0,
                  const int32_t* x_rows = nullptr, const int32_t* y_rows = nullptr) {
  const GemmKernel<Rows>& kernel = kernel_for(x, args.m);
  const int tile_rows = kernel.tile_rows / terms_of(x);
  const int64_t bytes = value_bytes(args, x, kernel.whole_tiles ? 2 : 1);
  const int64_t most = std::max<int64_t>(1, kPackedBytes / bytes / tile_rows) * tile_rows;
  for (int64_t row = 0; row < args.m; row += most) {
    const int rows = static_cast<int>(std::min(most, args.m - row));
    const int tiles = static_cast<int>(ceil_div(rows, tile_rows));
    products.push_back({&kernel, {&args, first_row + row, rows, tiles, x, x_rows, y_rows}, 0, 0, 0});
  }
}

// body(rows) with the kind of rows that x becomes for a weight.
template <class Body>
void with_rows(const GemmArgs& weight, Activations activations, const Body& body) {
  if (activations == Activations::kFloat) return body(FloatRows{});
  Int8Rows x{};
  x.terms = activations == Activations::kInt8 ? 1 : 2;
  x.group_blocks = static_cast<int>(std::min<int64_t>(ceil_div(weight.group_size, kBlock), kMaxGroupBlocks));
  body(x);
}

// The choices of all tokens, those of an expert from starts[expert] on, in their own order.
struct Groups {
  std::vector<int64_t> starts;
  std::vector<int32_t> choices;

  explicit Groups(const GroupedGemmArgs& args)
      : starts(args.experts->size() + 1, 0), choices(args.tokens * args.per_token) {
    const int64_t experts = args.experts->size();
    for (size_t i = 0; i < choices.size(); ++i) {
      const int32_t expert = args.chosen[i];
      if (expert < 0 || expert >= experts) {
        throw std::invalid_argument("experts names " + std::to_string(expert) + ", but there are " +
                                    std::to_string(experts));
      }
      ++starts[expert + 1];
    }
    std::partial_sum(starts.begin(), starts.end(), starts.begin());
    std::vector<int64_t> next(starts);
    for (size_t i = 0; i < choices.size(); ++i) choices[next[args.chosen[i]]++] = static_cast<int32_t>(i);
  }
};

}  // namespace

void gemm(const GemmArgs& args, int threads) {
  with_rows(args, args.activations, [&](const auto& x) {
    std::vector<Product<std::decay_t<decltype(x)>>> products;
    add_products(products, args, x);
    multiply(products, threads);
  });
}

void grouped_gemm(const GroupedGemmArgs& args, int threads) {
  const std::vector<GemmArgs>& experts = *args.experts;
  const Groups groups(args);
  std::vector<int32_t> x_rows(groups.choices);
  if (!args.row_for_each_choice) {
    for (int32_t& row : x_rows) row /= static_cast<int32_t>(args.per_token);
  }
  with_rows(experts[0], args.activations, [&](const auto& x) {
    std::vector<Product<std::decay_t<decltype(x)>>> products;
    std::vector<GemmArgs> chosen;
    chosen.reserve(experts.size());  // so that products can point to them
    for (size_t expert = 0; expert < experts.size(); ++expert) {
      const int64_t first = groups.starts[expert], rows = groups.starts[expert + 1] - first;
      if (rows == 0) continue;
      GemmArgs& gemm = chosen.emplace_back(experts[expert]);
      gemm.x = args.x;
      gemm.y = args.y;
      gemm.m = rows;
      gemm.x_stride = args.x_stride;
      gemm.y_stride = gemm.n;
      gemm.x_dtype = args.x_dtype;
      gemm.activations = args.activations;
      add_products(products, gemm, x, first, x_rows.data(), groups.choices.data());
    }
    multiply(products, threads);
  });
}

namespace {

// The 32 codes of a row (lane) in one block of a panel.
void read_block(const uint8_t* block, int lane, int bits, int* codes) {
  uint32_t words[8] = {};
  for (int w = 0; w < bits; ++w) std::memcpy(&words[w], block + (w * kLanes + lane) * 4, 4);
  if (bits == 3) {
    words[3] = (words[0] >> 3 & 0x11111111) | (words[1] >> 2 & 0x22222222) | (words[2] >> 1 & 0x44444444);
  }
  const int each = bits == 8 ? 8 : 4, in_word = 32 / each, mask = (1 << bits) - 1;
  for (int i = 0; i < kBlock; ++i) codes[i] = static_cast<int>(words[i / in_word] >> i % in_word * each) & mask;
}

void read_row(const GemmArgs& a, int64_t id, float* y) {
  const int64_t panel = id / kLanes, blocks = ceil_div(a.k, kBlock);
  const int lane = static_cast<int>(id % kLanes);
  if (a.bits == 16) {
    const auto* weights = static_cast<const uint16_t*>(a.qweight) + panel * blocks * kBlock * kLanes + lane;
    for (int64_t i = 0; i < a.k; ++i) y[i] = float_of(weights[i * kLanes], a.scale_dtype);
    return;
  }
  const int64_t block_bytes = kLanes * kBlock * a.bits / 8;
  const int64_t groups = ceil_div(a.k, a.group_size);
  for (int64_t block = 0; block < blocks; ++block) {
    const int64_t at = (panel * groups + block * kBlock / a.group_size) * kLanes + lane;
    const float scale = float_of(static_cast<const uint16_t*>(a.scales)[at], a.scale_dtype);
    const float offset = a.offsets ? float_of(static_cast<const uint16_t*>(a.offsets)[at], a.scale_dtype) : 0.0f;
    const int zero = a.offsets ? 0 : a.zeros ? static_cast<const uint8_t*>(a.zeros)[at] : 1 << (a.bits - 1);
    int codes[kBlock];
    read_block(static_cast<const uint8_t*>(a.qweight) + (panel * blocks + block) * block_bytes, lane, a.bits, codes);
    const int64_t count = std::min<int64_t>(kBlock, a.k - block * kBlock);
    for (int64_t i = 0; i < count; ++i) y[block * kBlock + i] = scale * static_cast<float>(codes[i] - zero) + offset;
  }
}

}  // namespace

void embedding(const EmbeddingArgs& args, int threads) {
  const int64_t size = args.table.k;
  parallel_for(args.rows, useful_threads(args.rows * size * 8, kWorkPerThread, threads),
               [&](int64_t row) { read_row(args.table, args.ids[row], args.y + row * size); });
}

}  // namespace llmpq

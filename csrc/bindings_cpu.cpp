// Python's way to the CPU kernels: integers become pointers and struct fields, the GIL is released. Shapes and types
// are checked in llmpq/kernels.
#include <pybind11/pybind11.h>
#include <sys/mman.h>

#include <algorithm>

#include "cpu/kernels.h"

namespace py = pybind11;
using llmpq::Dtype;

namespace {

using Address = uintptr_t;

template <class T>
T* pointer(Address address) {
  return reinterpret_cast<T*>(address);  // NOLINT(performance-no-int-to-ptr)
}

llmpq::GemmArgs gemm_args(Address x, Address qweight, Address scales, Address zeros, Address bias, Address y, int64_t m,
                          int64_t n, int64_t k, int64_t x_stride, int64_t y_stride, int64_t group_size, int bits,
                          bool bfloat16) {
  return {pointer<void>(x),
          pointer<void>(qweight),
          pointer<void>(scales),
          pointer<void>(zeros),
          pointer<void>(bias),
          pointer<void>(y),
          m,
          n,
          k,
          x_stride,
          y_stride,
          group_size,
          bits,
          Dtype::kFloat32,
          bfloat16 ? Dtype::kBFloat16 : Dtype::kFloat16};
}

// Ask for 2 MiB pages in what lies whole within the buffer: a kernel that streams weights is a sixth faster with them.
void advise_huge_pages(Address address, size_t bytes) {
#if defined(MADV_HUGEPAGE)
  constexpr Address kPage = Address{2} << 20;
  const Address first = (address + kPage - 1) / kPage * kPage, last = (address + bytes) / kPage * kPage;
  if (first < last) madvise(pointer<void>(first), last - first, MADV_HUGEPAGE);
#else
  (void)address, (void)bytes;
#endif
}

}  // namespace

PYBIND11_MODULE(_cpu, module) {
  using Release = py::call_guard<py::gil_scoped_release>;
  module.doc() =
      "CPU kernels. Arguments are addresses, sizes and strides in elements; see csrc/gemm.h, csrc/cpu/kernels.h.";
  module.def("isa", [] { return llmpq::kernels().isa; });
  module.def("advise_huge_pages", &advise_huge_pages, py::arg("address"), py::arg("bytes"));
  module.def(
      "gemm",
      [](Address x, Address qweight, Address scales, Address zeros, Address bias, Address y, int64_t m, int64_t n,
         int64_t k, int64_t x_stride, int64_t y_stride, int64_t group_size, int bits, bool bfloat16, int threads) {
        llmpq::gemm(
            gemm_args(x, qweight, scales, zeros, bias, y, m, n, k, x_stride, y_stride, group_size, bits, bfloat16),
            threads);
      },
      Release());
  module.def(
      "embedding",
      [](Address ids, Address qweight, Address scales, Address zeros, Address y, int64_t m, int64_t n, int64_t k,
         int64_t group_size, int bits, bool bfloat16, int threads) {
        llmpq::embedding(gemm_args(ids, qweight, scales, zeros, 0, y, m, n, k, 0, k, group_size, bits, bfloat16),
                         threads);
      },
      Release());
  module.def(
      "attention",
      [](Address q, Address k_cache, Address v_cache, Address out, Address slots, Address query_lens,
         Address context_lens, int64_t sequences, int64_t heads, int64_t kv_heads, int64_t head_dim, int64_t max_len,
         int64_t q_stride, float scale, int threads) {
        llmpq::attention({pointer<float>(q), pointer<float>(k_cache), pointer<float>(v_cache), pointer<float>(out),
                          pointer<int32_t>(slots), pointer<int32_t>(query_lens), pointer<int32_t>(context_lens),
                          sequences, heads, kv_heads, head_dim, max_len, q_stride, scale},
                         threads);
      },
      Release());
  const auto define_norm = [&](const char* name, void (*norm)(const llmpq::NormArgs&, int)) {
    module.def(
        name,
        [norm](Address x, Address weight, Address bias, Address y, int64_t rows, int64_t size, int64_t x_stride,
               float eps, int threads) {
          norm({pointer<float>(x), pointer<float>(weight), pointer<float>(bias), pointer<float>(y), rows, size,
                x_stride, eps},
               threads);
        },
        Release());
  };
  define_norm("rms_norm", &llmpq::rms_norm);
  define_norm("layer_norm", &llmpq::layer_norm);
}

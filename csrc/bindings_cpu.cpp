// Python's way to the CPU kernels: integers become pointers and struct fields, the GIL is released. Shapes and types
// are checked in llmpq/kernels.
#include <pybind11/pybind11.h>
#include <sys/mman.h>

#include "cpu/kernels.h"
#include "cpu/threads.h"

namespace py = pybind11;
using llmpq::Dtype;

namespace {

using Address = uintptr_t;

template <class T>
T* pointer(Address address) {
  return reinterpret_cast<T*>(address);  // NOLINT(performance-no-int-to-ptr)
}

// A prepared weight: what a call needs to know of it, looked up once. The memory belongs to the caller.
llmpq::GemmArgs weight(Address qweight, Address scales, Address zeros, int64_t n, int64_t k, int64_t group_size,
                       int bits, bool bfloat16, bool offset) {
  llmpq::GemmArgs args{};
  args.qweight = pointer<void>(qweight);
  args.scales = pointer<void>(scales);
  (offset ? args.offsets : args.zeros) = pointer<void>(zeros);
  args.n = n;
  args.k = k;
  args.group_size = group_size;
  args.bits = bits;
  args.scale_dtype = bfloat16 ? Dtype::kBFloat16 : Dtype::kFloat16;
  return args;
}

llmpq::KvCache kv_cache(Address keys, Address values, int64_t kv_heads, int64_t head_dim, int64_t max_len,
                        bool float16) {
  return {pointer<void>(keys), pointer<void>(values), kv_heads, head_dim, max_len,
          float16 ? Dtype::kFloat16 : Dtype::kFloat32};
}

llmpq::Sequences sequences(Address slots, Address query_lens, Address context_lens, int64_t count) {
  return {pointer<int32_t>(slots), pointer<int32_t>(query_lens), pointer<int32_t>(context_lens), count};
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
  module.def("keep_awake", &llmpq::keep_awake, py::arg("yes"));
  py::class_<llmpq::GemmArgs>(module, "Weight").def(py::init(&weight));
  module.def(
      "gemm",
      [](llmpq::GemmArgs args, Address x, Address bias, Address y, int64_t m, int64_t x_stride, int64_t y_stride,
         bool bfloat16, int activations, int threads) {
        args.x = pointer<void>(x);
        args.bias = pointer<void>(bias);
        args.y = pointer<void>(y);
        args.m = m;
        args.x_stride = x_stride;
        args.y_stride = y_stride;
        args.x_dtype = bfloat16 ? Dtype::kBFloat16 : Dtype::kFloat32;
        args.activations = static_cast<llmpq::Activations>(activations);
        llmpq::gemm(args, threads);
      },
      Release());
  module.def(
      "embedding",
      [](llmpq::GemmArgs args, Address ids, Address y, int64_t m, int threads) {
        args.x = pointer<void>(ids);
        args.y = pointer<void>(y);
        args.m = m;
        args.y_stride = args.k;
        llmpq::embedding(args, threads);
      },
      Release());
  py::class_<llmpq::KvCache>(module, "KvCache").def(py::init(&kv_cache));
  module.def(
      "rotate_and_store",
      [](const llmpq::KvCache& cache, Address qkv, Address cos, Address sin, Address slots, Address query_lens,
         Address context_lens, int64_t count, int64_t heads, int64_t stride, int threads) {
        llmpq::rotate_and_store({pointer<float>(qkv), pointer<float>(cos), pointer<float>(sin), cache,
                                 sequences(slots, query_lens, context_lens, count), heads, stride},
                                threads);
      },
      Release());
  module.def(
      "attention",
      [](const llmpq::KvCache& cache, Address q, Address out, Address slots, Address query_lens, Address context_lens,
         int64_t count, int64_t heads, int64_t q_stride, float scale, int threads) {
        llmpq::attention({pointer<float>(q), pointer<float>(out), cache,
                          sequences(slots, query_lens, context_lens, count), heads, q_stride, scale},
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

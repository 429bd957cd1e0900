// Python's way to the CPU kernels: integers become pointers and struct fields, the GIL is released. Shapes and types
// are checked in llmpq/kernels.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "cpu/experts.h"
#include "cpu/kernels.h"
#include "cpu/program.h"
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

llmpq::KvCache kv_cache(Address keys, Address values, Address key_scales, Address value_scales, int64_t kv_heads,
                        int64_t head_dim, int64_t blocks, int64_t slot_blocks, bool ring, int bytes) {
  return {pointer<void>(keys), pointer<void>(values), pointer<float>(key_scales), pointer<float>(value_scales),
          kv_heads,            head_dim,              blocks,                     slot_blocks,
          ring,                bytes};
}

llmpq::Sequences sequences(Address slots, Address query_lens, Address context_lens, Address tables, int64_t count,
                           int64_t columns) {
  return {pointer<int32_t>(slots), pointer<int32_t>(query_lens), pointer<int32_t>(context_lens),
          pointer<int32_t>(tables), count, columns};
}

thread_local llmpq::Program* recording = nullptr;  // where this thread's operations go instead of being carried out

template <class Args>
void submit(const char* name, void (*operation)(const Args&, int), const Args& args, int threads) {
  if (recording != nullptr) {
    recording->add(name, operation, args);
  } else {
    operation(args, threads);
  }
}

}  // namespace

PYBIND11_MODULE(_cpu, module) {
  using Release = py::call_guard<py::gil_scoped_release>;
  module.doc() =
      "CPU kernels. Arguments are addresses, sizes and strides in elements; see csrc/gemm.h, csrc/cpu/kernels.h.";
  module.def("isa", [] { return llmpq::kernels().isa; });
  module.def(
      "fill_panels",
      [](Address rows, Address panels, int64_t first_row, int64_t count, int64_t columns, int64_t row_stride,
         int64_t panel_columns, int bytes) {
        llmpq::fill_panels({pointer<void>(rows), pointer<void>(panels), first_row, count, columns, row_stride,
                            panel_columns, bytes});
      },
      Release());
  module.def(
      "time_hand_overs",
      [](int threads, int64_t count, Address seconds) {
        llmpq::time_hand_overs(threads, count, pointer<double>(seconds));
      },
      Release());
  py::class_<llmpq::GemmArgs>(module, "Weight").def(py::init(&weight));
  module.def(
      "gemm",
      [](llmpq::GemmArgs args, Address x, Address bias, Address y, int64_t m, int64_t x_stride, int64_t y_stride,
         bool bfloat16, int activations, int threads, Address residual) {
        args.x = pointer<void>(x);
        args.bias = pointer<void>(bias);
        args.residual = pointer<void>(residual);
        args.y = pointer<void>(y);
        args.m = m;
        args.x_stride = x_stride;
        args.y_stride = y_stride;
        args.x_dtype = bfloat16 ? Dtype::kBFloat16 : Dtype::kFloat32;
        args.activations = static_cast<llmpq::Activations>(activations);
        submit("gemm", &llmpq::gemm, args, threads);
      },
      Release());
  module.def(
      "grouped_gemm",
      [](std::vector<llmpq::GemmArgs> experts, Address x, Address chosen, Address biases, Address y, int64_t tokens,
         int64_t per_token, int64_t x_stride, bool row_for_each_choice, bool bfloat16, int activations, int threads) {
        for (size_t expert = 0; biases != 0 && expert < experts.size(); ++expert) {
          experts[expert].bias = pointer<float>(biases) + expert * experts[expert].n;
        }
        submit("grouped_gemm", &llmpq::grouped_gemm,
               {std::make_shared<const std::vector<llmpq::GemmArgs>>(std::move(experts)), pointer<void>(x),
                pointer<int32_t>(chosen), pointer<void>(y), tokens, per_token, x_stride, row_for_each_choice,
                bfloat16 ? Dtype::kBFloat16 : Dtype::kFloat32, static_cast<llmpq::Activations>(activations)},
               threads);
      },
      Release());
  module.def(
      "route",
      [](Address logits, Address chosen, Address weights, int64_t rows, int64_t experts, int64_t per_token,
         int64_t stride, bool normalized, bool sigmoid, int threads) {
        submit("route", &llmpq::route,
               {pointer<float>(logits), pointer<int32_t>(chosen), pointer<float>(weights), rows, experts, per_token,
                stride, normalized, sigmoid},
               threads);
      },
      Release());
  module.def(
      "combine",
      [](Address x, Address weights, Address residual, Address y, int64_t rows, int64_t per_token, int64_t size,
         int threads) {
        submit("combine", &llmpq::combine,
               {pointer<float>(x), pointer<float>(weights), pointer<float>(residual), pointer<float>(y), rows,
                per_token, size},
               threads);
      },
      Release());
  module.def(
      "embedding",
      [](const llmpq::GemmArgs& table, Address ids, Address y, int64_t rows, int threads) {
        submit("embedding", &llmpq::embedding, {table, pointer<int64_t>(ids), pointer<float>(y), rows}, threads);
      },
      Release());
  py::class_<llmpq::Sequences>(module, "Sequences").def(py::init(&sequences));
  py::class_<llmpq::KvCache>(module, "KvCache").def(py::init(&kv_cache));
  module.def(
      "rotate_and_store",
      [](const llmpq::KvCache& cache, const llmpq::Sequences& sequences, Address qkv, Address cos, Address sin,
         int64_t heads, int64_t stride, int64_t rotated, int threads) {
        submit("rotate_and_store", &llmpq::rotate_and_store,
               {pointer<float>(qkv), pointer<float>(cos), pointer<float>(sin), cache, sequences, heads, stride,
                rotated},
               threads);
      },
      Release());
  module.def(
      "attention",
      [](const llmpq::KvCache& cache, const llmpq::Sequences& sequences, Address q, Address out, int64_t heads,
         int64_t q_stride, float scale, int64_t window, float cap, Address sinks, Address slopes, int threads) {
        submit("attention", &llmpq::attention,
               {pointer<float>(q), pointer<float>(out), cache, sequences, heads, q_stride, scale, window, cap,
                pointer<float>(sinks), pointer<float>(slopes)},
               threads);
      },
      Release());
  const auto define_norm = [&](const char* name, void (*norm)(const llmpq::NormArgs&, int)) {
    module.def(
        name,
        [name, norm](Address x, Address weight, Address bias, Address residual, Address y, int64_t rows, int64_t size,
               int64_t x_stride, float eps, int threads) {
          submit(name, norm,
                 {pointer<float>(x), pointer<float>(weight), pointer<float>(bias), pointer<float>(residual),
                  pointer<float>(y), rows, size, x_stride, eps},
                 threads);
        },
        Release());
  };
  define_norm("rms_norm", &llmpq::rms_norm);
  define_norm("layer_norm", &llmpq::layer_norm);
  module.def(
      "head_norm",
      [](Address x, Address weight, int64_t tokens, int64_t groups, int64_t size, int64_t stride, float eps,
         int threads) {
        submit("head_norm", &llmpq::head_norm,
               {pointer<float>(x), pointer<float>(weight), tokens, groups, size, stride, eps}, threads);
      },
      Release());
  module.def(
      "scale",
      [](Address x, int64_t rows, int64_t size, int64_t stride, float factor, float cap, int threads) {
        submit("scale", &llmpq::scale, {pointer<float>(x), rows, size, stride, factor, cap}, threads);
      },
      Release());
  module.def(
      "activate",
      [](Address x, int64_t rows, int64_t size, int64_t stride, int activation, bool gated, int threads) {
        submit("activation", &llmpq::activate,
               {pointer<float>(x), rows, size, stride, static_cast<llmpq::Activation>(activation), gated}, threads);
      },
      Release());
  module.def(
      "add_positions",
      [](const llmpq::Sequences& sequences, Address table, Address y, int64_t size, int threads) {
        submit("positions", &llmpq::add_positions, {pointer<float>(table), pointer<float>(y), size, sequences}, threads);
      },
      Release());
  module.def(
      "last_rows",
      [](const llmpq::Sequences& sequences, Address x, Address y, int64_t size, int threads) {
        submit("last_rows", &llmpq::last_rows, {pointer<float>(x), pointer<float>(y), size, sequences}, threads);
      },
      Release());
  module.def(
      "argmax",
      [](Address x, Address columns, int64_t rows, int64_t size, int threads) {
        submit("argmax", &llmpq::argmax, {pointer<float>(x), pointer<int64_t>(columns), rows, size}, threads);
      },
      Release());
  // Between begin and end this thread's operations are recorded instead of carried out.
  py::class_<llmpq::Program>(module, "Program")
      .def(py::init())
      .def("begin", [](llmpq::Program& program) { recording = &program; })
      .def("end", [](llmpq::Program&) { recording = nullptr; })
      .def_property_readonly("names", &llmpq::Program::names)
      .def(
          "run",
          [](const llmpq::Program& program, int64_t rows, Address tokens, const llmpq::Sequences* sequences, int threads,
             Address seconds) {
            const llmpq::Sequences none{};
            program.run({rows, pointer<int64_t>(tokens), sequences != nullptr ? *sequences : none}, threads,
                        pointer<double>(seconds));
          },
          Release());
}

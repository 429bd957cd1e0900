// Python module llmpq._cuda: integers become pointers, CUDA errors become exceptions. No arithmetic.
//
// llmpq/kernels/backends/cuda.py has checked shapes, dtypes, alignment and devices before it calls.
#include <pybind11/pybind11.h>

#include <atomic>
#include <stdexcept>
#include <string>

#include "cuda/gemm.cuh"
#include "gemm.h"

namespace py = pybind11;

namespace {

using Address = uintptr_t;  // of device memory, or of a stream; 0: none

template <class T = const void>
T* pointer(Address address) {
  return reinterpret_cast<T*>(address);
}

void check(cudaError_t error) {
  if (error == cudaSuccess) return;
  throw std::runtime_error(std::string("the CUDA kernel could not be started: ") + cudaGetErrorString(error));
}

// A weight in the layout of llmpq/kernels/backends/gpu_layout.py, and what follows from its shape and its device.
struct Weight {
  llmpq::CudaGemmArgs args;
  llmpq::Processor processor;
  mutable std::atomic<bool> multiplied{false};  // its first product waits for who wrote the weight, and later ones for that

  Weight(Address qweight, Address scales, Address zeros, Address offsets, Address counters, int64_t n, int64_t k,
         int64_t group_size, int bits, int scale_dtype, int device)
      : args{}, processor{} {
    args.qweight = pointer(qweight);
    args.scales = pointer(scales);
    args.zeros = pointer(zeros);
    args.offsets = pointer(offsets);
    args.counters = pointer<unsigned>(counters);
    args.n = n;
    args.k = k;
    args.group_size = group_size;
    args.bits = bits;
    args.scale_dtype = static_cast<llmpq::Dtype>(scale_dtype);
    check(llmpq::prepare(args, device, processor));
  }

  int64_t workspace_bytes(int64_t m) const { return llmpq::workspace_bytes(args, m); }

  void gemm(Address x, Address bias, Address residual, Address y, Address workspace, int64_t m, int64_t x_stride,
            int64_t residual_stride, int64_t y_stride, int x_dtype, bool invariant, Address stream) const {
    llmpq::CudaGemmArgs product = args;
    product.x = pointer(x);
    product.early = multiplied.exchange(true);
    product.bias = pointer(bias);
    product.residual = pointer(residual);
    product.y = pointer<void>(y);
    product.workspace = pointer<float>(workspace);
    product.m = m;
    product.x_stride = x_stride;
    product.residual_stride = residual_stride;
    product.y_stride = y_stride;
    product.invariant = invariant;
    product.x_dtype = static_cast<llmpq::Dtype>(x_dtype);
    const auto queue = pointer<std::remove_pointer_t<cudaStream_t>>(stream);
    switch (args.bits) {
      case 3:
        return check(llmpq::gemm_cuda<3>(product, processor, queue));
      case 4:
        return check(llmpq::gemm_cuda<4>(product, processor, queue));
      case 8:
        return check(llmpq::gemm_cuda<8>(product, processor, queue));
    }
    throw std::invalid_argument("bits is " + std::to_string(args.bits));
  }

  void dequantize(int64_t first_row, int64_t rows, Address y, int dtype, Address stream) const {
    llmpq::CudaGemmArgs part = args;
    part.y = pointer<void>(y);
    part.m = rows;
    part.x_dtype = static_cast<llmpq::Dtype>(dtype);
    const auto queue = pointer<std::remove_pointer_t<cudaStream_t>>(stream);
    switch (args.bits) {
      case 3:
        return check(llmpq::dequantize_cuda<3>(part, first_row, processor, queue));
      case 4:
        return check(llmpq::dequantize_cuda<4>(part, first_row, processor, queue));
      case 8:
        return check(llmpq::dequantize_cuda<8>(part, first_row, processor, queue));
    }
    throw std::invalid_argument("bits is " + std::to_string(args.bits));
  }
};

void define(py::module_& module) {
  module.doc() = "Matrix products with quantized weights on CUDA devices; called by llmpq/kernels/backends/cuda.py.";
  py::class_<Weight>(module, "Weight")
      .def(py::init<Address, Address, Address, Address, Address, int64_t, int64_t, int64_t, int, int, int>(),
           py::arg("qweight"), py::arg("scales"), py::arg("zeros"), py::arg("offsets"), py::arg("counters"),
           py::arg("n"), py::arg("k"), py::arg("group_size"), py::arg("bits"), py::arg("scale_dtype"),
           py::arg("device"))
      .def("workspace_bytes", &Weight::workspace_bytes, py::arg("m"))
      .def("gemm", &Weight::gemm, py::arg("x"), py::arg("bias"), py::arg("residual"), py::arg("y"),
           py::arg("workspace"), py::arg("m"), py::arg("x_stride"), py::arg("residual_stride"), py::arg("y_stride"),
           py::arg("x_dtype"), py::arg("invariant"), py::arg("stream"), py::call_guard<py::gil_scoped_release>())
      .def("dequantize", &Weight::dequantize, py::arg("first_row"), py::arg("rows"), py::arg("y"), py::arg("dtype"),
           py::arg("stream"), py::call_guard<py::gil_scoped_release>());
}

}  // namespace

PYBIND11_MODULE(_cuda, module) { define(module); }

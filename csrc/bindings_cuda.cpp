// Python module llmpq._cuda: integers become pointers, CUDA errors become exceptions. No arithmetic.
//
// llmpq/kernels/cuda.py has checked shapes, dtypes and devices before it calls.
#include <pybind11/pybind11.h>

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

cudaError_t run(const llmpq::GemmArgs& args, int device, cudaStream_t stream) {
  switch (args.bits) {
    case 3:
      return llmpq::gemm_cuda<3>(args, device, stream);
    case 4:
      return llmpq::gemm_cuda<4>(args, device, stream);
    case 8:
      return llmpq::gemm_cuda<8>(args, device, stream);
  }
  return cudaErrorInvalidValue;
}

void gemm(Address x, Address qweight, Address scales, Address zeros, Address bias, Address y, int64_t m, int64_t n,
          int64_t k, int64_t x_stride, int64_t y_stride, int64_t group_size, int bits, int x_dtype, int scale_dtype,
          int device, Address stream) {
  llmpq::GemmArgs args{};
  args.x = pointer(x);
  args.qweight = pointer(qweight);
  args.scales = pointer(scales);
  args.zeros = pointer(zeros);
  args.bias = pointer(bias);
  args.y = pointer<void>(y);
  args.m = m;
  args.n = n;
  args.k = k;
  args.x_stride = x_stride;
  args.y_stride = y_stride;
  args.group_size = group_size;
  args.bits = bits;
  args.x_dtype = static_cast<llmpq::Dtype>(x_dtype);
  args.scale_dtype = static_cast<llmpq::Dtype>(scale_dtype);

  const cudaError_t error = run(args, device, reinterpret_cast<cudaStream_t>(stream));
  if (error != cudaSuccess) {
    throw std::runtime_error(std::string("the CUDA gemm could not be started: ") + cudaGetErrorString(error));
  }
}

}  // namespace

PYBIND11_MODULE(_cuda, module) {
  module.doc() = "Matrix products with quantized weights on CUDA devices; called by llmpq/kernels/cuda.py.";
  module.def("gemm", &gemm, py::kw_only(), py::arg("x"), py::arg("qweight"), py::arg("scales"), py::arg("zeros"),
             py::arg("bias"), py::arg("y"), py::arg("m"), py::arg("n"), py::arg("k"), py::arg("x_stride"),
             py::arg("y_stride"), py::arg("group_size"), py::arg("bits"), py::arg("x_dtype"), py::arg("scale_dtype"),
             py::arg("device"), py::arg("stream"), py::call_guard<py::gil_scoped_release>());
}

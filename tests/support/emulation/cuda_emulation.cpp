// llmpq._cuda for a machine without a GPU: the same bindings, launches and kernels over an emulated machine.
#include <pybind11/stl.h>

#include "bindings_cuda.cpp"
#include "cuda/gemm_w3.cu"
#include "cuda/gemm_w4.cu"
#include "cuda/gemm_w8.cu"
#include "cuda/prepare.cu"

extern "C" cudaError_t cudaSetDevice(int) { return cudaSuccess; }

extern "C" const char* cudaGetErrorString(cudaError_t) { return "an emulated error"; }

extern "C" cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr name, int) {
  switch (name) {
    case cudaDevAttrComputeCapabilityMajor:
      *value = emulation::capability / 10;
      return cudaSuccess;
    case cudaDevAttrComputeCapabilityMinor:
      *value = emulation::capability % 10;
      return cudaSuccess;
    case cudaDevAttrMultiProcessorCount:
      *value = emulation::multiprocessors;
      return cudaSuccess;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
      *value = emulation::shared_bytes;
      return cudaSuccess;
    default:
      return cudaErrorInvalidValue;
  }
}

namespace {

// Codes less one zero, of bfloat16 with the base that they keep, which is taken off in float.
template <int Bits, class Pair, bool KeepsBase>
void values_of(const llmpq::PackedOctet& octet, int zero, float* values) {
  if constexpr (KeepsBase) {
    using Biased = llmpq::Biased<Bits>;
    Pair parts[Biased::kParts][llmpq::kOctet / 2];
    Biased::dequantize(octet, parts);
    for (int j = 0; j < llmpq::kOctet; ++j) {
      values[j] = -Biased::bias(zero);
      for (const auto& part : parts) values[j] += part[j / 2].at(j % 2);
    }
  } else {
    Pair pairs[llmpq::kOctet / 2];
    llmpq::Shift<Bits, Pair>(zero).dequantize(octet, pairs);
    for (int j = 0; j < llmpq::kOctet; ++j) values[j] = pairs[j / 2].at(j % 2);
  }
}

// What the dequantizers for tensor cores make of a weight of 128 columns: codes less one zero.
template <int Bits, class Pair, bool KeepsBase>
void read_out(const uint32_t* qweight, int64_t n, int zero, float* values) {
  for (int64_t row = 0; row < n; ++row) {
    const uint32_t* planes = qweight + row / llmpq::kPanel * llmpq::kChunkPlanes<Bits> * llmpq::kPlane;
    const int first_word = static_cast<int>(row % llmpq::kPanel) * llmpq::kOctets;
    for (int i = 0; i < llmpq::kChunk / llmpq::kOctet; ++i, values += llmpq::kOctet) {
      const int word = first_word + i % llmpq::kOctets;
      values_of<Bits, Pair, KeepsBase>(llmpq::load_octet<Bits>(planes, i / llmpq::kOctets, word), zero, values);
    }
  }
}

template <int Bits>
void read_out(bool bfloat16, bool keeps_base, const uint32_t* qweight, int64_t n, int zero, float* values) {
  const auto read = keeps_base ? read_out<Bits, llmpq::BFloat2, true>
                    : bfloat16 ? read_out<Bits, llmpq::BFloat2, false>
                               : read_out<Bits, llmpq::Half2, false>;
  read(qweight, n, zero, values);
}

// Of a weight's chunks: where each block's begin, and whose the given ones are, in which tile.
using Dealt = std::pair<std::vector<int>, std::vector<std::pair<int, int>>>;
Dealt deal(int64_t n, int64_t k, const std::vector<int>& units) {
  llmpq::CudaGemmArgs args{};
  llmpq::Processor processor{};
  args.n = n;
  args.k = args.group_size = k;
  args.bits = 4;
  check(llmpq::prepare(args, 0, processor));
  const llmpq::Deal deal{args.split};
  Dealt found;
  for (int block = 0; block <= args.split.blocks; ++block) found.first.push_back(deal.begin(block));
  for (const int unit : units) found.second.emplace_back(deal.owner(unit), deal.tile(unit));
  return found;
}

}  // namespace

PYBIND11_MODULE(cuda_emulation, module) {
  define(module);
  module.def("forbid", [](std::vector<std::pair<Address, Address>> ranges) { emulation::forbidden = std::move(ranges); });
  module.def(
      "arrive_late",
      [](std::vector<std::pair<Address, Address>> ranges, bool deaf) {
        emulation::late = std::move(ranges);
        emulation::deaf = deaf;
      },
      py::arg("ranges"), py::arg("deaf") = false);
  module.def("early", [] { return emulation::early; });
  module.def("deal", &deal, py::arg("n"), py::arg("k"), py::arg("units"));
  module.def("read_out",
             [](int bits, bool bfloat16, bool keeps_base, Address qweight, int64_t n, int zero, Address values) {
               const auto use = bits == 3 ? read_out<3> : bits == 4 ? read_out<4> : read_out<8>;
               use(bfloat16, keeps_base, pointer<const uint32_t>(qweight), n, zero, pointer<float>(values));
             });
  module.def(
      "emulate",
      [](int capability, int multiprocessors, int shared_bytes, bool backwards, bool hasty) {
        emulation::capability = capability;
        emulation::multiprocessors = multiprocessors;
        emulation::shared_bytes = shared_bytes;
        emulation::backwards = backwards;
        emulation::hasty = hasty;
      },
      py::arg("capability"), py::arg("multiprocessors"), py::arg("shared_bytes"), py::arg("backwards"),
      py::arg("hasty"));
}

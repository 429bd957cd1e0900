// From packed codes to fp32: the only place in the CUDA backend where bit widths differ.
//
// The stored format is drawn in llmpq/quant/packing.py: every 32 consecutive codes of a row are a block of `Bits`
// 32-bit words. The kernels consume a block as four octets of eight consecutive codes. No CUDA header is needed here,
// so that the tests compile these functions for the host and check every code.
#pragma once

#include <cstdint>
#include <cstring>

#ifdef __CUDACC__
#define LLMPQ_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define LLMPQ_HOST_DEVICE inline
#endif

namespace llmpq {

constexpr int kBlock = 32;   // codes per packing block
constexpr int kOctet = 8;    // codes a lane takes at once
constexpr int kOctets = kBlock / kOctet;

LLMPQ_HOST_DEVICE float float_from_bits(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

// The float with bits 0x4B000000 | code is 2^23 + code for every code < 2^23: an OR and a subtraction replace an
// integer conversion, and with `shift` = code_shift(zero) the zero point goes in the same subtraction, exactly.
LLMPQ_HOST_DEVICE float code_shift(int zero) { return 8388608.0f + static_cast<float>(zero); }

LLMPQ_HOST_DEVICE float shifted_code(uint32_t code, float shift) {
  return float_from_bits(0x4B000000u | code) - shift;
}

// Four octets of 3-bit codes as eight nibbles each, like 4-bit codes. The fourth is spread over the top bits of the
// nibbles of the three words: bit i of its nibble j is the top bit of nibble j of word i.
LLMPQ_HOST_DEVICE uint32_t nibbles_w3(const uint32_t* block, int octet) {
  if (octet < 3) return block[octet] & 0x77777777u;
  return (block[0] >> 3 & 0x11111111u) | (block[1] >> 2 & 0x22222222u) | (block[2] >> 1 & 0x44444444u);
}

// values[j] = code - zero, exactly, for the codes 8 * octet + j of a block.
//   block: `Bits` words; octet: 0..3; shift: code_shift(zero)
template <int Bits>
LLMPQ_HOST_DEVICE void dequantize_octet(const uint32_t* block, int octet, float shift, float (&values)[kOctet]) {
  static_assert(Bits == 3 || Bits == 4 || Bits == 8, "the packed widths");
  if constexpr (Bits == 8) {
    for (int j = 0; j < kOctet; ++j) {
      values[j] = shifted_code(block[2 * octet + j / 4] >> 8 * (j % 4) & 0xFFu, shift);
    }
  } else {
    const uint32_t nibbles = Bits == 3 ? nibbles_w3(block, octet) : block[octet];
    for (int j = 0; j < kOctet; ++j) values[j] = shifted_code(nibbles >> 4 * j & 0xFu, shift);
  }
}

}  // namespace llmpq

// From packed words to numbers: the only place in the CUDA backend where bit widths differ.
//
// llmpq/kernels/backends/gpu_layout.py draws the layout. What is taken at once is an octet: eight consecutive codes of a row.
// All results are exact: code - zero is a whole number of at most eight bits and a sign. Where codes keep a base instead, so
// are both of them together, and what is to be taken off later.
#pragma once

#include <cstdint>

#include "cuda/ptx.cuh"

namespace llmpq {

constexpr int kBlock = 32;                   // codes of a row in a block
constexpr int kOctet = 8;                    // codes in an octet
constexpr int kOctets = kBlock / kOctet;     // in a block
constexpr int kPanel = 16;                   // rows of a panel
constexpr int kPlane = kPanel * kOctets;     // words of a plane
constexpr int kChunkBlocks = 4;              // blocks in a chunk: the fewest that all widths divide into planes
constexpr int kChunk = kChunkBlocks * kBlock;  // codes of a row in a chunk

// Planes of a whole chunk.
template <int Bits>
constexpr int kChunkPlanes = kChunkBlocks * Bits / 4;

// Planes of a panel with k columns.
constexpr int num_planes(int bits, int64_t k) {
  const int blocks = static_cast<int>((k + kBlock - 1) / kBlock);
  return bits == 8 ? 2 * blocks : bits == 4 ? blocks : blocks - blocks / kChunkBlocks;
}

// An octet as it is packed: eight nibbles in words[0], or four bytes in each word. Of 3 bits, the top bit of a nibble may
// be another's.
struct PackedOctet {
  uint32_t words[2];
};

// An octet of block 0..3 of a chunk. Its words are in the planes first_plane(block) to first_plane(block + 1) - 1, and
// where these are none, in all planes before: word(plane) gives its word in one.
template <int Bits, class Word>
LLMPQ_DEVICE PackedOctet octet_of(int block, const Word& word) {
  static_assert(Bits == 3 || Bits == 4 || Bits == 8, "the packed widths");
  if constexpr (Bits == 8) {
    return {{word(2 * block), word(2 * block + 1)}};
  } else if constexpr (Bits == 4) {
    return {{word(block), 0}};
  } else {
    if (block < 3) return {{word(block), 0}};
    return {{(word(0) >> 3 & 0x11111111u) | (word(1) >> 2 & 0x22222222u) | (word(2) >> 1 & 0x44444444u), 0}};
  }
}

template <int Bits>
LLMPQ_DEVICE constexpr int first_plane(int block) {
  return Bits == 8 ? 2 * block : Bits == 4 ? block : block - block / kChunkBlocks;
}

// The octet whose word is at `word` of the planes of a chunk.
//   planes: the chunk's first plane; block: 0..3 in the chunk
template <int Bits>
LLMPQ_DEVICE PackedOctet load_octet(const uint32_t* planes, int block, int word) {
  return octet_of<Bits>(block, [=](int plane) { return planes[plane * kPlane + word]; });
}

// A code in the lowest bits of both halves of a register.
template <int Bits>
constexpr uint32_t kCodeMask = Bits == 3 ? 0x00070007u : 0x000F000Fu;

// Codes as fp32: the float with bits 0x4B000000 | code is 2^23 + code.
constexpr uint32_t kFloatMagic = 0x4B000000u;
constexpr float kFloatShift = 8388608.0f;

LLMPQ_DEVICE float float_of_byte(uint32_t word, int byte, float shift) {
  const uint32_t bits = choose_bytes(word, kFloatMagic, 0x7650u | byte);
  return float_of_bits(bits) - shift;
}

// values[j] = code j - zero.
template <int Bits>
LLMPQ_DEVICE void dequantize(const PackedOctet& octet, int zero, float (&values)[kOctet]) {
  const float shift = kFloatShift + static_cast<float>(zero);
#pragma unroll
  for (int j = 0; j < kOctet; ++j) {
    if constexpr (Bits == 8) {
      values[j] = float_of_byte(octet.words[j / 4], j % 4, shift);
    } else {
      const uint32_t code = octet.words[0] >> (j % 2 * 16 + j / 2 * 4) & (kCodeMask<Bits> & 0xFFFFu);
      values[j] = float_of_bits(kFloatMagic | code) - shift;
    }
  }
}

// What takes a zero point off codes that are to become `Pair`s, made once for a group. A code is put into the mantissa
// of a power of two, `base`, and the sum of both, base + zero, is taken off again.
template <int Bits, class Pair>
struct Shift;

template <int Bits>
struct Shift<Bits, Half2> {
  static constexpr uint32_t kMagic = 0x64006400u;  // 1024: a unit in the last place is 1

  Half2 low;   // 1024 + zero
  Half2 high;  // -(64 + zero), for nibbles that lie 4 bits higher

  LLMPQ_DEVICE explicit Shift(int zero)
      : low{kMagic + static_cast<uint32_t>(zero) * 0x00010001u},
        high{0xD400D400u + (static_cast<uint32_t>(zero) << 4) * 0x00010001u} {}

  // pairs[i] = codes 2 i and 2 i + 1, less the zero.
  LLMPQ_DEVICE void dequantize(const PackedOctet& octet, Half2 (&pairs)[kOctet / 2]) const {
    if constexpr (Bits == 8) {
#pragma unroll
      for (int i = 0; i < kOctet / 2; ++i) {
        pairs[i] = subtract(Half2{choose_bytes(octet.words[i / 2], kMagic, i % 2 ? 0x7372u : 0x7170u)}, low);
      }
    } else {
      const Half2 sixteenth{0x2C002C00u};
      const uint32_t word = octet.words[0], shifted = word >> 8;
      pairs[0] = subtract(Half2{masked_or(word, kCodeMask<Bits>, kMagic)}, low);
      pairs[1] = multiply_add(Half2{masked_or(word, kCodeMask<Bits> << 4, kMagic)}, sixteenth, high);
      pairs[2] = subtract(Half2{masked_or(shifted, kCodeMask<Bits>, kMagic)}, low);
      pairs[3] = multiply_add(Half2{masked_or(shifted, kCodeMask<Bits> << 4, kMagic)}, sixteenth, high);
    }
  }
};

template <int Bits>
struct Shift<Bits, BFloat2> {
  static constexpr uint32_t kMagic = 0x43004300u;  // 128: a unit in the last place is 1

  BFloat2 low;  // 128 + zero

  LLMPQ_DEVICE explicit Shift(int zero) : low{kMagic + static_cast<uint32_t>(zero) * 0x00010001u} {}

  LLMPQ_DEVICE void dequantize(const PackedOctet& octet, BFloat2 (&pairs)[kOctet / 2]) const {
#pragma unroll
    for (int i = 0; i < kOctet / 2; ++i) {
      pairs[i] = subtract(BFloat2{masked_or(octet.words[0] >> 4 * i, kCodeMask<Bits>, kMagic)}, low);
    }
  }
};

// Eight bits do not fit bfloat16's mantissa beside a power of two, but their difference with a zero does.
template <>
struct Shift<8, BFloat2> {
  float low;  // 2^23 + zero

  LLMPQ_DEVICE explicit Shift(int zero) : low(kFloatShift + static_cast<float>(zero)) {}

  LLMPQ_DEVICE void dequantize(const PackedOctet& octet, BFloat2 (&pairs)[kOctet / 2]) const {
#pragma unroll
    for (int i = 0; i < kOctet / 2; ++i) {
      const uint32_t word = octet.words[i / 2];
      pairs[i] = rounded_pair(float_of_byte(word, 2 * (i % 2), low), float_of_byte(word, 2 * (i % 2) + 1, low));
    }
  }
};

// Codes that keep their base, for sums from which it is taken off with the zero: bias() times the sum of x. Each code plus
// base is the sum of kParts numbers.
template <int Bits>
struct Biased {
  static constexpr int kParts = 1;
  static constexpr uint32_t kMagic = Shift<Bits, BFloat2>::kMagic;

  // parts[0][i] = base + codes 2 i and 2 i + 1
  LLMPQ_DEVICE static void dequantize(const PackedOctet& octet, BFloat2 (&parts)[kParts][kOctet / 2]) {
#pragma unroll
    for (int i = 0; i < kOctet / 2; ++i) parts[0][i] = {masked_or(octet.words[0] >> 4 * i, kCodeMask<Bits>, kMagic)};
  }

  LLMPQ_DEVICE static float bias(int zero) { return float_of_bits(0x43000000u + (zero << 16)); }  // 128 + zero
};

// The lower seven bits of a code beside 128, and 128 or, where the top bit is set, 256: it is the lowest of the exponent.
template <>
struct Biased<8> {
  static constexpr int kParts = 2;

  LLMPQ_DEVICE static void dequantize(const PackedOctet& octet, BFloat2 (&parts)[kParts][kOctet / 2]) {
#pragma unroll
    for (int i = 0; i < kOctet / 2; ++i) {
      const uint32_t codes = choose_bytes(octet.words[i / 2], 0x43004300u, i % 2 ? 0x7352u : 0x7150u);
      parts[0][i] = {codes & 0xFF7FFF7Fu};
      parts[1][i] = {codes & 0xFF80FF80u};
    }
  }

  LLMPQ_DEVICE static float bias(int zero) { return float_of_bits(0x43800000u + (zero << 15)); }  // 256 + zero
};

}  // namespace llmpq

// Vectors of 16 floats in registers of AVX-512 (F, BW, DQ, VL, VNNI).
#pragma once

#include <immintrin.h>

#include <cstring>

#include "cpu/kernels.h"
#include "cpu/unroll.h"

namespace llmpq {
namespace {

struct Avx512 {
  using F = __m512;
  using I = __m512i;
  static constexpr int kTileRows = 12, kChains = 12;
  static constexpr int kPanels = 2, kPairFrom = 6;  // 12 x 2 sums, 2 weights, x: 27 of 32 registers
  static constexpr int kAttentionSums = 24;
  static constexpr int kInt8Rows = 8, kInt8PairFrom = 5, kInt8Chains = 8;
  struct Sum {
    I value;
  };

  static LLMPQ_INLINE __mmask16 mask(int count) { return static_cast<__mmask16>((1u << count) - 1); }

  static LLMPQ_INLINE F zero() { return _mm512_setzero_ps(); }
  static LLMPQ_INLINE F broadcast(float x) { return _mm512_set1_ps(x); }
  static LLMPQ_INLINE F load(const float* p) { return _mm512_loadu_ps(p); }
  static LLMPQ_INLINE F load_first(const float* p, int count) { return _mm512_maskz_loadu_ps(mask(count), p); }
  static LLMPQ_INLINE void store(float* p, F x) { _mm512_storeu_ps(p, x); }
  static LLMPQ_INLINE void store_first(float* p, F x, int count) { _mm512_mask_storeu_ps(p, mask(count), x); }
  static LLMPQ_INLINE F first_or(F x, int count, F rest) { return _mm512_mask_mov_ps(rest, mask(count), x); }
  static LLMPQ_INLINE F first(F x, int count) { return _mm512_maskz_mov_ps(mask(count), x); }
  static LLMPQ_INLINE F add(F a, F b) { return _mm512_add_ps(a, b); }
  static LLMPQ_INLINE F sub(F a, F b) { return _mm512_sub_ps(a, b); }
  static LLMPQ_INLINE F mul(F a, F b) { return _mm512_mul_ps(a, b); }
  static LLMPQ_INLINE F div(F a, F b) { return _mm512_div_ps(a, b); }
  static LLMPQ_INLINE F select_negative(F x, F a, F b) {
    return _mm512_mask_mov_ps(b, _mm512_movepi32_mask(_mm512_castps_si512(x)), a);
  }
  static LLMPQ_INLINE F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
  static LLMPQ_INLINE F max(F a, F b) { return _mm512_max_ps(a, b); }
  static LLMPQ_INLINE F min(F a, F b) { return _mm512_min_ps(a, b); }
  static LLMPQ_INLINE F round(F x) { return _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
  static LLMPQ_INLINE F power_of_two(F n) { return _mm512_scalef_ps(broadcast(1.0f), n); }
  static LLMPQ_INLINE float lane(F x) { return _mm512_cvtss_f32(x); }
  static LLMPQ_INLINE float largest(F x) { return _mm512_reduce_max_ps(x); }

  static LLMPQ_INLINE __m256 upper(F x) { return _mm512_extractf32x8_ps(x, 1); }
  static LLMPQ_INLINE float sum(F x) {
    const __m256 x8 = _mm256_add_ps(_mm512_castps512_ps256(x), upper(x));
    const __m128 x4 = _mm_add_ps(_mm256_castps256_ps128(x8), _mm256_extractf128_ps(x8, 1));
    const __m128 x2 = _mm_add_ps(x4, _mm_movehl_ps(x4, x4));
    return _mm_cvtss_f32(_mm_add_ss(x2, _mm_movehdup_ps(x2)));
  }
  // Lane i: the sum over x[i], added in the order of sum().
  static LLMPQ_INLINE F sums(const F (&x)[16]) {
    const auto halves = [](F a, F b) {
      return add(_mm512_shuffle_f32x4(a, b, 0x44), _mm512_shuffle_f32x4(a, b, 0xee));
    };
    const auto quarters = [](F a, F b) {
      return add(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xdd));
    };
    const auto pairs = [](F a, F b) { return add(_mm512_shuffle_ps(a, b, 0x44), _mm512_shuffle_ps(a, b, 0xee)); };
    const auto singles = [](F a, F b) { return add(_mm512_shuffle_ps(a, b, 0x88), _mm512_shuffle_ps(a, b, 0xdd)); };
    F four[4];  // 128 bits j of four[i]: what is left of x[4 j + i]
    for (int i = 0; i < 4; ++i) four[i] = quarters(halves(x[i], x[4 + i]), halves(x[8 + i], x[12 + i]));
    return singles(pairs(four[0], four[1]), pairs(four[2], four[3]));
  }

  static LLMPQ_INLINE I load_words(const uint8_t* p) {
    I words = _mm512_loadu_si512(p);
    asm("" : "+v"(words));  // or GCC may read them anew for every shift, which costs a seventh of the speed
    return words;
  }
  static LLMPQ_INLINE I top_bits(I w0, I w1, I w2) {
    const I low = _mm512_and_si512(_mm512_srli_epi32(w0, 3), _mm512_set1_epi32(0x11111111));
    const I middle = _mm512_and_si512(_mm512_srli_epi32(w1, 2), _mm512_set1_epi32(0x22222222));
    const I high = _mm512_and_si512(_mm512_srli_epi32(w2, 1), _mm512_set1_epi32(0x44444444));
    return _mm512_or_si512(_mm512_or_si512(low, middle), high);
  }
  // A look-up sees the low four bits of a lane only, so that no mask is needed; three bits have every entry twice.
  template <int Bits>
  static LLMPQ_INLINE I flip(I words) {
    return Bits == 8 ? _mm512_xor_si512(words, _mm512_set1_epi8(-128)) : words;
  }
  template <int Bits, int Center>
  static LLMPQ_INLINE F field(I words, int j) {
    if (Bits == 8) {
      const I top = _mm512_slli_epi32(words, 24 - 8 * j);
      return _mm512_cvtepi32_ps(Center == 0 ? _mm512_srli_epi32(top, 24) : _mm512_srai_epi32(top, 24));
    }
    constexpr int k8 = Bits == 4 ? 8 : 0, kC = Center;
    const F table = _mm512_setr_ps(0 - kC, 1 - kC, 2 - kC, 3 - kC, 4 - kC, 5 - kC, 6 - kC, 7 - kC,  //
                                   k8 - kC, k8 + 1 - kC, k8 + 2 - kC, k8 + 3 - kC, k8 + 4 - kC, k8 + 5 - kC,
                                   k8 + 6 - kC, k8 + 7 - kC);
    return _mm512_permutexvar_ps(_mm512_srli_epi32(words, 4 * j), table);
  }

  static LLMPQ_INLINE I add(I a, I b) { return _mm512_add_epi32(a, b); }
  static LLMPQ_INLINE I broadcast_int(int x) { return _mm512_set1_epi32(x); }
  static LLMPQ_INLINE I broadcast4(const int8_t* p) {
    int32_t four;
    std::memcpy(&four, p, sizeof four);
    return _mm512_set1_epi32(four);
  }
  static LLMPQ_INLINE I load_ints(const int32_t* p) { return _mm512_loadu_si512(p); }
  static LLMPQ_INLINE void store_words(uint8_t* p, I x) { _mm512_storeu_si512(p, x); }
  static LLMPQ_INLINE I subtract_bytes(I a, I b) { return _mm512_sub_epi8(a, b); }
  static LLMPQ_INLINE I repeat_byte(I x) { return _mm512_mullo_epi32(x, _mm512_set1_epi32(0x01010101)); }
  static LLMPQ_INLINE F to_float(I x) { return _mm512_cvtepi32_ps(x); }
  static LLMPQ_INLINE I load_uint8_int(const uint8_t* p) { return _mm512_cvtepu8_epi32(load16(p)); }
  template <int Bits>
  static LLMPQ_INLINE I even_codes(I words) {
    return _mm512_and_si512(words, _mm512_set1_epi8((1 << Bits) - 1));
  }
  template <int Bits>
  static LLMPQ_INLINE I odd_codes(I words) {
    return even_codes<Bits>(_mm512_srli_epi32(words, 4));
  }
  static LLMPQ_INLINE I int8_operand(I words) { return words; }
  static constexpr int operand_offset(int) { return 0; }
  // Of numbers of 16 bits, the second not sign-extended: faster than a product of 32 bits.
  static LLMPQ_INLINE I multiply16(I a, I b) { return _mm512_madd_epi16(a, b); }
  static LLMPQ_INLINE void start(Sum& sum, I value) { sum.value = value; }
  template <int Bits>
  static LLMPQ_INLINE void dot(Sum& sum, I codes, I x) {
    sum.value = _mm512_dpbusd_epi32(sum.value, codes, x);
  }
  template <int Bits>
  static LLMPQ_INLINE void end_block(Sum&) {}
  static LLMPQ_INLINE I value(const Sum& sum) { return sum.value; }
  static LLMPQ_INLINE void store_int8(int8_t* p, F x, bool nibbles) {
    __m128i bytes = _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(x));
    if (nibbles) {
      bytes = _mm_shuffle_epi8(bytes, _mm_setr_epi8(0, 2, 4, 6, 1, 3, 5, 7, 8, 10, 12, 14, 9, 11, 13, 15));
    }
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), bytes);
  }

  static LLMPQ_INLINE __m128i load16(const uint8_t* p) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(p)); }
  static LLMPQ_INLINE __m256i load32(const uint8_t* p) {
    return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  }
  static LLMPQ_INLINE F load_uint8(const uint8_t* p) { return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(load16(p))); }
  static LLMPQ_INLINE F load_int8(const int8_t* p) {
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(load16(reinterpret_cast<const uint8_t*>(p))));
  }
  static LLMPQ_INLINE F load_float16(const uint8_t* p) { return _mm512_cvtph_ps(load32(p)); }
  static LLMPQ_INLINE void store_float16(uint8_t* p, F x) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
  }
  static LLMPQ_INLINE F load_bfloat16(const uint8_t* p) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(load32(p)), 16));
  }
};

}  // namespace
}  // namespace llmpq

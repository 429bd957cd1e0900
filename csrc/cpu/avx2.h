// Vectors of 16 floats as two registers of AVX2, with FMA and F16C. Results are those of AVX-512, bit for bit.
#pragma once

#include <immintrin.h>

#include <cstring>

#include "cpu/kernels.h"
#include "cpu/unroll.h"

namespace llmpq {
namespace {

struct Avx2 {
  struct F {
    __m256 low, high;
  };
  struct I {
    __m256i low, high;
  };
  static constexpr int kTileRows = 6, kChains = 6;
  static constexpr int kPanels = 1, kPairFrom = kTileRows + 1;
  static constexpr int kAttentionSums = 6;
  static constexpr int kInt8Rows = 4, kInt8PairFrom = kInt8Rows + 1, kInt8Chains = 1;
  struct Sum {
    I value;
    I pairs;  // in 16 bits, of one block
  };

  // All ones in the first `count` lanes of the eight.
  static LLMPQ_INLINE __m256i mask(int count) {
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(count), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
  }

  static LLMPQ_INLINE F zero() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
  static LLMPQ_INLINE F broadcast(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
  static LLMPQ_INLINE F load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
  static LLMPQ_INLINE F load_first(const float* p, int count) {
    return {_mm256_maskload_ps(p, mask(count)), _mm256_maskload_ps(p + 8, mask(count - 8))};
  }
  static LLMPQ_INLINE void store(float* p, F x) {
    _mm256_storeu_ps(p, x.low);
    _mm256_storeu_ps(p + 8, x.high);
  }
  static LLMPQ_INLINE void store_first(float* p, F x, int count) {
    _mm256_maskstore_ps(p, mask(count), x.low);
    _mm256_maskstore_ps(p + 8, mask(count - 8), x.high);
  }
  static LLMPQ_INLINE F first_or(F x, int count, F rest) {
    return {_mm256_blendv_ps(rest.low, x.low, _mm256_castsi256_ps(mask(count))),
            _mm256_blendv_ps(rest.high, x.high, _mm256_castsi256_ps(mask(count - 8)))};
  }
  static LLMPQ_INLINE F first(F x, int count) {
    return {_mm256_and_ps(x.low, _mm256_castsi256_ps(mask(count))),
            _mm256_and_ps(x.high, _mm256_castsi256_ps(mask(count - 8)))};
  }
  static LLMPQ_INLINE F add(F a, F b) { return {_mm256_add_ps(a.low, b.low), _mm256_add_ps(a.high, b.high)}; }
  static LLMPQ_INLINE F sub(F a, F b) { return {_mm256_sub_ps(a.low, b.low), _mm256_sub_ps(a.high, b.high)}; }
  static LLMPQ_INLINE F mul(F a, F b) { return {_mm256_mul_ps(a.low, b.low), _mm256_mul_ps(a.high, b.high)}; }
  static LLMPQ_INLINE F div(F a, F b) { return {_mm256_div_ps(a.low, b.low), _mm256_div_ps(a.high, b.high)}; }
  // Of each lane: a where x has a minus sign, else b.
  static LLMPQ_INLINE F select_negative(F x, F a, F b) {
    return {_mm256_blendv_ps(b.low, a.low, x.low), _mm256_blendv_ps(b.high, a.high, x.high)};
  }
  static LLMPQ_INLINE F fma(F a, F b, F c) {
    return {_mm256_fmadd_ps(a.low, b.low, c.low), _mm256_fmadd_ps(a.high, b.high, c.high)};
  }
  static LLMPQ_INLINE F max(F a, F b) { return {_mm256_max_ps(a.low, b.low), _mm256_max_ps(a.high, b.high)}; }
  static LLMPQ_INLINE F min(F a, F b) { return {_mm256_min_ps(a.low, b.low), _mm256_min_ps(a.high, b.high)}; }
  static LLMPQ_INLINE F round(F x) {
    constexpr int kNearest = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
    return {_mm256_round_ps(x.low, kNearest), _mm256_round_ps(x.high, kNearest)};
  }
  static LLMPQ_INLINE __m256 power_of_two(__m256 n) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23));
  }
  static LLMPQ_INLINE F power_of_two(F n) { return {power_of_two(n.low), power_of_two(n.high)}; }
  static LLMPQ_INLINE float lane(F x) { return _mm256_cvtss_f32(x.low); }
  static LLMPQ_INLINE float largest(F x) {
    const __m256 x8 = _mm256_max_ps(x.low, x.high);
    const __m128 x4 = _mm_max_ps(_mm256_castps256_ps128(x8), _mm256_extractf128_ps(x8, 1));
    const __m128 x2 = _mm_max_ps(x4, _mm_movehl_ps(x4, x4));
    return _mm_cvtss_f32(_mm_max_ss(x2, _mm_movehdup_ps(x2)));
  }
  static LLMPQ_INLINE float sum(F x) {
    const __m256 x8 = _mm256_add_ps(x.low, x.high);
    const __m128 x4 = _mm_add_ps(_mm256_castps256_ps128(x8), _mm256_extractf128_ps(x8, 1));
    const __m128 x2 = _mm_add_ps(x4, _mm_movehl_ps(x4, x4));
    return _mm_cvtss_f32(_mm_add_ss(x2, _mm_movehdup_ps(x2)));
  }
  // Lane i: the sum over x[i], added in the order of sum().
  static LLMPQ_INLINE __m256 sums(const F* x) {
    const auto halves = [](F a) { return _mm256_add_ps(a.low, a.high); };
    const auto quarters = [](__m256 a, __m256 b) {
      return _mm256_add_ps(_mm256_permute2f128_ps(a, b, 0x20), _mm256_permute2f128_ps(a, b, 0x31));
    };
    const auto pairs = [](__m256 a, __m256 b) {
      return _mm256_add_ps(_mm256_shuffle_ps(a, b, 0x44), _mm256_shuffle_ps(a, b, 0xee));
    };
    const auto singles = [](__m256 a, __m256 b) {
      return _mm256_add_ps(_mm256_shuffle_ps(a, b, 0x88), _mm256_shuffle_ps(a, b, 0xdd));
    };
    __m256 four[4];  // 128 bits j of four[i]: what is left of x[4 j + i]
    for (int i = 0; i < 4; ++i) four[i] = quarters(halves(x[i]), halves(x[4 + i]));
    return singles(pairs(four[0], four[1]), pairs(four[2], four[3]));
  }
  static LLMPQ_INLINE F sums(const F (&x)[16]) { return {sums(x + 0), sums(x + 8)}; }

  static LLMPQ_INLINE __m256i load_words8(const uint8_t* p) {
    return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  }
  static LLMPQ_INLINE I load_words(const uint8_t* p) { return {load_words8(p), load_words8(p + 32)}; }
  static LLMPQ_INLINE __m256i top_bits(__m256i w0, __m256i w1, __m256i w2) {
    const __m256i low = _mm256_and_si256(_mm256_srli_epi32(w0, 3), _mm256_set1_epi32(0x11111111));
    const __m256i middle = _mm256_and_si256(_mm256_srli_epi32(w1, 2), _mm256_set1_epi32(0x22222222));
    const __m256i high = _mm256_and_si256(_mm256_srli_epi32(w2, 1), _mm256_set1_epi32(0x44444444));
    return _mm256_or_si256(_mm256_or_si256(low, middle), high);
  }
  static LLMPQ_INLINE I top_bits(I w0, I w1, I w2) {
    return {top_bits(w0.low, w1.low, w2.low), top_bits(w0.high, w1.high, w2.high)};
  }
  template <int Bits>
  static LLMPQ_INLINE I flip(I words) {
    if (Bits == 3) return words;
    const __m256i tops = _mm256_set1_epi8(Bits == 4 ? -120 : -128);  // 0x88, 0x80
    return {_mm256_xor_si256(words.low, tops), _mm256_xor_si256(words.high, tops)};
  }
  // Three bits: a look-up, which sees the low three bits of a lane. Else moved to the top of the lane and back.
  template <int Bits, int Center>
  static LLMPQ_INLINE __m256 field(__m256i words, int j) {
    if (Bits == 3) {
      constexpr int kC = Center;
      const __m256 table = _mm256_setr_ps(0 - kC, 1 - kC, 2 - kC, 3 - kC, 4 - kC, 5 - kC, 6 - kC, 7 - kC);
      return _mm256_permutevar8x32_ps(table, _mm256_srli_epi32(words, 4 * j));
    }
    constexpr int kEach = Bits == 8 ? 8 : 4, kRight = 32 - kEach;
    const __m256i top = _mm256_slli_epi32(words, kRight - kEach * j);
    return _mm256_cvtepi32_ps(Center == 0 ? _mm256_srli_epi32(top, kRight) : _mm256_srai_epi32(top, kRight));
  }
  template <int Bits, int Center>
  static LLMPQ_INLINE F field(I words, int j) {
    return {field<Bits, Center>(words.low, j), field<Bits, Center>(words.high, j)};
  }

  static LLMPQ_INLINE I add(I a, I b) { return {_mm256_add_epi32(a.low, b.low), _mm256_add_epi32(a.high, b.high)}; }
  static LLMPQ_INLINE I broadcast_int(int x) { return {_mm256_set1_epi32(x), _mm256_set1_epi32(x)}; }
  static LLMPQ_INLINE __m256i broadcast4(const int8_t* p) {
    int32_t four;
    std::memcpy(&four, p, sizeof four);
    return _mm256_set1_epi32(four);
  }
  static LLMPQ_INLINE F to_float(I x) { return {_mm256_cvtepi32_ps(x.low), _mm256_cvtepi32_ps(x.high)}; }
  static LLMPQ_INLINE I load_uint8_int(const uint8_t* p) {
    return {_mm256_cvtepu8_epi32(load8(p)), _mm256_cvtepu8_epi32(load8(p + 8))};
  }
  template <int Bits>
  static LLMPQ_INLINE I even_codes(I words) {
    const __m256i mask = _mm256_set1_epi8((1 << Bits) - 1);
    return {_mm256_and_si256(words.low, mask), _mm256_and_si256(words.high, mask)};
  }
  template <int Bits>
  static LLMPQ_INLINE I odd_codes(I words) {
    return even_codes<Bits>({_mm256_srli_epi32(words.low, 4), _mm256_srli_epi32(words.high, 4)});
  }
  // Products of two unsigned bytes of 8 bits would not fit 16 bits: there, code - 128 is multiplied.
  static LLMPQ_INLINE I int8_operand(I words) { return flip<8>(words); }
  static constexpr int operand_offset(int bits) { return bits == 8 ? 128 : 0; }
  // Of numbers of 16 bits, the second not sign-extended: faster than a product of 32 bits.
  static LLMPQ_INLINE I multiply16(I a, I b) {
    return {_mm256_madd_epi16(a.low, b.low), _mm256_madd_epi16(a.high, b.high)};
  }
  static LLMPQ_INLINE void start(Sum& sum, I value) {
    sum.value = value;
    sum.pairs = {_mm256_setzero_si256(), _mm256_setzero_si256()};
  }
  static LLMPQ_INLINE __m256i add_pairs(__m256i sum, __m256i pairs) {
    return _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
  }
  static LLMPQ_INLINE __m256i signed_pairs(__m256i w, __m256i x) {  // at most 2 * 128 * 127, which fits
    return _mm256_maddubs_epi16(_mm256_abs_epi8(w), _mm256_sign_epi8(x, w));
  }
  template <int Bits>
  static LLMPQ_INLINE void dot(Sum& sum, I w, __m256i x) {
    if (Bits == 8) {
      sum.value = {add_pairs(sum.value.low, signed_pairs(w.low, x)),
                   add_pairs(sum.value.high, signed_pairs(w.high, x))};
    } else {
      static_assert(Bits == 8 || Bits <= 4, "eight times 2 * 15 * 127 in a block fit 16 bits, more would not");
      sum.pairs = {_mm256_add_epi16(sum.pairs.low, _mm256_maddubs_epi16(w.low, x)),
                   _mm256_add_epi16(sum.pairs.high, _mm256_maddubs_epi16(w.high, x))};
    }
  }
  template <int Bits>
  static LLMPQ_INLINE void end_block(Sum& sum) {
    if (Bits == 8) return;
    sum.value = {add_pairs(sum.value.low, sum.pairs.low), add_pairs(sum.value.high, sum.pairs.high)};
    sum.pairs = {_mm256_setzero_si256(), _mm256_setzero_si256()};
  }
  static LLMPQ_INLINE I value(const Sum& sum) { return sum.value; }
  static LLMPQ_INLINE void store_int8(int8_t* p, F x, bool nibbles) {
    const __m256i words = _mm256_packs_epi32(_mm256_cvtps_epi32(x.low), _mm256_cvtps_epi32(x.high));
    const __m256i ordered = _mm256_permute4x64_epi64(words, 0xd8);
    __m128i bytes = _mm_packs_epi16(_mm256_castsi256_si128(ordered), _mm256_extracti128_si256(ordered, 1));
    if (nibbles) {
      bytes = _mm_shuffle_epi8(bytes, _mm_setr_epi8(0, 2, 4, 6, 1, 3, 5, 7, 8, 10, 12, 14, 9, 11, 13, 15));
    }
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), bytes);
  }

  static LLMPQ_INLINE __m128i load8(const uint8_t* p) { return _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)); }
  static LLMPQ_INLINE __m128i load16(const uint8_t* p) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(p)); }
  static LLMPQ_INLINE F load_uint8(const uint8_t* p) {
    return {_mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(load8(p))), _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(load8(p + 8)))};
  }
  static LLMPQ_INLINE F load_int8(const int8_t* p) {
    const __m128i codes = load16(reinterpret_cast<const uint8_t*>(p));
    return to_float({_mm256_cvtepi8_epi32(codes), _mm256_cvtepi8_epi32(_mm_srli_si128(codes, 8))});
  }
  static LLMPQ_INLINE F load_float16(const uint8_t* p) {
    return {_mm256_cvtph_ps(load16(p)), _mm256_cvtph_ps(load16(p + 16))};
  }
  static LLMPQ_INLINE void store_float16(uint8_t* p, F x) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(x.low, _MM_FROUND_TO_NEAREST_INT));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p + 16), _mm256_cvtps_ph(x.high, _MM_FROUND_TO_NEAREST_INT));
  }
  static LLMPQ_INLINE __m256 load_bfloat16x8(const uint8_t* p) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(load16(p)), 16));
  }
  static LLMPQ_INLINE F load_bfloat16(const uint8_t* p) { return {load_bfloat16x8(p), load_bfloat16x8(p + 16)}; }
};

}  // namespace
}  // namespace llmpq

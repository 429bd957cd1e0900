// The kernels in plain C++ with the vector extensions of GCC and Clang: a vector of 16 floats is four registers of
// 128 bits, which x86-64 (SSE2) and arm64 (NEON) both have. Beyond these, they use what each always has: a fused
// multiply-add on arm64, products of pairs of 16 bits on x86-64.
#include <cstring>
#if defined(__aarch64__)
#include <arm_neon.h>
#elif defined(__SSE2__)
#include <emmintrin.h>
#endif

#include "cpu/activation_kernel.h"
#include "cpu/argmax_kernel.h"
#include "cpu/attention_kernel.h"
#include "cpu/gemm_kernel.h"
#include "cpu/half.h"
#include "cpu/int8_kernel.h"
#include "cpu/norm_kernel.h"
#include "cpu/pack_x.h"
#include "cpu/scale_kernel.h"
#include "cpu/store_kernel.h"

namespace llmpq {
namespace {

typedef float Float4 __attribute__((vector_size(16)));
typedef int32_t Int4 __attribute__((vector_size(16)));

struct Portable {
  struct F {
    Float4 part[4];
  };
  struct I {
    Int4 part[4];
  };
  static constexpr int kTileRows = 4, kChains = 4;
  static constexpr int kPanels = 1, kPairFrom = kTileRows + 1;
  static constexpr int kAttentionSums = 4;
  static constexpr int kInt8Rows = 4, kInt8PairFrom = kInt8Rows + 1, kInt8Chains = 1;

  // A vector whose part i is body(i).
  template <class Result, class Body>
  static LLMPQ_INLINE Result make(Body&& body) {
    return {{body(0), body(1), body(2), body(3)}};
  }
  // A vector whose lane i is body(i).
  template <class Body>
  static LLMPQ_INLINE F lanes(Body&& body) {
    float x[kLanes];
    for (int i = 0; i < kLanes; ++i) x[i] = body(i);
    return load(x);
  }

  static LLMPQ_INLINE F zero() { return broadcast(0.0f); }
  static LLMPQ_INLINE F broadcast(float x) {
    return make<F>([&](int) LLMPQ_LAMBDA { return Float4{x, x, x, x}; });
  }
  static LLMPQ_INLINE F load(const float* p) {
    F x;
    std::memcpy(&x, p, sizeof x);
    return x;
  }
  static LLMPQ_INLINE void store(float* p, F x) { std::memcpy(p, &x, sizeof x); }
  static LLMPQ_INLINE F load_first(const float* p, int count) {
    float x[kLanes] = {};
    std::memcpy(x, p, sizeof(float) * count);
    return load(x);
  }
  static LLMPQ_INLINE void store_first(float* p, F x, int count) { std::memcpy(p, &x, sizeof(float) * count); }
  static LLMPQ_INLINE F first_or(F x, int count, F rest) {
    std::memcpy(&rest, &x, sizeof(float) * count);
    return rest;
  }
  static LLMPQ_INLINE F first(F x, int count) { return load_first(reinterpret_cast<const float*>(&x), count); }
  static LLMPQ_INLINE F add(F a, F b) {
    return make<F>([&](int i) LLMPQ_LAMBDA { return a.part[i] + b.part[i]; });
  }
  static LLMPQ_INLINE F sub(F a, F b) {
    return make<F>([&](int i) LLMPQ_LAMBDA { return a.part[i] - b.part[i]; });
  }
  static LLMPQ_INLINE F mul(F a, F b) {
    return make<F>([&](int i) LLMPQ_LAMBDA { return a.part[i] * b.part[i]; });
  }
  static LLMPQ_INLINE F div(F a, F b) {
    return make<F>([&](int i) LLMPQ_LAMBDA { return a.part[i] / b.part[i]; });
  }
  static LLMPQ_INLINE F select_negative(F x, F a, F b) {
    return make<F>([&](int i) LLMPQ_LAMBDA { return (Int4)x.part[i] < 0 ? a.part[i] : b.part[i]; });
  }
  // Fused where the processor has it; the first x86-64 had not.
  static LLMPQ_INLINE F fma(F a, F b, F c) {
#if defined(__aarch64__)
    return make<F>([&](int i) LLMPQ_LAMBDA { return (Float4)vfmaq_f32(c.part[i], a.part[i], b.part[i]); });
#else
    return make<F>([&](int i) LLMPQ_LAMBDA { return a.part[i] * b.part[i] + c.part[i]; });
#endif
  }
  static LLMPQ_INLINE F max(F a, F b) {
    return make<F>([&](int i) LLMPQ_LAMBDA { return a.part[i] > b.part[i] ? a.part[i] : b.part[i]; });
  }
  static LLMPQ_INLINE F min(F a, F b) {
    return make<F>([&](int i) LLMPQ_LAMBDA { return a.part[i] < b.part[i] ? a.part[i] : b.part[i]; });
  }
  static LLMPQ_INLINE F round(F x) {  // of |x| < 2^22, to the nearest even
    const F shifter = broadcast(0x1.8p23f);
    return sub(add(x, shifter), shifter);
  }
  static LLMPQ_INLINE F power_of_two(F n) {
    return make<F>([&](int i)
                       LLMPQ_LAMBDA { return (Float4)((__builtin_convertvector(n.part[i], Int4) + 127) << 23); });
  }
  static LLMPQ_INLINE float lane(F x) { return x.part[0][0]; }
  static LLMPQ_INLINE float largest(F x) {
    float result = x.part[0][0];
    for (int i = 1; i < kLanes; ++i) result = x.part[i / 4][i % 4] > result ? x.part[i / 4][i % 4] : result;
    return result;
  }
  static LLMPQ_INLINE float sum(F x) {
    const Float4 x4 = (x.part[0] + x.part[2]) + (x.part[1] + x.part[3]);
    return (x4[0] + x4[2]) + (x4[1] + x4[3]);
  }
  static LLMPQ_INLINE F sums(const F (&x)[16]) {
    return lanes([&](int i) LLMPQ_LAMBDA { return sum(x[i]); });
  }

  static LLMPQ_INLINE I load_words(const uint8_t* p) {
    I words;
    std::memcpy(&words, p, sizeof words);
    return words;
  }
  static LLMPQ_INLINE I top_bits(I w0, I w1, I w2) {
    return make<I>([&](int i) LLMPQ_LAMBDA {
      return (w0.part[i] >> 3 & 0x11111111) | (w1.part[i] >> 2 & 0x22222222) | (w2.part[i] >> 1 & 0x44444444);
    });
  }
  template <int Bits>
  static LLMPQ_INLINE I flip(I words) {
    constexpr uint32_t kTops = Bits == 3 ? 0x44444444u : Bits == 4 ? 0x88888888u : 0x80808080u;
    return make<I>([&](int i) LLMPQ_LAMBDA { return words.part[i] ^ static_cast<int32_t>(kTops); });
  }
  template <int Bits, int Center>
  static LLMPQ_INLINE F field(I words, int j) {
    const int right = (Bits == 8 ? 8 : 4) * j, left = 32 - Bits - right;
    return make<F>([&](int i) LLMPQ_LAMBDA {
      const Int4 field = Center == 0 ? words.part[i] >> right & ((1 << Bits) - 1)
                                     : words.part[i] << left >> (32 - Bits);
      return __builtin_convertvector(field, Float4);
    });
  }

  static LLMPQ_INLINE I add(I a, I b) {
    return make<I>([&](int i) LLMPQ_LAMBDA { return a.part[i] + b.part[i]; });
  }
  static LLMPQ_INLINE I broadcast_int(int x) {
    return make<I>([&](int) LLMPQ_LAMBDA { return Int4{x, x, x, x}; });
  }
  static LLMPQ_INLINE F to_float(I x) {
    return make<F>([&](int i) LLMPQ_LAMBDA { return __builtin_convertvector(x.part[i], Float4); });
  }
  static LLMPQ_INLINE I load_uint8_int(const uint8_t* p) {
    return make<I>([&](int i) LLMPQ_LAMBDA { return Int4{p[4 * i], p[4 * i + 1], p[4 * i + 2], p[4 * i + 3]}; });
  }
  template <int Bits>
  static LLMPQ_INLINE I even_codes(I words) {
    return make<I>([&](int i) LLMPQ_LAMBDA { return words.part[i] & ((1 << Bits) - 1) * 0x01010101; });
  }
  template <int Bits>
  static LLMPQ_INLINE I odd_codes(I words) {
    return make<I>([&](int i) LLMPQ_LAMBDA { return words.part[i] >> 4 & ((1 << Bits) - 1) * 0x01010101; });
  }
  static LLMPQ_INLINE I int8_operand(I words) { return words; }
  static constexpr int operand_offset(int) { return 0; }
#if defined(__SSE2__)
  // Bytes are multiplied as pairs of 16 bits: those at even and at odd places of four.
  using Sum = I;
  struct Four {
    __m128i even, odd;
  };

  static LLMPQ_INLINE Int4 madd(Int4 a, __m128i b) { return (Int4)_mm_madd_epi16((__m128i)a, b); }
  static LLMPQ_INLINE Four broadcast4(const int8_t* p) {
    int32_t four;
    std::memcpy(&four, p, sizeof four);
    const __m128i x = _mm_set1_epi32(four);
    return {_mm_srai_epi16(_mm_slli_epi16(x, 8), 8), _mm_srai_epi16(x, 8)};
  }
  static LLMPQ_INLINE I multiply16(I a, I b) {
    return make<I>([&](int i) LLMPQ_LAMBDA { return madd(a.part[i], (__m128i)b.part[i]); });
  }
  static LLMPQ_INLINE void start(Sum& sum, I value) { sum = value; }
  template <int Bits>
  static LLMPQ_INLINE void dot(Sum& sum, I codes, const Four& x) {
    sum = make<I>([&](int i) LLMPQ_LAMBDA {
      const Int4 even = codes.part[i] & 0x00ff00ff, odd = codes.part[i] >> 8 & 0x00ff00ff;
      return sum.part[i] + madd(even, x.even) + madd(odd, x.odd);
    });
  }
  static LLMPQ_INLINE I value(const Sum& sum) { return sum; }
#else
  // Sums of products of bytes as floats, which are exact: none exceeds 2^24 within a group of x.
  struct Sum {
    F value;
  };
  struct Four {
    float x[4];
  };

  static LLMPQ_INLINE Four broadcast4(const int8_t* p) {
    return {{static_cast<float>(p[0]), static_cast<float>(p[1]), static_cast<float>(p[2]), static_cast<float>(p[3])}};
  }
  static LLMPQ_INLINE I multiply16(I a, I b) {
    return make<I>([&](int i) LLMPQ_LAMBDA { return a.part[i] * (b.part[i] << 16 >> 16); });
  }
  static LLMPQ_INLINE void start(Sum& sum, I value) { sum.value = to_float(value); }
  template <int Bits>
  static LLMPQ_INLINE void dot(Sum& sum, I codes, const Four& x) {
    for (int j = 0; j < 4; ++j) {
      sum.value = make<F>([&](int i) LLMPQ_LAMBDA {
        return sum.value.part[i] + __builtin_convertvector(codes.part[i] >> 8 * j & 255, Float4) * x.x[j];
      });
    }
  }
  static LLMPQ_INLINE I value(const Sum& sum) {
    return make<I>([&](int i) LLMPQ_LAMBDA { return __builtin_convertvector(sum.value.part[i], Int4); });
  }
#endif
  template <int Bits>
  static LLMPQ_INLINE void end_block(Sum&) {}
  static LLMPQ_INLINE void store_int8(int8_t* p, F x, bool nibbles) {
    for (int i = 0; i < kLanes; ++i) {
      const int to = nibbles ? i / 8 * 8 + i % 2 * 4 + i % 8 / 2 : i;
      p[to] = static_cast<int8_t>(x.part[i / 4][i % 4]);
    }
  }
  static LLMPQ_INLINE F load_uint8(const uint8_t* p) {
    return lanes([&](int i) LLMPQ_LAMBDA { return static_cast<float>(p[i]); });
  }
  static LLMPQ_INLINE F load_int8(const int8_t* p) {
    return lanes([&](int i) LLMPQ_LAMBDA { return static_cast<float>(p[i]); });
  }
  static LLMPQ_INLINE uint16_t half(const uint8_t* p, int i) {
    uint16_t half;
    std::memcpy(&half, p + 2 * i, sizeof half);
    return half;
  }
  static LLMPQ_INLINE F load_float16(const uint8_t* p) {
    return lanes([&](int i) LLMPQ_LAMBDA { return float_of_half(half(p, i)); });
  }
  static LLMPQ_INLINE void store_float16(uint8_t* p, F x) {
    for (int i = 0; i < kLanes; ++i) {
      const uint16_t half = half_of_float(x.part[i / 4][i % 4]);
      std::memcpy(p + 2 * i, &half, sizeof half);
    }
  }
  static LLMPQ_INLINE F load_bfloat16(const uint8_t* p) {
    return lanes([&](int i) LLMPQ_LAMBDA { return float_of_bfloat16(half(p, i)); });
  }
};

}  // namespace

extern const Kernels kPortableKernels = {
    "portable",
    {Portable::kTileRows, Portable::kPanels, pack_float_row<Portable>, gemm_panels<Portable>},
    {Portable::kInt8Rows, Portable::kPanels, quantize_row<Portable>, int8_panels<Portable>},
    rotate_and_store_run<Portable>,
    attention_task<Portable>,
    attention_chunk<Portable>,
    attention_merge<Portable>,
    rms_norm_row<Portable>,
    layer_norm_row<Portable>,
    activate_row<Portable>,
    scale_row<Portable>,
    argmax_row<Portable>,
};

}  // namespace llmpq

// The kernels in AVX2 where the processor also multiplies bytes in one step (AVX-VNNI).
#include "cpu/avx2.h"

#include "cpu/activation_kernel.h"
#include "cpu/argmax_kernel.h"
#include "cpu/attention_kernel.h"
#include "cpu/gemm_kernel.h"
#include "cpu/int8_kernel.h"
#include "cpu/norm_kernel.h"
#include "cpu/pack_x.h"
#include "cpu/scale_kernel.h"
#include "cpu/store_kernel.h"

namespace llmpq {
namespace {

struct AvxVnni : Avx2 {
  static constexpr int kInt8Rows = 6, kInt8PairFrom = kInt8Rows + 1, kInt8Chains = 4;
  struct Sum {
    I value;
  };

  static LLMPQ_INLINE I int8_operand(I words) { return words; }
  static constexpr int operand_offset(int) { return 0; }
  static LLMPQ_INLINE void start(Sum& sum, I value) { sum.value = value; }
  template <int Bits>
  static LLMPQ_INLINE void dot(Sum& sum, I codes, __m256i x) {
    sum.value = {_mm256_dpbusd_avx_epi32(sum.value.low, codes.low, x),
                 _mm256_dpbusd_avx_epi32(sum.value.high, codes.high, x)};
  }
  template <int Bits>
  static LLMPQ_INLINE void end_block(Sum&) {}
  static LLMPQ_INLINE I value(const Sum& sum) { return sum.value; }
};

}  // namespace

extern const Kernels kAvxVnniKernels = {
    "avxvnni",
    {AvxVnni::kTileRows, AvxVnni::kPanels, pack_float_row<AvxVnni>, gemm_panels<AvxVnni>},
    {AvxVnni::kInt8Rows, AvxVnni::kPanels, quantize_row<AvxVnni>, int8_panels<AvxVnni>},
    rotate_and_store_run<AvxVnni>,
    attention_task<AvxVnni>,
    attention_chunk<AvxVnni>,
    attention_merge<AvxVnni>,
    rms_norm_row<AvxVnni>,
    layer_norm_row<AvxVnni>,
    activate_row<AvxVnni>,
    scale_row<AvxVnni>,
    argmax_row<AvxVnni>,
};

}  // namespace llmpq

// The kernels in AVX-512 (F, BW, DQ, VL, VNNI).
#include "cpu/avx512.h"

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

extern const Kernels kAvx512Kernels = {
    "avx512",
    {Avx512::kTileRows, Avx512::kPanels, pack_float_row<Avx512>, gemm_panels<Avx512>},
    {Avx512::kInt8Rows, Avx512::kPanels, quantize_row<Avx512>, int8_panels<Avx512>},
    rotate_and_store_run<Avx512>,
    attention_task<Avx512>,
    attention_chunk<Avx512>,
    attention_merge<Avx512>,
    rms_norm_row<Avx512>,
    layer_norm_row<Avx512>,
    activate_row<Avx512>,
    scale_row<Avx512>,
    argmax_row<Avx512>,
};

}  // namespace llmpq

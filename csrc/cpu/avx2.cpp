// The kernels in AVX2 with FMA and F16C.
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

extern const Kernels kAvx2Kernels = {
    "avx2",
    {Avx2::kTileRows, Avx2::kPanels, pack_float_row<Avx2>, gemm_panels<Avx2>},
    {Avx2::kInt8Rows, Avx2::kPanels, quantize_row<Avx2>, int8_panels<Avx2>},
    rotate_and_store_run<Avx2>,
    attention_task<Avx2>,
    attention_chunk<Avx2>,
    attention_merge<Avx2>,
    rms_norm_row<Avx2>,
    layer_norm_row<Avx2>,
    activate_row<Avx2>,
    scale_row<Avx2>,
    argmax_row<Avx2>,
};

}  // namespace llmpq

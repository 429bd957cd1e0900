// The product of many rows of x as int8 in AMX, with AVX-512 for all else.
//
// Not yet run on a processor that has it: tests execute its instructions in software (tests/support/amx).
#include "cpu/amx_kernel.h"
#include "cpu/avx512.h"

#if defined(LLMPQ_EMULATED_TILES)
#include "amx/emulated_tiles.h"
#endif

namespace llmpq {

#if defined(LLMPQ_EMULATED_TILES)
using Tiles = EmulatedTiles;
#else
using Tiles = AmxTiles;
#endif

extern const GemmKernel<Int8Rows> kAmxGemm = {
    kTile, kUnit, quantize_tile_row<Avx512>, tile_panels<Avx512, Tiles>, true,
};

}  // namespace llmpq

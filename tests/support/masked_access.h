// Included before the CPU kernels in a build with LLMPQ_SANITIZE. GCC's sanitizers do not see loads and stores under a
// mask, so that plain loads of the same lanes go ahead of each.
#pragma once

#if defined(__AVX2__)
#include <immintrin.h>

static inline void touch(const float* p, unsigned lanes) {
  for (int i = 0; i < 16; ++i) {
    if (lanes >> i & 1) *static_cast<const volatile float*>(p + i);
  }
}

#define LANES_OF_256(mask) _mm256_movemask_ps(_mm256_castsi256_ps(mask))
#define _mm256_maskload_ps(p, mask) (touch(p, LANES_OF_256(mask)), _mm256_maskload_ps(p, mask))
#define _mm256_maskstore_ps(p, mask, x) (touch(p, LANES_OF_256(mask)), _mm256_maskstore_ps(p, mask, x))
#define _mm512_maskz_loadu_ps(mask, p) (touch(p, mask), _mm512_maskz_loadu_ps(mask, p))
#define _mm512_mask_storeu_ps(p, mask, x) (touch(p, mask), _mm512_mask_storeu_ps(p, mask, x))
#endif

// The tile registers of AMX: eight, of 16 rows of 64 bytes each, named by number. In asm of our own, since GCC's
// intrinsics (12.2) do not say which memory they read, so that stores to it are moved behind them or left out.
#pragma once

#include <cstddef>
#include <cstdint>

#include "cpu/unroll.h"

namespace llmpq {

// What LDTILECFG reads and STTILECFG writes. The instructions work on as much of a tile as is configured.
struct TileConfig {
  uint8_t palette;  // 1; 0: nothing is configured
  uint8_t start_row;
  uint8_t reserved[14];
  uint16_t column_bytes[16];  // of the eight tiles; the others 0
  uint8_t rows[16];
};
static_assert(sizeof(TileConfig) == 64 && offsetof(TileConfig, column_bytes) == 16 && offsetof(TileConfig, rows) == 48,
              "the processor's own layout");

#if defined(__x86_64__)
struct AmxTiles {
  // Makes all tiles zero.
  static LLMPQ_INLINE void configure(const TileConfig& config) {
    asm volatile("ldtilecfg %0" : : "m"(config) : "memory");
  }
  static LLMPQ_INLINE void read_config(TileConfig& config) { asm volatile("sttilecfg %0" : "=m"(config) : : "memory"); }
  static LLMPQ_INLINE void release() { asm volatile("tilerelease" : : : "memory"); }

  template <int Tile>
  static LLMPQ_INLINE void zero() {
    asm volatile("tilezero %%tmm%c0" : : "i"(Tile));
  }
  // Rows of a tile lie `stride` bytes apart.
  template <int Tile>
  static LLMPQ_INLINE void load(const void* from, int64_t stride) {
    asm volatile("tileloadd (%0,%1,1), %%tmm%c2" : : "r"(from), "r"(stride), "i"(Tile) : "memory");
  }
  template <int Tile>
  static LLMPQ_INLINE void store(void* to, int64_t stride) {
    asm volatile("tilestored %%tmm%c2, (%0,%1,1)" : : "r"(to), "r"(stride), "i"(Tile) : "memory");
  }
  // sums[m][n] += the products of bytes a[m][4 k + i] and b[k][4 n + i], all signed; sums are int32.
  template <int Sums, int A, int B>
  static LLMPQ_INLINE void dot() {
    asm volatile("tdpbssd %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(Sums), "i"(A), "i"(B));
  }
};
#endif

}  // namespace llmpq

// Tiles (csrc/cpu/amx_tiles.h) in C++, for builds that watch what is read and written.
#pragma once

#include "amx/tile_state.h"
#include "cpu/amx_tiles.h"

namespace {

struct EmulatedTiles {
  static void configure(const llmpq::TileConfig& config) { tile_state.load_config(&config); }
  static void read_config(llmpq::TileConfig& config) { tile_state.store_config(&config); }
  static void release() { tile_state.release(); }
  template <int Tile>
  static void zero() {
    tile_state.zero(Tile);
  }
  template <int Tile>
  static void load(const void* from, int64_t stride) {
    tile_state.load(Tile, static_cast<const uint8_t*>(from), stride);
  }
  template <int Tile>
  static void store(void* to, int64_t stride) {
    tile_state.store(Tile, static_cast<uint8_t*>(to), stride);
  }
  template <int Sums, int A, int B>
  static void dot() {
    tile_state.dot(Sums, A, B);
  }
};

}  // namespace

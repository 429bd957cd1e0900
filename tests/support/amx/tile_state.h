// The tiles of one thread, and what AMX's instructions do to them, after Intel's manual (Volume 2 of the Software
// Developer's Manual). What a processor answers with an exception ends the process here, with a message.
#pragma once

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

namespace {

class TileState {
 public:
  void load_config(const void* from) {
    uint8_t wanted[64];
    std::memcpy(wanted, from, sizeof wanted);
    std::memset(tiles_, 0, sizeof tiles_);
    if (wanted[0] == 0) return release();
    check(wanted[0] == 1, "LDTILECFG: there is palette 1 alone");
    for (int i = 1; i < 16; ++i) check(wanted[i] == 0, "LDTILECFG: a reserved byte, or the row to start at, is set");
    for (int i = 32; i < 48; ++i) check(wanted[i] == 0, "LDTILECFG: there are eight tiles");
    for (int i = 56; i < 64; ++i) check(wanted[i] == 0, "LDTILECFG: there are eight tiles");
    std::memcpy(config_, wanted, sizeof config_);
    for (int tile = 0; tile < 8; ++tile) {
      check(rows(tile) <= 16 && column_bytes(tile) <= 64, "LDTILECFG: a tile is too large");
      check((rows(tile) == 0) == (column_bytes(tile) == 0), "LDTILECFG: a tile has rows or columns alone");
    }
  }
  void store_config(void* to) const { std::memcpy(to, config_, sizeof config_); }
  void release() {
    std::memset(config_, 0, sizeof config_);
    std::memset(tiles_, 0, sizeof tiles_);
  }
  void zero(int tile) {
    check_configured(tile);
    std::memset(tiles_[tile], 0, sizeof tiles_[tile]);
  }
  void load(int tile, const uint8_t* from, int64_t stride) {
    zero(tile);
    for (int row = 0; row < rows(tile); ++row) std::memcpy(tiles_[tile][row], from + row * stride, column_bytes(tile));
  }
  void store(int tile, uint8_t* to, int64_t stride) const {
    check_configured(tile);
    for (int row = 0; row < rows(tile); ++row) std::memcpy(to + row * stride, tiles_[tile][row], column_bytes(tile));
  }
  // TDPBSSD
  void dot(int sums, int a, int b) {
    for (int tile : {sums, a, b}) check_configured(tile);
    check(sums != a && sums != b && a != b, "TDPBSSD: two operands are one tile");
    check(rows(sums) == rows(a), "TDPBSSD: the sums have other rows than the first operand");
    check(column_bytes(sums) == column_bytes(b), "TDPBSSD: the sums have other columns than the second operand");
    check(column_bytes(a) == 4 * rows(b), "TDPBSSD: the operands do not fit each other");
    check(column_bytes(sums) % 4 == 0, "TDPBSSD: a sum is cut");
    for (int m = 0; m < rows(sums); ++m) {
      for (int n = 0; n < column_bytes(sums) / 4; ++n) {
        uint32_t sum;
        std::memcpy(&sum, tiles_[sums][m] + 4 * n, sizeof sum);
        for (int k = 0; k < rows(b); ++k) {
          for (int i = 0; i < 4; ++i) {
            const int left = static_cast<int8_t>(tiles_[a][m][4 * k + i]);
            sum += static_cast<uint32_t>(left * static_cast<int8_t>(tiles_[b][k][4 * n + i]));
          }
        }
        std::memcpy(tiles_[sums][m] + 4 * n, &sum, sizeof sum);
      }
    }
  }

 private:
  static void check(bool right, const char* message) {
    if (right) return;
    std::fprintf(stderr, "%s\n", message);
    std::abort();
  }
  void check_configured(int tile) const { check(rows(tile) > 0, "a tile is used that is not configured"); }
  int rows(int tile) const { return config_[48 + tile]; }
  int column_bytes(int tile) const { return config_[16 + 2 * tile] | config_[17 + 2 * tile] << 8; }

  uint8_t config_[64] = {};
  uint8_t tiles_[8][16][64] = {};
};

thread_local TileState tile_state;

}  // namespace

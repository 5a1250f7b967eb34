// A thread's AMX on any CPU, for code that is written against a Machine (csrc/amx_tile.h). What ldtilecfg, tileloadd,
// tilestored, tilezero and tdpbf16ps do, and when they fault, is taken from Intel's manual.
#pragma once

#include <cstdint>
#include <cstring>

#include "amx_tile.h"

namespace emulated {

constexpr int kTiles = 8, kMostRows = 16, kMostBytes = 64;

struct Tile {
  int rows = 0, row_bytes = 0;
  uint8_t bytes[kMostRows][kMostBytes] = {};
};

inline float as_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

// Denormals are zeros, whether read or written.
inline float flushed(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return (bits & 0x7f800000u) == 0 ? as_float(bits & 0x80000000u) : value;
}

// value + a * b, rounded once to the nearest.
inline float fused(float value, float a, float b) { return flushed(__builtin_fmaf(flushed(a), flushed(b), value)); }

class Amx {
 public:
  static void configure(const talos::amx::TileConfig& config) {
    uint8_t raw[64];
    static_assert(sizeof(config) == sizeof(raw));
    std::memcpy(raw, &config, sizeof(raw));
    configured_ = true;
    if (raw[0] != 1 || raw[1] != 0) fail("ldtilecfg: palette or start row");
    for (int i = 2; i < 64; ++i) {
      const bool unused = i < 16 || (i >= 32 && i < 48) || i >= 56;
      if (unused && raw[i] != 0) fail("ldtilecfg: a reserved byte is set");
    }
    for (int t = 0; t < kTiles; ++t) {
      tiles_[t] = Tile{raw[48 + t], raw[16 + 2 * t] | raw[17 + 2 * t] << 8, {}};
      if (tiles_[t].rows > kMostRows || tiles_[t].row_bytes > kMostBytes) fail("ldtilecfg: a tile is too large");
      if ((tiles_[t].rows == 0) != (tiles_[t].row_bytes == 0)) fail("ldtilecfg: a tile with half a size");
    }
  }

  static void release() {
    if (!configured_) fail("tilerelease of what is not configured");
    configured_ = false;
    for (Tile& tile : tiles_) tile = Tile{};
  }

  template <int TILE>
  static void zero() {
    zero(TILE);
  }
  template <int TILE>
  static void load(const void* from, int64_t stride) {
    load(TILE, from, stride);
  }
  template <int TILE>
  static void store(void* to, int64_t stride) {
    store(TILE, to, stride);
  }
  template <int SUM, int GRADS, int INPUTS>
  static void multiply_add() {
    multiply_add(SUM, GRADS, INPUTS);
  }

  // The same with numbers that are known when the code runs.
  static void zero(int number) { std::memset(ready(number).bytes, 0, sizeof(Tile::bytes)); }

  static void load(int number, const void* from, int64_t stride) {
    Tile& tile = ready(number);
    std::memset(tile.bytes, 0, sizeof(tile.bytes));
    for (int r = 0; r < tile.rows; ++r) {
      std::memcpy(tile.bytes[r], static_cast<const char*>(from) + r * stride, tile.row_bytes);
    }
  }

  static void store(int number, void* to, int64_t stride) {
    const Tile& tile = ready(number);
    for (int r = 0; r < tile.rows; ++r) std::memcpy(static_cast<char*>(to) + r * stride, tile.bytes[r], tile.row_bytes);
  }

  // The even tokens and the odd ones are summed apart, from zero, and their sum is added to the tile.
  static void multiply_add(int to, int left, int right) {
    Tile &sum = ready(to), &a = ready(left), &b = ready(right);
    if (a.rows != sum.rows || b.row_bytes != sum.row_bytes || a.row_bytes / 4 != b.rows || a.row_bytes % 4 != 0) {
      return fail("tdpbf16ps: sizes");
    }
    for (int m = 0; m < sum.rows; ++m) {
      for (int n = 0; n < sum.row_bytes / 4; ++n) {
        float halves[2] = {0, 0};
        for (int k = 0; k < a.row_bytes / 4; ++k) {
          for (int h = 0; h < 2; ++h) {
            halves[h] = fused(halves[h], bfloat16(a, m, 2 * k + h), bfloat16(b, k, 2 * n + h));
          }
        }
        float total;
        std::memcpy(&total, sum.bytes[m] + 4 * n, 4);
        total = flushed(flushed(total) + flushed(halves[0] + halves[1]));
        std::memcpy(sum.bytes[m] + 4 * n, &total, 4);
      }
    }
  }

  static void reset() {
    error = nullptr;
    configured_ = false;
  }
  static bool is_configured() { return configured_; }

  static inline const char* error = nullptr;  // the first fault

 private:
  static void fail(const char* what) {
    if (error == nullptr) error = what;
  }

  static Tile& ready(int tile) {
    if (!configured_) fail("a tile register is used, but none is configured");
    return tiles_[tile];
  }

  static float bfloat16(const Tile& tile, int row, int entry) {
    uint16_t bits;
    std::memcpy(&bits, tile.bytes[row] + 2 * entry, 2);
    return as_float(uint32_t{bits} << 16);
  }

  static inline Tile tiles_[kTiles];
  static inline bool configured_ = false;
};

}  // namespace emulated

// The register tile of AMX, written once for the processor (amx.h) and for the emulator of the CPU tests: 32 x 32
// scores in four tile registers, squared in the vector registers at the end of a sample.
//
//   squares[o][i] += (sum over t of grads[t][o] * inputs[t][i])^2
//
// A step is 32 tokens. One multiplication takes a tile of 16 grads, (out, token), and one of 16 inputs, (pair of
// tokens, in), so packing transposes the grads. Products of bfloat16 are exact, sums are rounded to fp32, and values
// below 1.2e-38 count as zero, as with AVX512-BF16.
#pragma once

#include <cstring>
#include <utility>

#include "tile_kernel.h"
#include "token_pair.h"

#ifndef TALOS_AMX_TARGET
#define TALOS_AMX_TARGET  // the instruction set of the vector part: any
#endif

namespace talos::amx {

constexpr int kSide = 16;                // rows of a tile register, and its columns of 32 bits
constexpr int kRowBytes = 4 * kSide;     // of a tile register
constexpr int kEntries = kSide * kSide;  // pairs of tokens, or sums, in a tile register
constexpr int kTokens = 2 * kSide;       // of one step
constexpr int kWidth = 2 * kSide;        // features of a panel

// What ldtilecfg reads: all eight tile registers of their full size.
struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};

  TileConfig() {
    for (int tile = 0; tile < 8; ++tile) row_bytes[tile] = kRowBytes, rows[tile] = kSide;
  }
};

// Four 16 x 16 sums <-> a row-major 32 x 32 array.
template <typename Machine>
TALOS_SHARED void load_sums(const void* from) {
  constexpr int kStride = kWidth * 4;
  const char* const at = static_cast<const char*>(from);
  Machine::template load<0>(at, kStride);
  Machine::template load<1>(at + kRowBytes, kStride);
  Machine::template load<2>(at + kSide * kStride, kStride);
  Machine::template load<3>(at + kSide * kStride + kRowBytes, kStride);
}

template <typename Machine>
TALOS_SHARED void store_sums(void* to) {
  constexpr int kStride = kWidth * 4;
  char* const at = static_cast<char*>(to);
  Machine::template store<0>(at, kStride);
  Machine::template store<1>(at + kRowBytes, kStride);
  Machine::template store<2>(at + kSide * kStride, kStride);
  Machine::template store<3>(at + kSide * kStride + kRowBytes, kStride);
}

// Sums += 32 tokens of two tiles of grads and two of inputs.
template <typename Machine>
TALOS_SHARED void multiply(const TokenPair* grads, const TokenPair* inputs) {
  Machine::template load<4>(grads, kRowBytes);
  Machine::template load<6>(inputs, kRowBytes);
  Machine::template multiply_add<0, 4, 6>();
  Machine::template load<7>(inputs + kEntries, kRowBytes);
  Machine::template multiply_add<1, 4, 7>();
  Machine::template load<5>(grads + kEntries, kRowBytes);
  Machine::template multiply_add<2, 5, 6>();
  Machine::template multiply_add<3, 5, 7>();
}

// squares[r][c] += products[r][c]^2, a row of the register tile at a time.
TALOS_SHARED void add_rows(float* squares, const float* products) {
  typedef float Vector __attribute__((vector_size(kRowBytes)));
  for (int r = 0; r < kWidth; ++r, squares += kWidth, products += kWidth) {
    Vector square[1][2], product[1][2];
    std::memcpy(square, squares, sizeof(square));
    std::memcpy(product, products, sizeof(product));
    add_squares(square, product);
    std::memcpy(squares, square, sizeof(square));
  }
}

template <typename Machine>
TALOS_SHARED void run_steps(const void* grads, const void* inputs, int64_t steps, bool first, bool last, void* parked,
                            void* squares) {
  if (first) {
    Machine::template zero<0>(), Machine::template zero<1>();
    Machine::template zero<2>(), Machine::template zero<3>();
  } else {
    load_sums<Machine>(parked);
  }
  const TokenPair *grad = static_cast<const TokenPair*>(grads), *input = static_cast<const TokenPair*>(inputs);
  for (int64_t s = 0; s < steps; ++s, grad += 2 * kEntries, input += 2 * kEntries) multiply<Machine>(grad, input);
  if (!last) return store_sums<Machine>(parked);
  alignas(64) float products[kWidth * kWidth];  // tile registers reach vector registers through memory only
  store_sums<Machine>(products);
  add_rows(static_cast<float*>(squares), products);
}

// 32 tokens of 16 features as (pair, feature); zeros beyond the tokens and the `inside` features that there are.
TALOS_SHARED void pack_tile(const uint16_t* from, const Strides& strides, int64_t tokens, int64_t inside,
                            TokenPair* to) {
  for (int p = 0; p < kSide; ++p, from += 2 * strides.token, tokens -= 2, to += kSide) {
    if (tokens > 0) {
      pack_pairs<kSide>(from, strides, tokens, inside, to);
    } else {
      std::memset(to, 0, kRowBytes);
    }
  }
}

typedef uint32_t Pairs __attribute__((vector_size(kRowBytes)));

#if defined(__clang__)
#define TALOS_SHUFFLE(ABOVE, BELOW, ...) __builtin_shufflevector(ABOVE, BELOW, __VA_ARGS__)
#else
#define TALOS_SHUFFLE(ABOVE, BELOW, ...) __builtin_shuffle(ABOVE, BELOW, Pairs{__VA_ARGS__})
#endif

// Swaps, in every block of 2 DISTANCE rows and columns, the quarters off the diagonal. Entries of the row below are
// numbered behind those of the row above.
template <uint32_t DISTANCE, uint32_t... COLUMN>
TALOS_SHARED void swap_quarters(Pairs (&rows)[kSide], std::integer_sequence<uint32_t, COLUMN...>) {
  TALOS_UNROLL
  for (uint32_t r = 0; r < kSide; ++r) {
    if ((r & DISTANCE) != 0) continue;
    const Pairs above = rows[r], below = rows[r + DISTANCE];
    rows[r] = TALOS_SHUFFLE(above, below, ((COLUMN & DISTANCE) == 0 ? COLUMN : kSide + COLUMN - DISTANCE)...);
    rows[r + DISTANCE] =
        TALOS_SHUFFLE(above, below, ((COLUMN & DISTANCE) == 0 ? COLUMN + DISTANCE : kSide + COLUMN)...);
  }
}

TALOS_SHARED void pack_transposed_tile(const uint16_t* from, const Strides& strides, int64_t tokens, int64_t inside,
                                       TokenPair* to) {
  alignas(64) TokenPair pairs[kEntries];
  pack_tile(from, strides, tokens, inside, pairs);
  Pairs rows[kSide];
  std::memcpy(rows, pairs, sizeof(rows));
  constexpr std::make_integer_sequence<uint32_t, kSide> kColumns;
  swap_quarters<1>(rows, kColumns), swap_quarters<2>(rows, kColumns);
  swap_quarters<4>(rows, kColumns), swap_quarters<8>(rows, kColumns);
  std::memcpy(to, rows, sizeof(rows));
}

// All tokens of `features` features of one sample -> panels of (steps, 2, tile), one behind the other.
template <typename PackTile>
TALOS_SHARED void pack_panels(const void* from, const Strides& strides, int64_t tokens, int64_t features, void* panels,
                              const PackTile& pack) {
  const uint16_t* step = static_cast<const uint16_t*>(from);
  TokenPair* to = static_cast<TokenPair*>(panels);
  const int64_t panel = tile_count(tokens, kTokens) * 2 * kEntries;
  for (int64_t t = 0; t < tokens; t += kTokens, step += kTokens * strides.token, to += 2 * kEntries) {
    // Along the row of the source, as cpu_tile.h.
    for (int64_t f = 0; f < tile_count(features, kWidth) * kWidth; f += kSide) {
      pack(step + f * strides.feature, strides, tokens - t, features - f,
           to + f / kWidth * panel + f / kSide % 2 * kEntries);
    }
  }
}

template <typename Machine>
struct Kernel {
  TALOS_AMX_TARGET static void run(const void* grads, const void* inputs, int64_t steps, bool first, bool last,
                                   void* parked, void* squares) {
    run_steps<Machine>(grads, inputs, steps, first, last, parked, squares);
  }
  TALOS_AMX_TARGET static void pack_grads(const void* from, const Strides& strides, int64_t tokens, int64_t features,
                                          void* panels) {
    pack_panels(from, strides, tokens, features, panels, pack_transposed_tile);
  }
  TALOS_AMX_TARGET static void pack_inputs(const void* from, const Strides& strides, int64_t tokens, int64_t features,
                                           void* panels) {
    pack_panels(from, strides, tokens, features, panels, pack_tile);
  }
  static void begin() { Machine::configure(TileConfig()); }
  static void end() { Machine::release(); }

  // A pass's squares stay in the L1 cache, the panels of a tile and some samples in the L2 cache.
  static TileKernel kernel() {
    return {kWidth,   kWidth, kTokens, kTokens * sizeof(uint16_t), run, pack_grads, pack_inputs, {256, 256},
            {64, 64}, begin,  end};
  }
};

}  // namespace talos::amx

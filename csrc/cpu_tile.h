// The innermost part of the CPU kernel: packing, and one register tile of scores over one run of tokens.
//
//   squares[r][c] += (sum over t of grads[t][r] * inputs[t][c])^2
//
// The product of one sample lives in ROWS x 2 vector registers and is squared there. What it reads is packed into
// panels as wide as the register tile, padded with zeros, so every load is unit-stride and there are no edge cases.
#pragma once

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include "tile_kernel.h"
#include "token_pair.h"

namespace talos {

using torch::headeronly::BFloat16;
using torch::headeronly::Half;

// What a register holds for packed entries of one kind: `Input` as loaded, `Sum` as accumulated in `Score`s.
template <typename Packed, int BYTES>
struct Register {
  static constexpr int kTokens = 1;
  using Score = Packed;
  typedef Packed Input __attribute__((vector_size(BYTES)));
  typedef Packed Sum __attribute__((vector_size(BYTES)));
};

template <int BYTES>
struct Register<TokenPair, BYTES> {
  static constexpr int kTokens = 2;
  using Score = float;
  typedef uint32_t Input __attribute__((vector_size(BYTES)));
  typedef float Sum __attribute__((vector_size(BYTES)));
};

#if defined(__x86_64__)
// Assembly, because a compiler refuses the intrinsic in a function that is not itself limited to AVX512-BF16. Exact
// products, rounded fp32 sums; values below 1.2e-38 count as zero.
TALOS_SHARED void multiply_add(Register<TokenPair, 64>::Sum& product, const TokenPair& grad,
                               const Register<TokenPair, 64>::Input& input) {
  asm("vdpbf16ps %2%{1to16%}, %1, %0" : "+v"(product) : "v"(input), "m"(grad.bits));
}
#endif

// Memory to register tile and back. (A memcpy of the whole array would pin the array in memory.)
template <int ROWS, typename Vector, typename T>
TALOS_SHARED void load(Vector (&tile)[ROWS][2], const T* from) {
  TALOS_UNROLL
  for (int r = 0; r < ROWS; ++r) {
    TALOS_UNROLL
    for (int c = 0; c < 2; ++c)
      __builtin_memcpy(&tile[r][c], from + (2 * r + c) * sizeof(Vector) / sizeof(T), sizeof(Vector));
  }
}

template <int ROWS, typename Vector, typename T>
TALOS_SHARED void store(const Vector (&tile)[ROWS][2], T* to) {
  TALOS_UNROLL
  for (int r = 0; r < ROWS; ++r) {
    TALOS_UNROLL
    for (int c = 0; c < 2; ++c)
      __builtin_memcpy(to + (2 * r + c) * sizeof(Vector) / sizeof(T), &tile[r][c], sizeof(Vector));
  }
}

// A step is one token, or one pair. A sample of several runs parks its products in memory in between.
template <typename Packed, int ROWS, int BYTES>
TALOS_SHARED void run_tokens(const void* grads, const void* inputs, int64_t steps, bool first, bool last, void* parked,
                             void* squares) {
  using Vectors = Register<Packed, BYTES>;
  using Score = typename Vectors::Score;
  constexpr int LANES = BYTES / sizeof(Packed);
  const Packed* grad = static_cast<const Packed*>(grads);
  const Packed* from = static_cast<const Packed*>(inputs);
  typename Vectors::Sum product[ROWS][2] = {};
  if (!first) load(product, static_cast<const Score*>(parked));
  for (int64_t s = 0; s < steps; ++s, grad += ROWS, from += 2 * LANES) {
    typename Vectors::Input input[2];
    __builtin_memcpy(&input[0], from, BYTES);
    __builtin_memcpy(&input[1], from + LANES, BYTES);
    add_outer_product(product, grad, input);
  }
  if (last) {
    typename Vectors::Sum square[ROWS][2];
    load(square, static_cast<const Score*>(squares));
    add_squares(square, product);
    store(square, static_cast<Score*>(squares));
  } else {
    store(product, static_cast<Score*>(parked));
  }
}

// One token of one panel, zeros beyond the `inside` features that there are.
template <int WIDTH, typename To, typename From>
TALOS_SHARED void pack_step(const From* from, const Strides& strides, int64_t, int64_t inside, To* to) {
  if (inside >= WIDTH && strides.feature == 1) {
    for (int c = 0; c < WIDTH; ++c) to[c] = static_cast<To>(from[c]);
  } else {
    for (int c = 0; c < WIDTH; ++c) to[c] = c < inside ? static_cast<To>(from[c * strides.feature]) : To(0);
  }
}

// A pair of tokens of one panel; the partner of the last of an odd number of tokens is zero.
template <int WIDTH>
TALOS_SHARED void pack_step(const BFloat16* from, const Strides& strides, int64_t tokens, int64_t inside,
                            TokenPair* to) {
  pack_pairs<WIDTH>(reinterpret_cast<const uint16_t*>(from), strides, tokens, inside, to);
}

// All tokens of `features` features of one sample -> panels of (steps, WIDTH), one behind the other.
template <int WIDTH, int TOKENS, typename To, typename From>
TALOS_SHARED void pack(const From* from, const Strides& strides, int64_t tokens, int64_t features, To* to) {
  const int64_t panel = tile_count(tokens, TOKENS) * WIDTH;
  for (int64_t t = 0; t < tokens; t += TOKENS, from += TOKENS * strides.token, to += WIDTH) {
    // Along the row of the source: panel by panel would read its cache lines piecemeal.
    for (int64_t f = 0; f < features; f += WIDTH) {
      pack_step<WIDTH>(from + f * strides.feature, strides, tokens - t, features - f, to + f / WIDTH * panel);
    }
  }
}

// Functions compiled for one instruction set: the templates above are inlined into them.
#define TALOS_TILE_KERNEL(NAME, TARGET)                                                                               \
  template <typename Packed, typename From, int ROWS, int BYTES>                                                      \
  struct NAME {                                                                                                       \
    static constexpr int COLS = 2 * BYTES / sizeof(Packed), TOKENS = Register<Packed, BYTES>::kTokens;                \
    TARGET static void run(const void* grads, const void* inputs, int64_t steps, bool first, bool last, void* parked, \
                           void* squares) {                                                                           \
      run_tokens<Packed, ROWS, BYTES>(grads, inputs, steps, first, last, parked, squares);                            \
    }                                                                                                                 \
    TARGET static void pack_grads(const void* from, const Strides& strides, int64_t tokens, int64_t features,         \
                                  void* panels) {                                                                     \
      pack<ROWS, TOKENS>(static_cast<const From*>(from), strides, tokens, features, static_cast<Packed*>(panels));    \
    }                                                                                                                 \
    TARGET static void pack_inputs(const void* from, const Strides& strides, int64_t tokens, int64_t features,        \
                                   void* panels) {                                                                    \
      pack<COLS, TOKENS>(static_cast<const From*>(from), strides, tokens, features, static_cast<Packed*>(panels));    \
    }                                                                                                                 \
    static TileKernel kernel() { return {ROWS, COLS, TOKENS, sizeof(Packed), run, pack_grads, pack_inputs}; }         \
  };

TALOS_TILE_KERNEL(PortableTile, )
#if defined(__x86_64__)
TALOS_TILE_KERNEL(Avx2Tile, __attribute__((target("avx2,fma,f16c"))))
TALOS_TILE_KERNEL(Avx512Tile, __attribute__((target("avx512f,avx512bw,avx512vl,f16c"))))
TALOS_TILE_KERNEL(Avx512Bf16Tile, __attribute__((target("avx512f,avx512bw,avx512vl,avx512bf16"))))
#endif

}  // namespace talos

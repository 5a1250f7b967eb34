// The CPU kernel: one tile of scores, all samples.
//
// A tile of scores stays in cache while every sample passes over it: samples outside, tokens inside.
// The product of one sample lives in a register tile (ROWS x 2 vectors), which is squared and added
// to the tile before the next sample starts, so neither (samples, outs, ins) nor (outs, ins) products
// are ever in memory. Inputs are packed once into panels as wide as the register tile and padded with
// zeros, which makes every load unit-stride and leaves the kernel without edge cases.
#pragma once

#include <cstring>
#include <memory>
#include <vector>

#include "isa.h"
#include "squared.h"

namespace talos {

constexpr int64_t kTileOuts = 96;  // a multiple of every ROWS below
constexpr int64_t kTileIns = 256;  // a multiple of every register tile's width
constexpr int64_t kTokens = 128;   // tokens at a time; keeps one panel in L1

// A (samples, tokens, features) array as (samples, features / width, tokens, width), the last panel of
// each sample filled up with zeros. Packed once: packing for every tile would cost as much as the sums.
template <typename T>
struct Panels {
  Panels(int64_t samples, int64_t tokens, int64_t features, int64_t width)
      : tokens(tokens),
        features(features),
        width(width),
        count(tile_count(features, width)),
        data(new T[samples * count * tokens * width]) {}

  const T* at(int64_t sample, int64_t feature, int64_t token) const {
    return data.get() + ((sample * count + feature / width) * tokens + token) * width;
  }

  // WIDTH is `width` again, known to the compiler: a copy is then a few vector moves, not a call.
  template <int64_t WIDTH>
  void pack(const T* from, int64_t sample) {
    T* to = data.get() + sample * count * tokens * WIDTH;
    for (int64_t begin = 0; begin < features; begin += WIDTH) {
      const int64_t inside = tile_extent(begin, features, WIDTH);
      const T* row = from + sample * tokens * features + begin;
      for (int64_t t = 0; t < tokens; ++t, to += WIDTH, row += features) {
        if (inside == WIDTH) {
          std::memcpy(to, row, WIDTH * sizeof(T));
        } else {
          for (int64_t c = 0; c < WIDTH; ++c) to[c] = c < inside ? row[c] : T(0);
        }
      }
    }
  }

  int64_t tokens, features, width, count;
  std::unique_ptr<T[]> data;
};

template <typename T>
struct Problem {
  T* scores;
  const Panels<T>& inputs;
  const Panels<T>& grads;
  Shape shape;
};

// Reused from tile to tile by one thread.
template <typename T>
struct Scratch {
  explicit Scratch(const Shape& shape)
      : squares(kTileOuts * kTileIns), products(shape.tokens > kTokens ? kTileOuts * kTileIns : 0) {}
  std::vector<T> squares, products;
};

// Memory to register tile and back. (A memcpy of the whole array would pin the array in memory.)
template <int ROWS, typename Vector, typename T>
TALOS_SHARED void load(Vector (&tile)[ROWS][2], const T* from) {
#pragma GCC unroll 16
  for (int r = 0; r < ROWS; ++r) {
#pragma GCC unroll 2
    for (int c = 0; c < 2; ++c)
      __builtin_memcpy(&tile[r][c], from + (2 * r + c) * sizeof(Vector) / sizeof(T), sizeof(Vector));
  }
}

template <int ROWS, typename Vector, typename T>
TALOS_SHARED void store(const Vector (&tile)[ROWS][2], T* to) {
#pragma GCC unroll 16
  for (int r = 0; r < ROWS; ++r) {
#pragma GCC unroll 2
    for (int c = 0; c < 2; ++c)
      __builtin_memcpy(to + (2 * r + c) * sizeof(Vector) / sizeof(T), &tile[r][c], sizeof(Vector));
  }
}

// The register tile over one run of tokens. A sample of more than kTokens tokens takes several
// runs and parks its products in memory in between.
template <int ROWS, typename Vector, typename T>
TALOS_SHARED void run_tokens(const T* grads, const T* inputs, int64_t tokens, bool first, bool last, T* products,
                             T* squares) {
  constexpr int LANES = sizeof(Vector) / sizeof(T);
  Vector product[ROWS][2] = {};
  if (!first) load(product, products);
  for (int64_t t = 0; t < tokens; ++t) {
    Vector input[2];
    __builtin_memcpy(&input[0], inputs + t * 2 * LANES, sizeof(Vector));
    __builtin_memcpy(&input[1], inputs + t * 2 * LANES + LANES, sizeof(Vector));
    add_outer_product(product, grads + t * ROWS, input);
  }
  if (last) {
    Vector square[ROWS][2];
    load(square, squares);
    add_squares(square, product);
    store(square, squares);
  } else {
    store(product, products);
  }
}

template <int ROWS, int BYTES, typename T>
TALOS_SHARED void accumulate_tile(const Problem<T>& problem, int64_t out, int64_t in, Scratch<T>& scratch) {
  typedef T Vector __attribute__((vector_size(BYTES)));
  constexpr int COLS = 2 * BYTES / sizeof(T);
  constexpr int64_t AREA = ROWS * COLS;
  const Shape& shape = problem.shape;
  const int64_t outs = tile_extent(out, shape.outs, kTileOuts), ins = tile_extent(in, shape.ins, kTileIns);
  const int64_t down = tile_count(outs, ROWS), across = tile_count(ins, COLS);
  T* const squares = scratch.squares.data();
  std::memset(squares, 0, down * across * AREA * sizeof(T));
  for (int64_t n = 0; n < shape.samples; ++n) {
    for (int64_t begin = 0; begin < shape.tokens; begin += kTokens) {
      const int64_t tokens = tile_extent(begin, shape.tokens, kTokens);
      for (int64_t a = 0; a < across; ++a) {
        const T* const inputs = problem.inputs.at(n, in + a * COLS, begin);
        for (int64_t d = 0; d < down; ++d) {
          const int64_t at = (a * down + d) * AREA;
          run_tokens<ROWS, Vector>(problem.grads.at(n, out + d * ROWS, begin), inputs, tokens, begin == 0,
                                   begin + tokens == shape.tokens, scratch.products.data() + at, squares + at);
        }
      }
    }
  }
  for (int64_t r = 0; r < outs; ++r) {
    T* const row = problem.scores + (out + r) * shape.ins + in;
    const T* const from = squares + r / ROWS * AREA + r % ROWS * COLS;
    for (int64_t c = 0; c < ins; ++c) row[c] += from[c / COLS * down * AREA + c % COLS];
  }
}

// A kernel, and the panels it reads.
template <typename T>
struct TileKernel {
  void (*accumulate)(const Problem<T>&, int64_t out, int64_t in, Scratch<T>&);
  int64_t rows, cols;
  void (Panels<T>::*pack_grads)(const T*, int64_t sample);
  void (Panels<T>::*pack_inputs)(const T*, int64_t sample);
};

template <int ROWS, int BYTES, typename T>
TileKernel<T> with_panels(void (*accumulate)(const Problem<T>&, int64_t, int64_t, Scratch<T>&)) {
  constexpr int64_t COLS = 2 * BYTES / sizeof(T);
  return {accumulate, ROWS, COLS, &Panels<T>::template pack<ROWS>, &Panels<T>::template pack<COLS>};
}

// ROWS fills the register file: 32 vectors with AVX-512, 16 with AVX2 and SSE2, 32 on Arm.
template <typename T>
void accumulate_portable(const Problem<T>& problem, int64_t out, int64_t in, Scratch<T>& scratch) {
  accumulate_tile<6, 16>(problem, out, in, scratch);
}

#if defined(__x86_64__)
template <typename T>
__attribute__((target("avx2,fma"))) void accumulate_avx2(const Problem<T>& problem, int64_t out, int64_t in,
                                                         Scratch<T>& scratch) {
  accumulate_tile<6, 32>(problem, out, in, scratch);
}

template <typename T>
__attribute__((target("avx512f"))) void accumulate_avx512(const Problem<T>& problem, int64_t out, int64_t in,
                                                          Scratch<T>& scratch) {
  accumulate_tile<12, 64>(problem, out, in, scratch);
}
#endif

template <typename T>
TileKernel<T> choose_kernel() {
#if defined(__x86_64__)
  const Isa isa = choose_isa();
  if (isa == Isa::kAvx512) return with_panels<12, 64>(accumulate_avx512<T>);
  if (isa == Isa::kAvx2) return with_panels<6, 32>(accumulate_avx2<T>);
#endif
  return with_panels<6, 16>(accumulate_portable<T>);
}

}  // namespace talos

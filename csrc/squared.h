// The arithmetic of accumulate_squared_per_sample_, once for every device. It includes nothing of
// torch and nothing of CUDA, so g++ and nvcc compile the very same functions and the CPU tests cover
// what runs on a GPU. `Element` is a SIMD vector on the CPU and a scalar in a CUDA thread.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define TALOS_SHARED __host__ __device__ __forceinline__
#define TALOS_DEVICE __device__ __forceinline__
#define TALOS_UNROLL _Pragma("unroll")
#elif defined(__GNUC__)
// The caller chooses the instruction set (see cpu_tile.h), so the body must land inside the caller.
#define TALOS_SHARED inline __attribute__((always_inline))
#define TALOS_DEVICE inline
#define TALOS_UNROLL _Pragma("GCC unroll 16")
#else
#define TALOS_SHARED inline
#define TALOS_DEVICE inline
#define TALOS_UNROLL
#endif

namespace talos {

// One token of one entry. The bfloat16 kernel overloads it for a pair of tokens (see cpu_tile.h).
template <typename Element, typename Scalar>
TALOS_SHARED void multiply_add(Element& product, const Scalar& grad, const Element& input) {
  product += grad * input;
}

// products[r][c] += grads[r] * inputs[c]: one token of one sample.
template <int ROWS, int COLS, typename Element, typename Scalar, typename Input>
TALOS_SHARED void add_outer_product(Element (&products)[ROWS][COLS], const Scalar* grads, const Input (&inputs)[COLS]) {
  TALOS_UNROLL
  for (int r = 0; r < ROWS; ++r) {
    TALOS_UNROLL
    for (int c = 0; c < COLS; ++c) multiply_add(products[r][c], grads[r], inputs[c]);
  }
}

// squares[r][c] += products[r][c]^2: the end of one sample.
template <int ROWS, int COLS, typename Element>
TALOS_SHARED void add_squares(Element (&squares)[ROWS][COLS], const Element (&products)[ROWS][COLS]) {
  TALOS_UNROLL
  for (int r = 0; r < ROWS; ++r) {
    TALOS_UNROLL
    for (int c = 0; c < COLS; ++c) squares[r][c] += products[r][c] * products[r][c];
  }
}

// scores (outs, ins), row-major; inputs (samples, tokens, ins) and grads (samples, tokens, outs), of any strides.
struct Shape {
  int64_t samples, tokens, outs, ins;
};

// Where entry (sample, token, feature) of an operand lies, in elements from its first one.
struct Strides {
  int64_t sample, token, feature;
};

// How many tiles of `tile` elements cover `extent`, and how much of the tile at `begin` is inside.
TALOS_SHARED int64_t tile_count(int64_t extent, int64_t tile) { return (extent + tile - 1) / tile; }
TALOS_SHARED int64_t tile_extent(int64_t begin, int64_t extent, int64_t tile) {
  return extent - begin < tile ? extent - begin : tile;
}

}  // namespace talos

// One vector of entries in memory and in registers, once for each instruction set: whole or the tail of a block, and
// 16-bit elements as fp32. Arithmetic on the vectors is the compiler's own (GCC's vector extension).
//
// Vectors are passed by reference: by value they would change the ABI with the instruction set.
#pragma once

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "squared.h"

#if defined(__x86_64__)
// GCC 12 takes the undefined operand inside some of its own intrinsics for a mistake.
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>
#pragma GCC diagnostic pop
// Every machine with AVX2 and FMA has F16C and POPCNT as well.
#define TALOS_AVX2 __attribute__((target("avx2,fma,f16c,popcnt")))
#define TALOS_AVX512 __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,popcnt")))
#endif

namespace talos {

using torch::headeronly::BFloat16;
using torch::headeronly::Half;

template <typename Element, int64_t BYTES>
struct VectorOf {
  typedef Element type __attribute__((vector_size(BYTES)));
};

// Vectors of BYTES bytes on any machine.
template <int64_t BYTES>
struct Vectors {
  static constexpr int64_t kBytes = BYTES;

  // All of a vector, or its first n elements and zeros.
  template <bool WHOLE, typename Vector>
  TALOS_SHARED static void fetch(const void* from, int64_t n, Vector& to) {
    if (!WHOLE) to = Vector{};
    std::memcpy(&to, from, WHOLE ? sizeof(Vector) : n * sizeof(to[0]));
  }
  template <bool WHOLE, typename Vector>
  TALOS_SHARED static void put(const Vector& from, int64_t n, void* to) {
    std::memcpy(to, &from, WHOLE ? sizeof(Vector) : n * sizeof(from[0]));
  }
  template <typename Vector>
  TALOS_SHARED static void root(Vector& x) {
    for (size_t i = 0; i < sizeof(Vector) / sizeof(x[0]); ++i) x[i] = std::sqrt(x[i]);
  }
  template <typename Short, typename Vector>
  TALOS_SHARED static void widen_half(const Short& from, Vector& to) {
    for (size_t i = 0; i < sizeof(Vector) / sizeof(to[0]); ++i) to[i] = Half(from[i], Half::from_bits());
  }
  template <typename Vector, typename Short>
  TALOS_SHARED static void narrow_half(const Vector& from, Short& to) {
    for (size_t i = 0; i < sizeof(Vector) / sizeof(from[0]); ++i) to[i] = Half(from[i]).x;
  }
};

using Portable = Vectors<16>;

#if defined(__x86_64__)
struct Avx2 : Vectors<32> {
  template <typename Vector>
  TALOS_AVX2 static void root(Vector& x) {
    if constexpr (sizeof(x[0]) == 4) {
      x = _mm256_sqrt_ps(x);
    } else {
      x = _mm256_sqrt_pd(x);
    }
  }
  template <typename Short, typename Vector>
  TALOS_AVX2 static void widen_half(const Short& from, Vector& to) {
    to = _mm256_cvtph_ps(reinterpret_cast<__m128i>(from));
  }
  template <typename Vector, typename Short>
  TALOS_AVX2 static void narrow_half(const Vector& from, Short& to) {
    to = reinterpret_cast<Short>(_mm256_cvtps_ph(from, _MM_FROUND_TO_NEAREST_INT));
  }
};

struct Avx512 : Vectors<64> {
  template <bool WHOLE, typename Vector>
  TALOS_AVX512 static void fetch(const void* from, int64_t n, Vector& to) {
    const uint32_t lanes = (1u << n) - 1;
    if constexpr (WHOLE) {
      std::memcpy(&to, from, sizeof(Vector));
    } else if constexpr (sizeof(to[0]) == 8) {
      to = reinterpret_cast<Vector>(_mm512_maskz_loadu_epi64(lanes, from));
    } else if constexpr (sizeof(to[0]) == 4) {
      to = reinterpret_cast<Vector>(_mm512_maskz_loadu_epi32(lanes, from));
    } else {
      to = reinterpret_cast<Vector>(_mm256_maskz_loadu_epi16(lanes, from));
    }
  }
  template <bool WHOLE, typename Vector>
  TALOS_AVX512 static void put(const Vector& from, int64_t n, void* to) {
    const uint32_t lanes = (1u << n) - 1;
    if constexpr (WHOLE) {
      std::memcpy(to, &from, sizeof(Vector));
    } else if constexpr (sizeof(from[0]) == 8) {
      _mm512_mask_storeu_epi64(to, lanes, reinterpret_cast<__m512i>(from));
    } else if constexpr (sizeof(from[0]) == 4) {
      _mm512_mask_storeu_epi32(to, lanes, reinterpret_cast<__m512i>(from));
    } else {
      _mm256_mask_storeu_epi16(to, lanes, reinterpret_cast<__m256i>(from));
    }
  }
  template <typename Vector>
  TALOS_AVX512 static void root(Vector& x) {
    if constexpr (sizeof(x[0]) == 4) {
      x = _mm512_sqrt_ps(x);
    } else {
      x = _mm512_sqrt_pd(x);
    }
  }
  template <typename Short, typename Vector>
  TALOS_AVX512 static void widen_half(const Short& from, Vector& to) {
    to = _mm512_cvtph_ps(reinterpret_cast<__m256i>(from));
  }
  template <typename Vector, typename Short>
  TALOS_AVX512 static void narrow_half(const Vector& from, Short& to) {
    to = reinterpret_cast<Short>(_mm512_cvtps_ph(from, _MM_FROUND_TO_NEAREST_INT));
  }
};
#endif

// fp32 vectors to the 16 bits of T and back, to nearest, ties to even; a NaN stays one.
template <typename Isa, typename T, typename Short, typename Vector>
TALOS_SHARED void widen(const Short& from, Vector& to) {
  using Bits = typename VectorOf<uint32_t, sizeof(Vector)>::type;
  if constexpr (std::is_same_v<T, Half>) {
    Isa::widen_half(from, to);
  } else {
    to = reinterpret_cast<Vector>(__builtin_convertvector(from, Bits) << 16);
  }
}

template <typename Isa, typename T, typename Vector, typename Short>
TALOS_SHARED void narrow(const Vector& from, Short& to) {
  using Bits = typename VectorOf<uint32_t, sizeof(Vector)>::type;
  if constexpr (std::is_same_v<T, Half>) {
    Isa::narrow_half(from, to);
  } else {
    const Bits bits = reinterpret_cast<Bits>(from), rounded = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16;
    to = __builtin_convertvector(from == from ? rounded : Bits{} + 0x7FC0, Short);
  }
}

// Elements of type T at `from`, a vector of them or the first n, in the type of the arithmetic.
template <typename Isa, bool WHOLE, typename T, typename Vector>
TALOS_SHARED void load(const T* from, int64_t n, Vector& to) {
  if constexpr (sizeof(T) == sizeof(to[0])) {
    Isa::template fetch<WHOLE>(from, n, to);
  } else {
    typename VectorOf<uint16_t, sizeof(Vector) / 2>::type bits;
    Isa::template fetch<WHOLE>(from, n, bits);
    widen<Isa, T>(bits, to);
  }
}

template <typename Isa, bool WHOLE, typename T, typename Vector>
TALOS_SHARED void store(const Vector& from, int64_t n, T* to) {
  if constexpr (sizeof(T) == sizeof(from[0])) {
    Isa::template put<WHOLE>(from, n, to);
  } else {
    typename VectorOf<uint16_t, sizeof(Vector) / 2>::type bits;
    narrow<Isa, T>(from, bits);
    Isa::template put<WHOLE>(bits, n, to);
  }
}

// What a store in T would keep of x.
template <typename Isa, typename T, typename Vector>
TALOS_SHARED void round_to(Vector& x) {
  if constexpr (sizeof(T) != sizeof(x[0])) {
    typename VectorOf<uint16_t, sizeof(Vector) / 2>::type bits;
    narrow<Isa, T>(x, bits);
    widen<Isa, T>(bits, x);
  }
}

// Makes the compiler round x here instead of contracting the product that x is into an addition that follows.
template <typename Vector>
TALOS_SHARED void settle(Vector& x) {
#if defined(__x86_64__)
  asm("" : "+v"(x));
#elif defined(__aarch64__)
  asm("" : "+w"(x));
#else
  volatile Vector rounded = x;
  x = rounded;
#endif
}

}  // namespace talos

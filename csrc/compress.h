// How the selected elements of a tile get into a compact buffer and back.
//
// The trick: with AVX-512 a tile is read whole, 16 elements at a time, and 16 bits of its index are the very mask that
// packs them (vpcompressd) and, on the way back, unpacks them (vpexpandd) into a masked store, which does not write the
// lanes between. The work is then the same whatever the bits, without a branch or an offset, and memory sees nothing
// but streams. The other instruction sets decode the bits to offsets and move one element at a time.
#pragma once

#include "vectors.h"

namespace talos {

constexpr int64_t kBlock = 1024;  // elements of a tile, and most entries of a block
// Elements of a tile that are packed at a time. Half of it leaves more vectors half full: at a density of 0.1 bf16
// takes 9 to 26 % longer, fp32 some 7 %. The whole of it costs fp32 14 to 29 %, and gains bf16 up to 13 %.
constexpr int64_t kPart = 512;
constexpr int64_t kSlack = 16;                     // elements beyond the last that a vector may overwrite in a buffer
inline constexpr uint8_t kNoBits[kPart / 8] = {};  // bits that select nothing

// For every byte, the places of its set bits, one after another in bytes, and how many there are.
struct ByteTable {
  uint64_t places[256];
  uint8_t count[256];
};

constexpr ByteTable make_byte_table() {
  ByteTable table{};
  for (int byte = 0; byte < 256; ++byte) {
    for (uint64_t bit = 0; bit < 8; ++bit) {
      if (byte >> bit & 1) table.places[byte] |= bit << 8 * table.count[byte]++;
    }
  }
  return table;
}

inline constexpr ByteTable kSetBits = make_byte_table();

// The places of the set bits among `span`, ascending: eight are written a byte, and as many kept as it has bits.
TALOS_SHARED int64_t decode_bits(const uint8_t* bits, int64_t span, uint16_t* offsets) {
  const uint16_t* const start = offsets;
  for (int64_t i = 0; i < span; i += 8) {
    const uint8_t byte = bits[i / 8];
    const uint64_t places = kSetBits.places[byte];
    for (int lane = 0; lane < 8; ++lane) offsets[lane] = static_cast<uint16_t>((places >> 8 * lane & 7) + i);
    offsets += kSetBits.count[byte];
  }
  return offsets - start;
}

#if defined(__x86_64__)
// The selected of `span` elements, one after another; returns how many.
template <typename T>
TALOS_AVX2 inline int64_t compress(Avx2, const T* from, const uint8_t* bits, int64_t span, T* to) {
  const T* const start = to;
  for (int64_t i = 0; i < span; i += 8) {
    const uint8_t byte = bits[i / 8];
    const __m256i places =
        _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(kSetBits.places + byte)));
    if constexpr (sizeof(T) == 4) {
      const __m256i lanes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from + i));
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm256_permutevar8x32_epi32(lanes, places));
    } else {
      const __m256i lanes = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i)));
      const __m256i packed = _mm256_permutevar8x32_epi32(lanes, places);
      _mm_storeu_si128(reinterpret_cast<__m128i*>(to),
                       _mm_packus_epi32(_mm256_castsi256_si128(packed), _mm256_extracti128_si256(packed, 1)));
    }
    to += kSetBits.count[byte];
  }
  return to - start;
}

// Back to their places; what lies between is not written.
template <typename T>
TALOS_AVX2 inline void expand(Avx2, const T* from, const uint8_t* bits, int64_t span, T* to) {
  uint16_t offsets[kBlock + kSlack];
  const int64_t count = decode_bits(bits, span, offsets);
  for (int64_t i = 0; i < count; ++i) to[offsets[i]] = from[i];
}

// Elements of `BYTES` bytes as the lanes of one register. Compress and expand merge into their own source: with zeros,
// or with any other register, they take nearly twice as long (Zen 4: 4.2 cycles instead of 2.4).
template <int BYTES>
struct Lanes {
  using Mask = __mmask16;
  TALOS_AVX512 static __m512i load(const void* from, Mask k) {
    if constexpr (BYTES == 4) return _mm512_maskz_loadu_epi32(k, from);
    return _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(k, from));
  }
  TALOS_AVX512 static void store(void* to, Mask k, __m512i lanes) {
    if constexpr (BYTES == 4) return _mm512_mask_storeu_epi32(to, k, lanes);
    _mm256_mask_storeu_epi16(to, k, _mm512_cvtepi32_epi16(lanes));
  }
  TALOS_AVX512 static __m512i compress(Mask k, __m512i lanes) { return _mm512_mask_compress_epi32(lanes, k, lanes); }
  TALOS_AVX512 static __m512i expand(Mask k, __m512i lanes) { return _mm512_mask_expand_epi32(lanes, k, lanes); }
};

template <>
struct Lanes<8> {
  using Mask = __mmask8;
  TALOS_AVX512 static __m512i load(const void* from, Mask k) { return _mm512_maskz_loadu_epi64(k, from); }
  TALOS_AVX512 static void store(void* to, Mask k, __m512i lanes) { _mm512_mask_storeu_epi64(to, k, lanes); }
  TALOS_AVX512 static __m512i compress(Mask k, __m512i lanes) { return _mm512_mask_compress_epi64(lanes, k, lanes); }
  TALOS_AVX512 static __m512i expand(Mask k, __m512i lanes) { return _mm512_mask_expand_epi64(lanes, k, lanes); }
};

// As above, and elements that are not selected are not read.
template <typename T>
TALOS_AVX512 inline int64_t compress(Avx512, const T* from, const uint8_t* bits, int64_t span, T* to) {
  using L = Lanes<sizeof(T)>;
  constexpr int64_t kWidth = 8 * sizeof(typename L::Mask);
  const T* const start = to;
  for (int64_t i = 0; i < span; i += kWidth) {
    typename L::Mask k;
    std::memcpy(&k, bits + i / 8, sizeof(k));
    L::store(to, -1, L::compress(k, L::load(from + i, k)));
    to += __builtin_popcount(k);
  }
  return to - start;
}

template <typename T>
TALOS_AVX512 inline void expand(Avx512, const T* from, const uint8_t* bits, int64_t span, T* to) {
  using L = Lanes<sizeof(T)>;
  constexpr int64_t kWidth = 8 * sizeof(typename L::Mask);
  for (int64_t i = 0; i < span; i += kWidth) {
    typename L::Mask k;
    std::memcpy(&k, bits + i / 8, sizeof(k));
    L::store(to + i, k, L::expand(k, L::load(from, -1)));
    from += __builtin_popcount(k);
  }
}

// A part of a tile whose steps are known, side by side, and not yet taken.
template <typename T>
struct Pending {
  T* param;
  const uint8_t* bits;
  T steps[kPart + kSlack];
};

// Packs the selected of a part, if PACK, while the part before takes its steps, p = decay p + step; returns how many
// are selected.
template <bool PACK, typename T>
TALOS_AVX512 inline int64_t pack_and_move(const T* from, const uint8_t* bits, T* to, const Pending<T>& last, T decay) {
  using L = Lanes<sizeof(T)>;
  using Vector = typename VectorOf<T, 64>::type;
  constexpr int64_t kWidth = 8 * sizeof(typename L::Mask);
  // Copies: a store to an element could, for all the compiler knows, change what `last` holds.
  T* const param = last.param;
  const uint8_t* const moves = last.bits;
  const T* step = last.steps;
  int64_t found = 0;
  for (int64_t i = 0; i < kPart; i += kWidth) {
    typename L::Mask k, moved;
    std::memcpy(&k, bits + i / 8, sizeof(k));
    std::memcpy(&moved, moves + i / 8, sizeof(moved));
    if constexpr (PACK) L::store(to + found, -1, L::compress(k, L::load(from + i, k)));
    Vector p = reinterpret_cast<Vector>(L::load(param + i, moved)) * decay;
    settle(p);
    p += reinterpret_cast<Vector>(L::expand(moved, L::load(step, -1)));
    L::store(param + i, moved, reinterpret_cast<__m512i>(p));
    found += __builtin_popcount(k);
    step += __builtin_popcount(moved);
  }
  return found;
}
#endif

}  // namespace talos

// AdamW over the selected entries of one tensor, a part at a time: gather, update, scatter.
//
// A part is small enough that the reads of the next one overlap with the arithmetic of this one. Only entries at
// offsets are prefetched: all else is streams, which the hardware foresees better.
#pragma once

#include "adam_entries.h"

namespace talos {

// Entries at `offsets` from `base`.
template <typename Isa, typename T, typename A>
TALOS_SHARED void update_scattered(const AdamTensor<T, A>& tensor, int64_t base, const uint16_t* offsets, int64_t first,
                                   int64_t count, const AdamScalars<A>& s) {
  T p[kBlock], g[kBlock];
  for (int64_t i = 0; i < count; ++i) p[i] = tensor.param[base + offsets[i]];
  if (tensor.grad != nullptr) {
    for (int64_t i = 0; i < count; ++i) g[i] = tensor.grad[base + offsets[i]];
  }
  update_entries<Isa>(entries(tensor, first, p, tensor.grad == nullptr ? nullptr : g), count, s);
  for (int64_t i = 0; i < count; ++i) tensor.param[base + offsets[i]] = p[i];
}

template <typename T, typename A>
TALOS_SHARED void prefetch_scattered(const AdamTensor<T, A>& tensor, int64_t base, const uint16_t* offsets,
                                     int64_t count) {
  for (int64_t i = 0; i < count; ++i) __builtin_prefetch(tensor.param + base + offsets[i], 1, 2);
  if (tensor.grad != nullptr) {
    for (int64_t i = 0; i < count; ++i) __builtin_prefetch(tensor.grad + base + offsets[i], 0, 2);
  }
}

// A row of offsets, while memory works on the part after this one, which may be the first of the next row.
template <typename Isa, typename T, typename A>
TALOS_SHARED void update_offsets(const AdamTensor<T, A>& tensor, const Row& row, const Row& next,
                                 const AdamScalars<A>& s) {
  const uint16_t* const index = static_cast<const uint16_t*>(tensor.bounds.index);
  for (int64_t begin = 0; begin < row.count; begin += kPart) {
    const bool last = begin + kPart >= row.count;
    const Row& ahead = last ? next : row;
    const int64_t from = last ? 0 : begin + kPart;
    prefetch_scattered(tensor, ahead.base, index + ahead.at + from, tile_extent(from, ahead.count, kPart));
    update_scattered<Isa>(tensor, row.base, index + row.at + begin, row.first + begin,
                          tile_extent(begin, row.count, kPart), s);
  }
}

// A tile of bits, decoded to offsets.
template <typename Isa, typename T, typename A>
TALOS_SHARED void update_decoded(const AdamTensor<T, A>& tensor, const Row& row, const AdamScalars<A>& s) {
  uint16_t offsets[kBlock + kSlack];
  const int64_t found = decode_bits(static_cast<const uint8_t*>(tensor.bounds.index) + row.at, kBlock, offsets);
  update_scattered<Isa>(tensor, row.base, offsets, row.first, found < row.count ? found : row.count, s);
}

// A tile of bits, read and written as a stream.
template <typename Isa, typename T, typename A>
TALOS_SHARED void update_tile(const AdamTensor<T, A>& tensor, const Row& row, const AdamScalars<A>& s) {
  T p[kPart + kSlack], g[kPart + kSlack];
  int64_t first = row.first;
  for (int64_t begin = 0; begin < kBlock; begin += kPart) {
    const uint8_t* const bits = static_cast<const uint8_t*>(tensor.bounds.index) + row.at + begin / 8;
    const int64_t element = row.base + begin;
    const int64_t found = compress(Isa{}, tensor.param + element, bits, kPart, p), left = row.first + row.count - first;
    if (tensor.grad != nullptr) compress(Isa{}, tensor.grad + element, bits, kPart, g);
    const int64_t count = found < left ? found : left;
    update_entries<Isa>(entries(tensor, first, p, tensor.grad == nullptr ? nullptr : g), count, s);
    expand(Isa{}, p, bits, kPart, tensor.param + element);
    first += count;
  }
}

#if defined(__x86_64__)
// The same for all tiles of `rows` where the arithmetic is in the parameter's own type: the parameter takes its steps
// where it lies, and takes them while the gradients of the next part are packed. Memory then streams both at all times,
// and what the arithmetic wrote has left the store buffer when it is read. `s` is a copy, which no store can reach.
template <bool DENSE, typename T>
TALOS_AVX512 inline void update_tiles_in_place(const AdamTensor<T, T>& tensor, const Row* rows, int64_t count,
                                               const AdamScalars<T> s) {
  T g[kPart + kSlack];
  Pending<T> last{tensor.param, kNoBits, {}};
  for (int64_t r = 0; r < count; ++r) {
    int64_t first = rows[r].first;
    for (int64_t begin = 0; begin < kBlock; begin += kPart) {
      const uint8_t* const bits = static_cast<const uint8_t*>(tensor.bounds.index) + rows[r].at + begin / 8;
      const int64_t element = rows[r].base + begin;
      const int64_t found = pack_and_move<DENSE>(DENSE ? tensor.grad + element : nullptr, bits, g, last, s.decay);
      last.bits = kNoBits;
      if (found > rows[r].first + rows[r].count - first) break;  // there are no moments for them
      auto at = entries<T, T>(tensor, first, nullptr, DENSE ? g : nullptr);
      at.steps = last.steps;
      update_entries<Avx512>(at, found, s);
      last.param = tensor.param + element;
      last.bits = bits;
      first += found;
    }
  }
  pack_and_move<false, T>(nullptr, kNoBits, nullptr, last, s.decay);
}
#endif

template <typename Isa, typename T, typename A>
TALOS_SHARED void update_bits(const AdamTensor<T, A>& tensor, const Row& row, const AdamScalars<A>& s) {
  // AVX-512 reads what is selected and nothing else, AVX2 whole tiles.
  if constexpr (Isa::kBytes == 64) return update_tile<Isa>(tensor, row, s);
  if constexpr (Isa::kBytes == 32 && sizeof(T) != 8) {
    if (row.base + kBlock <= tensor.bounds.numel) return update_tile<Isa>(tensor, row, s);
  }
  update_decoded<Isa>(tensor, row, s);
}

template <typename Isa, typename T, typename A>
TALOS_SHARED void update_rows(const AdamTensor<T, A>& tensor, const Row* rows, int64_t count, const AdamScalars<A>& s) {
  if constexpr (Isa::kBytes == 64 && std::is_same_v<T, A>) {
    if (tensor.bounds.encoding == Encoding::kBits && tensor.master == nullptr) {
      return tensor.grad == nullptr ? update_tiles_in_place<false>(tensor, rows, count, s)
                                    : update_tiles_in_place<true>(tensor, rows, count, s);
    }
  }
  for (int64_t r = 0; r < count; ++r) {
    const Row& row = rows[r];
    if (tensor.bounds.encoding == Encoding::kRuns) {
      const T* const g = tensor.grad == nullptr ? nullptr : tensor.grad + row.base;
      update_entries<Isa>(entries(tensor, row.first, tensor.param + row.base, g), row.count, s);
    } else if (tensor.bounds.encoding == Encoding::kOffsets) {
      update_offsets<Isa>(tensor, row, rows[r + 1 < count ? r + 1 : r], s);
    } else {
      update_bits<Isa>(tensor, row, s);
    }
  }
}

template <typename T, typename A>
void update_portable(const AdamTensor<T, A>& tensor, const Row* rows, int64_t count, const AdamScalars<A>& s) {
  update_rows<Portable>(tensor, rows, count, s);
}

#if defined(__x86_64__)
template <typename T, typename A>
TALOS_AVX2 void update_avx2(const AdamTensor<T, A>& tensor, const Row* rows, int64_t count, const AdamScalars<A>& s) {
  update_rows<Avx2>(tensor, rows, count, s);
}

template <typename T, typename A>
TALOS_AVX512 void update_avx512(const AdamTensor<T, A>& tensor, const Row* rows, int64_t count,
                                const AdamScalars<A>& s) {
  update_rows<Avx512>(tensor, rows, count, s);
}
#endif

}  // namespace talos

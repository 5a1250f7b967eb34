// AdamW over the selected entries of one tensor, a block at a time: gather, update, scatter.
//
// A row of the work table names a block of at most kBlock selected entries, so everything between the
// gather and the scatter happens in cache. Each loop below is one tensor operation of torch's for-loop
// AdamW: their boundaries stop the compiler from contracting across them, so the roundings are torch's.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "squared.h"

namespace talos {

constexpr int64_t kBlock = 1024;
constexpr int64_t kPart = 128;

enum class Encoding { kRuns, kBits, kOffsets };

struct Row {
  int64_t base, at, first, count;  // element, place in the index, compact entry, entries
};

template <typename A>
struct AdamScalars {
  A decay, beta2, step_size, correction, eps, grad_scale;
  A one_minus_beta1, one_minus_beta2;
  bool maximize;
};

// T: parameter and gradient; A: moments, master and arithmetic. max_exp_avg_sq and master may be null.
template <typename T, typename A>
struct AdamTensor {
  T* param;
  const T* grad;
  A *exp_avg, *exp_avg_sq, *max_exp_avg_sq, *master;
  const void* index;
  Encoding encoding;
};

// The places of the set bits of every byte, and how many there are.
struct ByteTable {
  uint16_t places[256][8];
  uint8_t count[256];
};

constexpr ByteTable make_byte_table() {
  ByteTable table{};
  for (int byte = 0; byte < 256; ++byte) {
    for (int bit = 0; bit < 8; ++bit) {
      if (byte >> bit & 1) table.places[byte][table.count[byte]++] = static_cast<uint16_t>(bit);
    }
  }
  return table;
}

inline constexpr ByteTable kBytes = make_byte_table();

// The places of the set bits of one block, ascending: eight are written a byte, and as many kept as it has bits.
TALOS_SHARED void decode_bits(const uint8_t* bits, uint16_t* offsets) {
  for (int64_t at = 0; at < kBlock / 8; ++at) {
    const uint8_t byte = bits[at];
    for (int lane = 0; lane < 8; ++lane) offsets[lane] = static_cast<uint16_t>(kBytes.places[byte][lane] + 8 * at);
    offsets += kBytes.count[byte];
  }
}

// Asks for `count` elements ahead of their use. A block's streams are too short for the hardware to see them coming.
template <typename A>
TALOS_SHARED void prefetch(const A* from, int64_t count) {
  for (int64_t i = 0; i < count; i += 64 / sizeof(A)) __builtin_prefetch(from + i, 1, 2);
}

template <typename A>
TALOS_SHARED void update_moments(A* __restrict m, A* __restrict v, const A* __restrict g, int64_t count,
                                 const AdamScalars<A>& s) {
  // As torch.lerp: from whichever end is nearer.
  const bool near = s.one_minus_beta1 < A(0.5);
  if (near) {
    for (int64_t i = 0; i < count; ++i) m[i] = m[i] + s.one_minus_beta1 * (g[i] - m[i]);
  } else {
    for (int64_t i = 0; i < count; ++i) m[i] = g[i] + (s.one_minus_beta1 - A(1)) * (g[i] - m[i]);
  }
  for (int64_t i = 0; i < count; ++i) v[i] = v[i] * s.beta2;
  for (int64_t i = 0; i < count; ++i) v[i] = v[i] + s.one_minus_beta2 * g[i] * g[i];
}

template <typename A>
TALOS_SHARED void raise_maximum(A* __restrict top, const A* __restrict v, int64_t count) {
  for (int64_t i = 0; i < count; ++i) top[i] = top[i] >= v[i] ? top[i] : v[i];
}

template <typename A>
TALOS_SHARED void update_entries(A* __restrict p, const A* __restrict m, const A* __restrict top, int64_t count,
                                 const AdamScalars<A>& s) {
  for (int64_t i = 0; i < count; ++i) {
    p[i] = p[i] + (-s.step_size * m[i]) / (std::sqrt(top[i]) / s.correction + s.eps);
  }
}

// A part of a block, small enough that memory works for the next one while this one computes. `place` maps an entry of
// the part to its element.
template <typename T, typename A, typename Place>
TALOS_SHARED void update_part(const AdamTensor<T, A>& tensor, int64_t base, int64_t first, int64_t count,
                              const AdamScalars<A>& s, Place place) {
  A p[kPart], g[kPart];
  T* const param = tensor.param + base;
  const T* const grad = tensor.grad + base;
  A *const m = tensor.exp_avg + first, *const v = tensor.exp_avg_sq + first, *top = v;
  for (int64_t i = 0; i < count; ++i) p[i] = static_cast<A>(param[place(i)]);
  for (int64_t i = 0; i < count; ++i) g[i] = static_cast<A>(grad[place(i)]);
  if (tensor.master != nullptr) {
    // Weights that were loaded or edited since the last step win over the copy that remembers them.
    const A* const master = tensor.master + first;
    for (int64_t i = 0; i < count; ++i) p[i] = static_cast<A>(static_cast<T>(master[i])) == p[i] ? master[i] : p[i];
  }
  for (int64_t i = 0; i < count; ++i) p[i] *= s.decay;
  if (s.grad_scale != A(1)) {
    for (int64_t i = 0; i < count; ++i) g[i] /= s.grad_scale;
  }
  if (s.maximize) {
    for (int64_t i = 0; i < count; ++i) g[i] = -g[i];
  }
  update_moments(m, v, g, count, s);
  if (tensor.max_exp_avg_sq != nullptr) {
    top = tensor.max_exp_avg_sq + first;
    raise_maximum(top, v, count);
  }
  update_entries(p, m, top, count, s);
  if (tensor.master != nullptr) std::memcpy(tensor.master + first, p, count * sizeof(A));
  for (int64_t i = 0; i < count; ++i) param[place(i)] = static_cast<T>(p[i]);
}

// What part `part` of `parts` of the row will need.
template <typename T, typename A>
TALOS_SHARED void prefetch_row(const AdamTensor<T, A>& tensor, const Row& row, int64_t part, int64_t parts) {
  const int64_t begin = row.count * part / parts, count = row.count * (part + 1) / parts - begin;
  prefetch(tensor.exp_avg + row.first + begin, count);
  prefetch(tensor.exp_avg_sq + row.first + begin, count);
  if (tensor.encoding == Encoding::kOffsets) {
    const uint16_t* const offsets = static_cast<const uint16_t*>(tensor.index) + row.at + begin;
    for (int64_t i = 0; i < count; ++i) __builtin_prefetch(tensor.param + row.base + offsets[i], 1, 2);
    for (int64_t i = 0; i < count; ++i) __builtin_prefetch(tensor.grad + row.base + offsets[i], 0, 2);
    return;
  }
  const int64_t extent = tensor.encoding == Encoding::kRuns ? row.count : kBlock;
  const int64_t from = extent * part / parts, span = extent * (part + 1) / parts - from;
  prefetch(tensor.param + row.base + from, span);
  prefetch(tensor.grad + row.base + from, span);
}

template <typename T, typename A>
TALOS_SHARED void update_rows(const AdamTensor<T, A>& tensor, const Row* rows, int64_t count, const AdamScalars<A>& s) {
  uint16_t decoded[kBlock + 8];
  for (int64_t r = 0; r < count; ++r) {
    const Row& row = rows[r];
    const uint16_t* offsets = static_cast<const uint16_t*>(tensor.index) + row.at;
    if (tensor.encoding == Encoding::kBits) {
      decode_bits(static_cast<const uint8_t*>(tensor.index) + row.at, decoded);
      offsets = decoded;
    }
    const int64_t parts = tile_count(row.count, kPart);
    for (int64_t part = 0; part < parts; ++part) {
      const int64_t begin = part * kPart, inside = tile_extent(begin, row.count, kPart);
      if (r + 1 < count) prefetch_row(tensor, rows[r + 1], part, parts);
      if (tensor.encoding == Encoding::kRuns) {
        update_part(tensor, row.base + begin, row.first + begin, inside, s,
                    [](int64_t i) __attribute__((always_inline)) { return i; });
      } else {
        update_part(tensor, row.base, row.first + begin, inside, s,
                    [=](int64_t i) __attribute__((always_inline)) { return int32_t{offsets[begin + i]}; });
      }
    }
  }
}

template <typename T, typename A>
void update_portable(const AdamTensor<T, A>& tensor, const Row* rows, int64_t count, const AdamScalars<A>& s) {
  update_rows(tensor, rows, count, s);
}

#if defined(__x86_64__)
template <typename T, typename A>
__attribute__((target("avx2,fma,bmi,bmi2,f16c"))) void update_avx2(const AdamTensor<T, A>& tensor, const Row* rows,
                                                                   int64_t count, const AdamScalars<A>& s) {
  update_rows(tensor, rows, count, s);
}

template <typename T, typename A>
__attribute__((target("avx512f,avx2,fma,bmi,bmi2,f16c,prefer-vector-width=512"))) void update_avx512(
    const AdamTensor<T, A>& tensor, const Row* rows, int64_t count, const AdamScalars<A>& s) {
  update_rows(tensor, rows, count, s);
}
#endif

}  // namespace talos

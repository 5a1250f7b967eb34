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

// The places of the set bits of one block, ascending.
TALOS_SHARED void decode_bits(const uint8_t* bits, uint16_t* offsets) {
  for (int64_t begin = 0; begin < kBlock; begin += 64) {
    uint64_t word = 0;
    for (int byte = 0; byte < 8; ++byte) word |= static_cast<uint64_t>(bits[begin / 8 + byte]) << (8 * byte);
    for (; word != 0; word &= word - 1) *offsets++ = static_cast<uint16_t>(begin + __builtin_ctzll(word));
  }
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

// `Place` maps an entry of the block to its element.
template <typename T, typename A, typename Place>
TALOS_SHARED void update_block(const AdamTensor<T, A>& tensor, const Row& row, const AdamScalars<A>& s, Place place) {
  A p[kBlock], g[kBlock];
  T* const param = tensor.param + row.base;
  const T* const grad = tensor.grad + row.base;
  A *const m = tensor.exp_avg + row.first, *const v = tensor.exp_avg_sq + row.first, *top = v;
  for (int64_t i = 0; i < row.count; ++i) p[i] = static_cast<A>(param[place(i)]);
  for (int64_t i = 0; i < row.count; ++i) g[i] = static_cast<A>(grad[place(i)]);
  if (tensor.master != nullptr) {
    // Weights that were loaded or edited since the last step win over the copy that remembers them.
    const A* const master = tensor.master + row.first;
    for (int64_t i = 0; i < row.count; ++i) p[i] = static_cast<A>(static_cast<T>(master[i])) == p[i] ? master[i] : p[i];
  }
  for (int64_t i = 0; i < row.count; ++i) p[i] *= s.decay;
  if (s.grad_scale != A(1)) {
    for (int64_t i = 0; i < row.count; ++i) g[i] /= s.grad_scale;
  }
  if (s.maximize) {
    for (int64_t i = 0; i < row.count; ++i) g[i] = -g[i];
  }
  update_moments(m, v, g, row.count, s);
  if (tensor.max_exp_avg_sq != nullptr) {
    top = tensor.max_exp_avg_sq + row.first;
    raise_maximum(top, v, row.count);
  }
  update_entries(p, m, top, row.count, s);
  if (tensor.master != nullptr) std::memcpy(tensor.master + row.first, p, row.count * sizeof(A));
  for (int64_t i = 0; i < row.count; ++i) param[place(i)] = static_cast<T>(p[i]);
}

template <typename T, typename A>
TALOS_SHARED void update_rows(const AdamTensor<T, A>& tensor, const Row* rows, int64_t count, const AdamScalars<A>& s) {
  uint16_t decoded[kBlock];
  for (int64_t r = 0; r < count; ++r) {
    if (tensor.encoding == Encoding::kRuns) {
      update_block(tensor, rows[r], s, [](int64_t i) __attribute__((always_inline)) { return i; });
      continue;
    }
    const uint16_t* offsets = static_cast<const uint16_t*>(tensor.index) + rows[r].at;
    if (tensor.encoding == Encoding::kBits) {
      decode_bits(static_cast<const uint8_t*>(tensor.index) + rows[r].at, decoded);
      offsets = decoded;
    }
    update_block(tensor, rows[r], s, [=](int64_t i) __attribute__((always_inline)) { return int64_t{offsets[i]}; });
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

// AdamW over the selected entries of one tensor, a part at a time: gather, update, scatter.
//
// A part is small enough that the reads of the next one overlap with the arithmetic of this one, and its entries lie
// side by side, so every vector of the arithmetic is full. Only entries at offsets are prefetched: all else is streams,
// which the hardware foresees better.
#pragma once

#include "selection.h"

namespace talos {

// Elements of a tile that are worked on at a time: half of it would leave more vectors half full (18 % slower at a
// density of 0.1), the whole of it does not stay in the L1 cache.
constexpr int64_t kPart = 512;

template <typename A>
struct AdamScalars {
  A decay, beta2, step_size, correction, eps, grad_scale;
  A one_minus_beta1, one_minus_beta2;
  bool maximize;
};

// T: parameter and gradient; A: moments, master and arithmetic. max_exp_avg_sq and master may be null. The gradient has
// an element of every element of the parameter (grad), or only the entries (entry_grad, or wide_entry_grad as the
// moments).
template <typename T, typename A>
struct AdamTensor {
  T* param;
  const T *grad, *entry_grad;
  const A* wide_entry_grad;
  A *exp_avg, *exp_avg_sq, *max_exp_avg_sq, *master;
  const void* index;
  Encoding encoding;
  int64_t numel;  // of the parameter
};

// A part: entries that lie side by side in every array. Either g or wide_g is null, and either p or steps.
template <typename T, typename A>
struct Entries {
  T* p;
  const T* g;
  const A* wide_g;
  A *m, *v, *top, *master, *steps;
};

// m += (1 - beta1)(g - m);  v = beta2 v + (1 - beta2) g²;  step = -step_size m / (√v/correction + eps),
// for a vector of entries or, if not WHOLE, the first n. Rounded as torch's for-loop rounds.
template <typename Isa, bool WHOLE, typename T, typename A, typename Vector>
TALOS_SHARED void update_moments(const Entries<T, A>& at, int64_t i, int64_t n, const AdamScalars<A>& s, Vector& step) {
  Vector g, m, v;
  if (at.g != nullptr) {
    load<Isa, WHOLE>(at.g + i, n, g);
  } else {
    load<Isa, WHOLE>(at.wide_g + i, n, g);
  }
  load<Isa, WHOLE>(at.m + i, n, m);
  load<Isa, WHOLE>(at.v + i, n, v);
  if (s.grad_scale != A(1)) g /= s.grad_scale;
  if (s.maximize) g = -g;
  // As torch.lerp: from whichever end is nearer.
  if (s.one_minus_beta1 < A(0.5)) {
    m += s.one_minus_beta1 * (g - m);
  } else {
    m = g + (s.one_minus_beta1 - A(1)) * (g - m);
  }
  v *= s.beta2;
  settle(v);
  v += s.one_minus_beta2 * g * g;
  store<Isa, WHOLE>(m, n, at.m + i);
  store<Isa, WHOLE>(v, n, at.v + i);
  if (at.top != nullptr) {
    auto top = v;
    load<Isa, WHOLE>(at.top + i, n, top);
    v = top >= v ? top : v;
    store<Isa, WHOLE>(v, n, at.top + i);
  }
  Isa::root(v);
  step = (-s.step_size * m) / (v / s.correction + s.eps);
}

// p = decay p + step
template <typename Isa, bool WHOLE, typename T, typename A, typename Vector>
TALOS_SHARED void move(const Entries<T, A>& at, int64_t i, int64_t n, A decay, const Vector& step) {
  Vector p;
  load<Isa, WHOLE>(at.p + i, n, p);
  if (at.master != nullptr) {
    // Weights that were loaded or edited since the last step win over the copy that remembers them.
    auto master = p, rounded = p;
    load<Isa, WHOLE>(at.master + i, n, master);
    rounded = master;
    round_to<Isa, T>(rounded);
    p = rounded == p ? master : p;
  }
  p *= decay;
  settle(p);
  p += step;
  if (at.master != nullptr) store<Isa, WHOLE>(p, n, at.master + i);
  store<Isa, WHOLE>(p, n, at.p + i);
}

// The entries, or where they have no p, the steps that theirs are to take.
template <typename Isa, bool WHOLE, typename T, typename A>
TALOS_SHARED void update_vector(const Entries<T, A>& at, int64_t i, int64_t n, const AdamScalars<A>& s) {
  typename VectorOf<A, Isa::kBytes>::type step;
  update_moments<Isa, WHOLE>(at, i, n, s, step);
  if (at.steps != nullptr) {
    store<Isa, WHOLE>(step, n, at.steps + i);
  } else {
    move<Isa, WHOLE>(at, i, n, s.decay, step);
  }
}

template <typename Isa, typename T, typename A>
TALOS_SHARED void update_entries(const Entries<T, A>& at, int64_t count, const AdamScalars<A>& s) {
  constexpr int64_t kLanes = Isa::kBytes / sizeof(A);
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) update_vector<Isa, true>(at, i, kLanes, s);
  if (i < count) update_vector<Isa, false>(at, i, count - i, s);
}

// The arrays of compact entries from `first` on, beside the part's p and g.
template <typename T, typename A>
TALOS_SHARED Entries<T, A> entries(const AdamTensor<T, A>& tensor, int64_t first, T* p, const T* g) {
  Entries<T, A> at{p, g, nullptr, tensor.exp_avg + first, tensor.exp_avg_sq + first, nullptr, nullptr, nullptr};
  if (tensor.max_exp_avg_sq != nullptr) at.top = tensor.max_exp_avg_sq + first;
  if (tensor.master != nullptr) at.master = tensor.master + first;
  if (tensor.entry_grad != nullptr) at.g = tensor.entry_grad + first;
  if (tensor.wide_entry_grad != nullptr) at.wide_g = tensor.wide_entry_grad + first;
  return at;
}

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
  const uint16_t* const index = static_cast<const uint16_t*>(tensor.index);
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
  const int64_t found = decode_bits(static_cast<const uint8_t*>(tensor.index) + row.at, kBlock, offsets);
  update_scattered<Isa>(tensor, row.base, offsets, row.first, found < row.count ? found : row.count, s);
}

// A tile of bits, read and written as a stream.
template <typename Isa, typename T, typename A>
TALOS_SHARED void update_tile(const AdamTensor<T, A>& tensor, const Row& row, const AdamScalars<A>& s) {
  T p[kPart + kSlack], g[kPart + kSlack];
  int64_t first = row.first;
  for (int64_t begin = 0; begin < kBlock; begin += kPart) {
    const uint8_t* const bits = static_cast<const uint8_t*>(tensor.index) + row.at + begin / 8;
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
// The same where the arithmetic is in the parameter's own type: it takes its steps where it lies, and is not packed.
template <typename T>
TALOS_AVX512 inline void update_tile_in_place(const AdamTensor<T, T>& tensor, const Row& row, const AdamScalars<T>& s) {
  T g[kPart + kSlack], steps[kPart + kSlack];
  const bool dense = tensor.grad != nullptr;
  int64_t first = row.first;
  for (int64_t begin = 0; begin < kBlock; begin += kPart) {
    const uint8_t* const bits = static_cast<const uint8_t*>(tensor.index) + row.at + begin / 8;
    const int64_t element = row.base + begin;
    const int64_t count = dense ? compress(Avx512{}, tensor.grad + element, bits, kPart, g) : count_bits(bits, kPart);
    if (count > row.first + row.count - first) return;  // more bits than entries: there are no moments for them
    auto at = entries<T, T>(tensor, first, nullptr, dense ? g : nullptr);
    at.steps = steps;
    update_entries<Avx512>(at, count, s);
    expand_steps(steps, bits, kPart, s.decay, tensor.param + element);
    first += count;
  }
}
#endif

template <typename Isa, typename T, typename A>
TALOS_SHARED void update_bits(const AdamTensor<T, A>& tensor, const Row& row, const AdamScalars<A>& s) {
  // AVX-512 reads what is selected and nothing else, AVX2 whole tiles.
  if constexpr (Isa::kBytes == 64) {
    if constexpr (std::is_same_v<T, A>) {
      if (tensor.master == nullptr) return update_tile_in_place(tensor, row, s);
    }
    return update_tile<Isa>(tensor, row, s);
  }
  if constexpr (Isa::kBytes == 32 && sizeof(T) != 8) {
    if (row.base + kBlock <= tensor.numel) return update_tile<Isa>(tensor, row, s);
  }
  update_decoded<Isa>(tensor, row, s);
}

template <typename Isa, typename T, typename A>
TALOS_SHARED void update_rows(const AdamTensor<T, A>& tensor, const Row* rows, int64_t count, const AdamScalars<A>& s) {
  for (int64_t r = 0; r < count; ++r) {
    const Row& row = rows[r];
    if (tensor.encoding == Encoding::kRuns) {
      const T* const g = tensor.grad == nullptr ? nullptr : tensor.grad + row.base;
      update_entries<Isa>(entries(tensor, row.first, tensor.param + row.base, g), row.count, s);
    } else if (tensor.encoding == Encoding::kOffsets) {
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

// AdamW over entries that lie side by side in every array, so that every vector of the arithmetic is full.
#pragma once

#include "selection.h"

namespace talos {

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
  Bounds bounds;
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

}  // namespace talos

// The checks of masked_adam_ beyond those of a selection.
#pragma once

#include "masked_adam.h"

namespace talos {

inline void check_state(const Tensor& state, const char* name, int64_t entries, ScalarType type) {
  STD_TORCH_CHECK(state.scalar_type() == type, name, " must be float64 for float64 parameters, else float32");
  STD_TORCH_CHECK(state.is_contiguous() && state.numel() == entries, name, " must be contiguous with ", entries,
                  " entries, as exp_avg has, but has ", state.numel());
}

// Whether grad has the entries only, and not an element of every element of param.
inline bool check_grad(const Tensor& grad, const Tensor& param, const Tensor& exp_avg) {
  const bool dense = grad.numel() == param.numel() && grad.scalar_type() == param.scalar_type();
  STD_TORCH_CHECK(dense || grad.numel() == param.numel() || grad.numel() == exp_avg.numel(), "grad has ", grad.numel(),
                  " entries: neither the ", param.numel(), " of param nor the ", exp_avg.numel(), " that are selected");
  STD_TORCH_CHECK(dense || grad.numel() == exp_avg.numel(), "grad must have the dtype of param");
  STD_TORCH_CHECK(dense || grad.scalar_type() == param.scalar_type() || grad.scalar_type() == exp_avg.scalar_type(),
                  "grad of the selected entries must have the dtype of param or of exp_avg");
  STD_TORCH_CHECK(param.is_contiguous() && grad.is_contiguous(), "param and grad must be contiguous");
  return !dense;
}

// One tensor but for its gradient and the rows of work.
inline void check_tensor(const Tensor& param, const Tensor& exp_avg, const Tensor& exp_avg_sq,
                         const Tensor* max_exp_avg_sq, const Tensor* master, const Tensor& work) {
  const int64_t entries = exp_avg.numel();
  const ScalarType wide = param.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  check_work(work);
  check_state(exp_avg, "exp_avg", entries, wide);
  check_state(exp_avg_sq, "exp_avg_sq", entries, wide);
  if (max_exp_avg_sq != nullptr) check_state(*max_exp_avg_sq, "max_exp_avg_sq", entries, wide);
  if (master != nullptr) check_state(*master, "master", entries, wide);
}

}  // namespace talos

// Argument checks shared by every device. talos_fast/sensitivity says the same in Python, with the
// library's own exception; these protect callers of torch.ops.talos_fast from reading stray memory.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <optional>

#include "radix.h"
#include "squared.h"

namespace talos {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline bool is_supported(ScalarType type) {
  return type == ScalarType::Float || type == ScalarType::Double || type == ScalarType::BFloat16 ||
         type == ScalarType::Half;
}

inline Shape check_accumulate_squared(const Tensor& scores, const Tensor& inputs, const Tensor& grads,
                                      const std::optional<Tensor>& scale) {
  STD_TORCH_CHECK(scores.dim() == 2, "scores must be (outs, ins), but has ", scores.dim(), " dimensions");
  STD_TORCH_CHECK(inputs.dim() == 3, "inputs must be (samples, tokens, ins), but has ", inputs.dim(), " dimensions");
  STD_TORCH_CHECK(grads.dim() == 3, "grad_outputs must be (samples, tokens, outs), but has ", grads.dim(),
                  " dimensions");
  STD_TORCH_CHECK(scores.scalar_type() == ScalarType::Float || scores.scalar_type() == ScalarType::Double,
                  "scores must be float32 or float64: squares of gradients underflow in 16 bits");
  STD_TORCH_CHECK(scores.is_contiguous(), "scores must be contiguous; pass scores.contiguous()");
  STD_TORCH_CHECK(is_supported(inputs.scalar_type()), "inputs must be float32, float64, bfloat16 or float16");
  STD_TORCH_CHECK(inputs.scalar_type() == grads.scalar_type(),
                  "inputs and grad_outputs must have one dtype; cast one to the other's");
  STD_TORCH_CHECK(inputs.device() == scores.device() && grads.device() == scores.device(),
                  "scores, inputs and grad_outputs must be on one device");
  const Shape shape{inputs.size(0), inputs.size(1), scores.size(0), scores.size(1)};
  STD_TORCH_CHECK(inputs.size(2) == shape.ins, "inputs end in ", inputs.size(2), " features, but scores has ",
                  shape.ins, " columns");
  STD_TORCH_CHECK(grads.size(2) == shape.outs, "grad_outputs end in ", grads.size(2), " features, but scores has ",
                  shape.outs, " rows");
  STD_TORCH_CHECK(grads.size(0) == shape.samples && grads.size(1) == shape.tokens, "grad_outputs has ", grads.size(0),
                  " samples of ", grads.size(1), " tokens, but inputs has ", shape.samples, " of ", shape.tokens);
  STD_TORCH_CHECK(!scale.has_value() || (scale->numel() == 1 && scale->scalar_type() == scores.scalar_type() &&
                                         scale->device() == scores.device()),
                  "scale must be one number with the dtype and device of scores");
  return shape;
}

// Those of a dimension of one entry are arbitrary, and never used.
inline Strides strides_of(const Tensor& tensor) {
  const auto stride = [&](int64_t dim) { return tensor.size(dim) == 1 ? 0 : tensor.stride(dim); };
  return {stride(0), stride(1), tensor.size(2) == 1 ? 1 : tensor.stride(2)};
}

inline void check_radix_histogram(const Tensor& counts, const Tensor& scores, int64_t digit) {
  STD_TORCH_CHECK(counts.scalar_type() == ScalarType::Long && counts.is_contiguous() && counts.numel() == kCounts,
                  "counts must be ", kCounts, " contiguous int64");
  STD_TORCH_CHECK(scores.scalar_type() == ScalarType::Float && scores.is_contiguous(),
                  "scores must be contiguous float32");
  STD_TORCH_CHECK(counts.device() == scores.device(), "counts and scores must be on one device");
  STD_TORCH_CHECK(digit >= 0 && digit < kDigits, "digit must be 0, 1 or 2, but is ", digit);
}

// Nothing to add: no entry, no sample, or samples without a token.
inline bool is_empty(const Shape& shape) {
  return shape.samples == 0 || shape.tokens == 0 || shape.outs == 0 || shape.ins == 0;
}

}  // namespace talos

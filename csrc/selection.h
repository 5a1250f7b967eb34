// The index of a selection, as every operator on the CPU checks it before its kernel trusts it.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <optional>

#include "masked_adam.h"

namespace talos {

// Defined in masked_adam.cpp.
Encoding encoding_of(const std::optional<torch::stable::Tensor>& index);
void check_rows(const Row* rows, int64_t count, int64_t numel, int64_t entries,
                const std::optional<torch::stable::Tensor>& index);

}  // namespace talos

// The checks of masked_adam_: no row, bit or offset may name memory outside its tensors, whoever made the index.
#pragma once

#include <optional>

#include "check.h"
#include "masked_adam.h"

namespace talos {

using Optional = std::optional<Tensor>;

constexpr int64_t kTile = 65536;  // elements that an offset can reach

inline Encoding encoding_of(const Optional& index) {
  if (!index.has_value()) return Encoding::kRuns;
  const bool bits = index->scalar_type() == ScalarType::Byte;
  STD_TORCH_CHECK(bits || index->scalar_type() == ScalarType::Short, "index must be uint8 (bits) or int16 (offsets)");
  STD_TORCH_CHECK(index->is_contiguous(), "index must be contiguous");
  return bits ? Encoding::kBits : Encoding::kOffsets;
}

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

// The elements that a row of the last tile names: only those can lie beyond the parameter.
inline bool is_inside(const Row& row, const uint8_t* bits, int64_t numel) {
  for (int64_t i = numel - row.base; i < kBlock; ++i) {
    if (bits[i / 8] >> i % 8 & 1) return false;
  }
  return true;
}

inline bool is_inside(const Row& row, const uint16_t* offsets, int64_t numel) {
  if (row.base + kTile <= numel) return true;
  int64_t most = 0;
  for (int64_t i = 0; i < row.count; ++i) most = offsets[i] > most ? offsets[i] : most;
  return row.base + most < numel;
}

// Every row must stay inside the parameter, the state and the index, and what the index says inside the parameter.
inline void check_rows(const Row* rows, int64_t count, int64_t numel, int64_t entries, const Optional& index) {
  const Encoding encoding = encoding_of(index);
  const void* const begin = index.has_value() ? index->const_data_ptr() : nullptr;
  for (int64_t r = 0; r < count; ++r) {
    const Row& row = rows[r];
    const int64_t read = encoding == Encoding::kBits ? kBlock / 8 : encoding == Encoding::kOffsets ? row.count : 0;
    const int64_t span = encoding == Encoding::kRuns ? row.count : 1;
    bool inside = row.count >= 0 && row.count <= kBlock && row.first >= 0 && row.first <= entries - row.count &&
                  row.base >= 0 && row.base <= numel - span && row.at >= 0 &&
                  (read == 0 || row.at <= index->numel() - read);
    if (inside && encoding == Encoding::kBits) {
      inside = is_inside(row, static_cast<const uint8_t*>(begin) + row.at, numel);
    } else if (inside && encoding == Encoding::kOffsets) {
      inside = is_inside(row, static_cast<const uint16_t*>(begin) + row.at, numel);
    }
    STD_TORCH_CHECK(inside, "row ", r, " of work leaves the parameter, its state or its index");
  }
}

// One tensor but for its gradient.
inline void check_tensor(const Tensor& param, const Tensor& exp_avg, const Tensor& exp_avg_sq,
                         const Tensor* max_exp_avg_sq, const Tensor* master, const Tensor& work,
                         const Optional& index) {
  const int64_t entries = exp_avg.numel();
  const ScalarType wide = param.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  STD_TORCH_CHECK(
      work.scalar_type() == ScalarType::Long && work.is_contiguous() && work.dim() == 2 && work.size(1) == 4,
      "work must be a contiguous int64 table of four columns");
  check_state(exp_avg, "exp_avg", entries, wide);
  check_state(exp_avg_sq, "exp_avg_sq", entries, wide);
  if (max_exp_avg_sq != nullptr) check_state(*max_exp_avg_sq, "max_exp_avg_sq", entries, wide);
  if (master != nullptr) check_state(*master, "master", entries, wide);
  check_rows(reinterpret_cast<const Row*>(work.const_data_ptr<int64_t>()), work.size(0), param.numel(), entries, index);
}

}  // namespace talos

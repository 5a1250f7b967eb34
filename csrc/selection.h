// The index of a selection (talos_fast/optim/plan.py), and its checks: no row, bit or offset may name memory outside
// the tensors, whoever made them. Kernels trust what passed.
#pragma once

#include <optional>

#include "check.h"
#include "compress.h"

namespace talos {

using Optional = std::optional<Tensor>;

constexpr int64_t kTile = 65536;  // elements that an offset can reach

enum class Encoding { kRuns, kBits, kOffsets };

struct Row {
  int64_t base, at, first, count;  // element, place in the index, compact entry, entries
};

inline Encoding encoding_of(const Optional& index) {
  if (!index.has_value()) return Encoding::kRuns;
  const bool bits = index->scalar_type() == ScalarType::Byte;
  STD_TORCH_CHECK(bits || index->scalar_type() == ScalarType::Short, "index must be uint8 (bits) or int16 (offsets)");
  STD_TORCH_CHECK(index->is_contiguous(), "index must be contiguous");
  return bits ? Encoding::kBits : Encoding::kOffsets;
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

}  // namespace talos

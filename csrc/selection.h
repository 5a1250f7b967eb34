// The index of a selection (talos_fast/optim/selection.py), and its checks: no row, bit or offset may name memory
// outside the tensors, whoever made them. Kernels trust what passed.
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

// What rows may name: the elements of a parameter, the entries of its state and the places of its index.
struct Bounds {
  Bounds(int64_t numel, int64_t entries, const Optional& index)
      : numel(numel),
        entries(entries),
        places(index.has_value() ? index->numel() : 0),
        index(index.has_value() ? index->const_data_ptr() : nullptr),
        encoding(encoding_of(index)) {}

  int64_t numel, entries, places;
  const void* index;
  Encoding encoding;
};

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

inline bool is_inside(const Row& row, const Bounds& bounds) {
  const bool bits = bounds.encoding == Encoding::kBits, offsets = bounds.encoding == Encoding::kOffsets;
  const int64_t read = bits ? kBlock / 8 : offsets ? row.count : 0, span = bits || offsets ? 1 : row.count;
  const bool inside = row.count >= 0 && row.count <= kBlock && row.first >= 0 &&
                      row.first <= bounds.entries - row.count && row.base >= 0 && row.base <= bounds.numel - span &&
                      row.at >= 0 && (read == 0 || row.at <= bounds.places - read);
  if (inside && bits) return is_inside(row, static_cast<const uint8_t*>(bounds.index) + row.at, bounds.numel);
  if (inside && offsets) return is_inside(row, static_cast<const uint16_t*>(bounds.index) + row.at, bounds.numel);
  return inside;
}

// The first row that is not inside; -1 if all are.
inline int64_t find_stray(const Row* rows, int64_t count, const Bounds& bounds) {
  for (int64_t r = 0; r < count; ++r) {
    if (!is_inside(rows[r], bounds)) return r;
  }
  return -1;
}

inline void check_stray(int64_t stray) {
  STD_TORCH_CHECK(stray < 0, "row ", stray, " of work leaves the parameter, its state or its index");
}

inline void check_work(const Tensor& work) {
  STD_TORCH_CHECK(
      work.scalar_type() == ScalarType::Long && work.is_contiguous() && work.dim() == 2 && work.size(1) == 4,
      "work must be a contiguous int64 table of four columns");
}

// Calls go(element, arithmetic) with values of the types that elements of one of the four kinds have, and are computed
// in.
template <typename Go>
void for_type(ScalarType type, Go&& go) {
  if (type == ScalarType::Double) {
    go(double{}, double{});
  } else if (type == ScalarType::Float) {
    go(float{}, float{});
  } else if (type == ScalarType::BFloat16) {
    go(BFloat16{}, float{});
  } else {
    go(Half{}, float{});
  }
}

}  // namespace talos

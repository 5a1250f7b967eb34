// The CPU implementation of masked_adam_: checks, then the blocks of masked_adam.h over all threads.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <optional>

#include "check.h"
#include "isa.h"
#include "masked_adam.h"

namespace talos {

using Optional = std::optional<Tensor>;

// Rows that one thread takes at a time: some 30 microseconds of work.
constexpr int64_t kGrain = 16;
constexpr int64_t kTile = 65536;  // elements that an offset can reach

Encoding encoding_of(const Optional& index) {
  if (!index.has_value()) return Encoding::kRuns;
  const bool bits = index->scalar_type() == ScalarType::Byte;
  STD_TORCH_CHECK(bits || index->scalar_type() == ScalarType::Short, "index must be uint8 (bits) or int16 (offsets)");
  STD_TORCH_CHECK(index->is_contiguous(), "index must be contiguous");
  return bits ? Encoding::kBits : Encoding::kOffsets;
}

void check_state(const Tensor& state, const char* name, int64_t entries, ScalarType type) {
  STD_TORCH_CHECK(state.scalar_type() == type, name, " must be float64 for float64 parameters, else float32");
  STD_TORCH_CHECK(state.is_contiguous() && state.numel() == entries, name, " must be contiguous with ", entries,
                  " entries, as exp_avg has, but has ", state.numel());
}

// Whether grad has the entries only, and not an element of every element of param.
bool check_grad(const Tensor& grad, const Tensor& param, const Tensor& exp_avg) {
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
bool is_inside(const Row& row, const uint8_t* bits, int64_t numel) {
  for (int64_t i = numel - row.base; i < kBlock; ++i) {
    if (bits[i / 8] >> i % 8 & 1) return false;
  }
  return true;
}

bool is_inside(const Row& row, const uint16_t* offsets, int64_t numel) {
  if (row.base + kTile <= numel) return true;
  int64_t most = 0;
  for (int64_t i = 0; i < row.count; ++i) most = offsets[i] > most ? offsets[i] : most;
  return row.base + most < numel;
}

// Every row must stay inside the parameter, the state and the index, and what the index says inside the parameter.
void check_rows(const Row* rows, int64_t count, int64_t numel, int64_t entries, const Optional& index) {
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

template <typename T, typename A>
auto choose_update() {
#if defined(__x86_64__)
  const Isa isa = choose_isa();
  if (isa == Isa::kAvx512) return update_avx512<T, A>;
  if (isa == Isa::kAvx2) return update_avx2<T, A>;
#endif
  return update_portable<T, A>;
}

template <typename T, typename A>
void run(const AdamTensor<T, A>& tensor, const Tensor& work, const AdamScalars<A>& scalars) {
  static const auto update = choose_update<T, A>();
  const Row* const rows = reinterpret_cast<const Row*>(work.const_data_ptr<int64_t>());
  torch::stable::parallel_for(0, work.size(0), kGrain,
                              [&](int64_t begin, int64_t end) { update(tensor, rows + begin, end - begin, scalars); });
}

template <typename T, typename A>
AdamTensor<T, A> pointers(const Tensor& param, const Tensor& grad, const Tensor& exp_avg, const Tensor& exp_avg_sq,
                          const Optional& max_exp_avg_sq, const Optional& master, const Optional& index, bool compact) {
  AdamTensor<T, A> tensor{static_cast<T*>(param.mutable_data_ptr()),
                          nullptr,
                          nullptr,
                          nullptr,
                          exp_avg.mutable_data_ptr<A>(),
                          exp_avg_sq.mutable_data_ptr<A>(),
                          max_exp_avg_sq.has_value() ? max_exp_avg_sq->mutable_data_ptr<A>() : nullptr,
                          master.has_value() ? master->mutable_data_ptr<A>() : nullptr,
                          index.has_value() ? index->const_data_ptr() : nullptr,
                          encoding_of(index),
                          param.numel()};
  const void* const g = grad.const_data_ptr();
  if (!compact) {
    tensor.grad = static_cast<const T*>(g);
  } else if (grad.scalar_type() == param.scalar_type()) {
    tensor.entry_grad = static_cast<const T*>(g);
  } else {
    tensor.wide_entry_grad = static_cast<const A*>(g);
  }
  return tensor;
}

void masked_adam_cpu(Tensor param, Tensor grad, Tensor exp_avg, Tensor exp_avg_sq, Optional max_exp_avg_sq,
                     Optional master, Tensor work, Optional index, double decay, double beta1, double beta2,
                     double step_size, double correction, double eps, double grad_scale, bool maximize) {
  const ScalarType type = param.scalar_type();
  const int64_t entries = exp_avg.numel();
  const ScalarType wide = type == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  STD_TORCH_CHECK(is_supported(type), "param must be float32, float64, bfloat16 or float16");
  const bool compact = check_grad(grad, param, exp_avg);
  STD_TORCH_CHECK(
      work.scalar_type() == ScalarType::Long && work.is_contiguous() && work.dim() == 2 && work.size(1) == 4,
      "work must be a contiguous int64 table of four columns");
  check_state(exp_avg, "exp_avg", entries, wide);
  check_state(exp_avg_sq, "exp_avg_sq", entries, wide);
  if (max_exp_avg_sq.has_value()) check_state(*max_exp_avg_sq, "max_exp_avg_sq", entries, wide);
  if (master.has_value()) check_state(*master, "master", entries, wide);
  check_rows(reinterpret_cast<const Row*>(work.const_data_ptr<int64_t>()), work.size(0), param.numel(), entries, index);

  auto go = [&](auto element, auto arithmetic) {
    using T = decltype(element);
    using A = decltype(arithmetic);
    const AdamScalars<A> scalars{A(decay),      A(beta2),     A(step_size), A(correction), A(eps),
                                 A(grad_scale), A(1 - beta1), A(1 - beta2), maximize};
    run(pointers<T, A>(param, grad, exp_avg, exp_avg_sq, max_exp_avg_sq, master, index, compact), work, scalars);
  };
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

STABLE_TORCH_LIBRARY_IMPL(talos_fast, CPU, m) { m.impl("masked_adam_", TORCH_BOX(&talos::masked_adam_cpu)); }

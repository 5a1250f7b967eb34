// The CPU implementation of masked_adam_: the rows of all tensors, shared out over the threads.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <atomic>
#include <vector>

#include "isa.h"
#include "masked_adam_check.h"

namespace talos {

using Tensors = std::vector<Tensor>;

// Rows that a thread takes at a time: some 15 to 50 microseconds of work, and memory in long streams.
constexpr int64_t kGrain = 64;

struct Chunk {
  int64_t tensor, begin, count;  // which, first row, rows
};

template <typename T, typename A>
auto choose_update() {
#if defined(__x86_64__)
  const Isa isa = choose_isa();
  if (isa == Isa::kAvx512) return update_avx512<T, A>;
  if (isa == Isa::kAvx2) return update_avx2<T, A>;
#endif
  return update_portable<T, A>;
}

// One parallel region for all tensors; rows differ in work, so threads fetch chunks as they finish.
template <typename T, typename A>
void run(const std::vector<AdamTensor<T, A>>& tensors, const Tensors& work, const AdamScalars<A>& scalars) {
  static const auto update = choose_update<T, A>();
  std::vector<Chunk> chunks;
  int64_t rows = 0;
  for (size_t t = 0; t < work.size(); ++t) {
    rows += work[t].size(0);
    for (int64_t begin = 0; begin < work[t].size(0); begin += kGrain) {
      chunks.push_back({static_cast<int64_t>(t), begin, tile_extent(begin, work[t].size(0), kGrain)});
    }
  }
  std::atomic<size_t> next{0};
  torch::stable::parallel_for(0, tile_count(rows, kGrain), 1, [&](int64_t, int64_t) {
    for (size_t c = next++; c < chunks.size(); c = next++) {
      const Chunk& chunk = chunks[c];
      const Row* const first = reinterpret_cast<const Row*>(work[chunk.tensor].const_data_ptr<int64_t>());
      update(tensors[chunk.tensor], first + chunk.begin, chunk.count, scalars);
    }
  });
}

template <typename T, typename A>
AdamTensor<T, A> pointers(const Tensor& param, const Tensor& grad, const Tensor& exp_avg, const Tensor& exp_avg_sq,
                          const Tensor* max_exp_avg_sq, const Tensor* master, const Optional& index) {
  const bool compact = check_grad(grad, param, exp_avg);
  const bool wide = grad.scalar_type() != param.scalar_type();
  const void* const g = grad.const_data_ptr();
  return {static_cast<T*>(param.mutable_data_ptr()),
          compact ? nullptr : static_cast<const T*>(g),
          compact && !wide ? static_cast<const T*>(g) : nullptr,
          compact && wide ? static_cast<const A*>(g) : nullptr,
          exp_avg.mutable_data_ptr<A>(),
          exp_avg_sq.mutable_data_ptr<A>(),
          max_exp_avg_sq != nullptr ? max_exp_avg_sq->mutable_data_ptr<A>() : nullptr,
          master != nullptr ? master->mutable_data_ptr<A>() : nullptr,
          index.has_value() ? index->const_data_ptr() : nullptr,
          encoding_of(index),
          param.numel()};
}

void masked_adam_cpu(Tensors params, Tensors grads, Tensors exp_avgs, Tensors exp_avg_sqs, Tensors max_exp_avg_sqs,
                     Tensors masters, Tensors work, std::vector<Optional> index, double decay, double beta1,
                     double beta2, double step_size, double correction, double eps, double grad_scale, bool maximize) {
  const size_t count = params.size();
  STD_TORCH_CHECK(grads.size() == count && exp_avgs.size() == count && exp_avg_sqs.size() == count &&
                      work.size() == count && index.size() == count,
                  "params, grads, exp_avgs, exp_avg_sqs, work and index must be equally long");
  STD_TORCH_CHECK(
      (max_exp_avg_sqs.empty() || max_exp_avg_sqs.size() == count) && (masters.empty() || masters.size() == count),
      "max_exp_avg_sqs and masters must be empty or as long as params");
  if (count == 0) return;
  const ScalarType type = params[0].scalar_type();
  STD_TORCH_CHECK(is_supported(type), "params must be float32, float64, bfloat16 or float16");
  const auto at = [](const Tensors& list, size_t t) { return list.empty() ? nullptr : &list[t]; };
  for (size_t t = 0; t < count; ++t) {
    STD_TORCH_CHECK(params[t].scalar_type() == type, "params must have one dtype");
    check_tensor(params[t], exp_avgs[t], exp_avg_sqs[t], at(max_exp_avg_sqs, t), at(masters, t), work[t], index[t]);
  }
  auto go = [&](auto element, auto arithmetic) {
    using T = decltype(element);
    using A = decltype(arithmetic);
    std::vector<AdamTensor<T, A>> tensors;
    for (size_t t = 0; t < count; ++t) {
      tensors.push_back(pointers<T, A>(params[t], grads[t], exp_avgs[t], exp_avg_sqs[t], at(max_exp_avg_sqs, t),
                                       at(masters, t), index[t]));
    }
    const AdamScalars<A> scalars{A(decay),      A(beta2),     A(step_size), A(correction), A(eps),
                                 A(grad_scale), A(1 - beta1), A(1 - beta2), maximize};
    run(tensors, work, scalars);
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

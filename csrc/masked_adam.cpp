// The CPU implementation of masked_adam_: the rows of all tensors, shared out over the threads.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <vector>

#include "isa.h"
#include "masked_adam_check.h"
#include "share_out.h"

namespace talos {

using Tensors = std::vector<Tensor>;

// Rows that a thread takes at a time. Rows differ in work, so every thread gets several chunks; but each begins new
// streams, whose first pages and lines nothing has foreseen.
constexpr int64_t kLeastRows = 64, kMostRows = 512, kChunksPerThread = 8;

inline int64_t grain_of(int64_t rows) {
  const int64_t share = rows / (kChunksPerThread * torch::stable::get_num_threads());
  return std::min(std::max(share, kLeastRows), kMostRows);
}

template <typename T, typename A>
struct Task {
  AdamTensor<T, A> tensor;
  const Row* rows;
  int64_t count;
};

struct Chunk {
  size_t task;
  int64_t begin, count;  // rows
};

template <typename T, typename A>
auto choose_update() {
#if defined(__x86_64__)
  const CpuCapability capability = cpu_capability();
  if (capability == CpuCapability::kAvx512) return update_avx512<T, A>;
  if (capability == CpuCapability::kAvx2) return update_avx2<T, A>;
#endif
  return update_portable<T, A>;
}

// One parallel region for all tensors; rows differ in work, so threads fetch chunks as they finish. Rows are checked
// where they are read, for a pass of its own would read all of them twice; one that is refused ends the step with some
// of the entries moved.
template <typename T, typename A>
void run(const std::vector<Task<T, A>>& tasks, const AdamScalars<A>& scalars) {
  static const auto update = choose_update<T, A>();
  int64_t rows = 0;
  for (const Task<T, A>& task : tasks) rows += task.count;
  const int64_t grain = grain_of(rows);
  std::vector<Chunk> chunks;
  for (size_t t = 0; t < tasks.size(); ++t) {
    for (int64_t begin = 0; begin < tasks[t].count; begin += grain) {
      chunks.push_back({t, begin, tile_extent(begin, tasks[t].count, grain)});
    }
  }
  std::atomic<int64_t> stray{-1};
  share_out(static_cast<int64_t>(chunks.size()), tile_count(rows, grain), [&] {  // few rows wake no second thread
    return [&](int64_t c) {
      const Chunk& chunk = chunks[c];
      const Task<T, A>& task = tasks[chunk.task];
      const int64_t found = find_stray(task.rows + chunk.begin, chunk.count, task.tensor.bounds);
      if (found >= 0) stray = chunk.begin + found;
      if (stray < 0) update(task.tensor, task.rows + chunk.begin, chunk.count, scalars);
    };
  });
  check_stray(stray);
}

template <typename T, typename A>
Task<T, A> checked(const Tensor& param, const Tensor& grad, const Tensor& exp_avg, const Tensor& exp_avg_sq,
                   const Tensor* max_exp_avg_sq, const Tensor* master, const Tensor& work, const Optional& index) {
  check_tensor(param, exp_avg, exp_avg_sq, max_exp_avg_sq, master, work);
  const bool compact = check_grad(grad, param, exp_avg);
  const bool wide = grad.scalar_type() != param.scalar_type();
  const void* const g = grad.const_data_ptr();
  return {{static_cast<T*>(param.mutable_data_ptr()), compact ? nullptr : static_cast<const T*>(g),
           compact && !wide ? static_cast<const T*>(g) : nullptr, compact && wide ? static_cast<const A*>(g) : nullptr,
           exp_avg.mutable_data_ptr<A>(), exp_avg_sq.mutable_data_ptr<A>(),
           max_exp_avg_sq != nullptr ? max_exp_avg_sq->mutable_data_ptr<A>() : nullptr,
           master != nullptr ? master->mutable_data_ptr<A>() : nullptr, Bounds(param.numel(), exp_avg.numel(), index)},
          reinterpret_cast<const Row*>(work.const_data_ptr<int64_t>()),
          work.size(0)};
}

// Most are float32: then a store, and no operator of torch's, which would cost as much as all else here.
void set_steps(const Tensors& steps, double step) {
  for (const Tensor& counter : steps) {
    if (counter.scalar_type() == ScalarType::Float && counter.numel() == 1 && counter.is_cpu()) {
      *counter.mutable_data_ptr<float>() = static_cast<float>(step);
    } else {
      torch::stable::fill_(counter, step);
    }
  }
}

void masked_adam_cpu(Tensors params, Tensors grads, Tensors exp_avgs, Tensors exp_avg_sqs, Tensors max_exp_avg_sqs,
                     Tensors masters, Tensors work, std::vector<Optional> index, Tensors steps, double step,
                     double decay, double beta1, double beta2, double step_size, double correction, double eps,
                     double grad_scale, bool maximize) {
  const size_t count = params.size();
  STD_TORCH_CHECK(grads.size() == count && exp_avgs.size() == count && exp_avg_sqs.size() == count &&
                      work.size() == count && index.size() == count && steps.size() == count,
                  "params, grads, exp_avgs, exp_avg_sqs, work, index and steps must be equally long");
  STD_TORCH_CHECK(
      (max_exp_avg_sqs.empty() || max_exp_avg_sqs.size() == count) && (masters.empty() || masters.size() == count),
      "max_exp_avg_sqs and masters must be empty or as long as params");
  if (count == 0) return;
  const ScalarType type = params[0].scalar_type();
  STD_TORCH_CHECK(is_supported(type), "params must be float32, float64, bfloat16 or float16");
  const auto at = [](const Tensors& list, size_t t) { return list.empty() ? nullptr : &list[t]; };
  auto go = [&](auto element, auto arithmetic) {
    using T = decltype(element);
    using A = decltype(arithmetic);
    std::vector<Task<T, A>> tasks;
    tasks.reserve(count);
    for (size_t t = 0; t < count; ++t) {
      STD_TORCH_CHECK(params[t].scalar_type() == type, "params must have one dtype");
      tasks.push_back(checked<T, A>(params[t], grads[t], exp_avgs[t], exp_avg_sqs[t], at(max_exp_avg_sqs, t),
                                    at(masters, t), work[t], index[t]));
    }
    const AdamScalars<A> scalars{A(decay),      A(beta2),     A(step_size), A(correction), A(eps),
                                 A(grad_scale), A(1 - beta1), A(1 - beta2), maximize};
    run(tasks, scalars);
  };
  for_type(type, go);
  set_steps(steps, step);
}

}  // namespace talos

STABLE_TORCH_LIBRARY_IMPL(talos_fast, CPU, m) { m.impl("masked_adam_", TORCH_BOX(&talos::masked_adam_cpu)); }

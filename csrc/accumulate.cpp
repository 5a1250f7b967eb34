// The CPU implementation of accumulate_squared_per_sample_.
//
// Operands are packed once, a bounded number of samples at a time, into panels of the register tile's width. Then every
// tile of scores belongs to one thread, which passes all samples over it: samples outside, register tiles inside, so
// neither (samples, outs, ins) nor (outs, ins) products are ever in memory. An entry's sum is taken in an order that
// depends on neither tiles nor threads, so the result does not either.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <optional>

#include "check.h"
#include "cpu_kernels.h"
#include "cpu_worker.h"
#include "share_out.h"

namespace talos {

template <typename Score>
void square_entries(const Bytes& panels) {
  Score* const entries = static_cast<Score*>(panels.data);
  for (int64_t i = 0; i < panels.count / int64_t{sizeof(Score)}; ++i) entries[i] *= entries[i];
}

template <typename Score>
void accumulate(const Call<Score>& call, const Operand& inputs, const Operand& grads) {
  const TileKernel& kernel = call.kernel;
  Panels x(inputs, kernel.cols, kernel.pack_inputs, kernel, call.shape.tokens);
  Panels g(grads, kernel.rows, kernel.pack_grads, kernel, call.shape.tokens);
  const int64_t sample_bytes = x.sample_bytes() + g.sample_bytes();
  const int64_t block = std::clamp<int64_t>(kWorkspace / sample_bytes, 1, call.shape.samples);
  const Workspace workspace(block * sample_bytes);
  x.place(workspace.data());
  g.place(workspace.data() + block * x.sample_bytes());
  const int64_t threads = torch::stable::get_num_threads();
  const Tiles tiles(call.shape, kernel, threads);
  for (int64_t first = 0; first < call.shape.samples; first += block) {
    const int64_t samples = tile_extent(first, call.shape.samples, block), split = samples * x.groups();
    share_out(split + samples * g.groups(), threads, [&] {
      return [&](int64_t index) {
        const Bytes packed = index < split ? x.pack(first, index) : g.pack(first, index - split);
        if (call.squared) square_entries<Score>(packed);
      };
    });
    share_out(tiles.count(), threads, [&] { return TileWorker<Score>(call, tiles, x, g, samples); });
  }
}

// With one token a sample, the sum over samples of squared products is one product of squares: the samples become the
// tokens of a single sample.
template <typename Score, typename From>
void accumulate_from(const Tensor& scores, const Tensor& inputs, const Tensor& grads, Score scale, Shape shape) {
  Operand x{inputs.const_data_ptr(), strides_of(inputs), shape.ins, sizeof(From)};
  Operand g{grads.const_data_ptr(), strides_of(grads), shape.outs, sizeof(From)};
  const bool one = shape.tokens == 1;
  if (one) {
    std::swap(shape.samples, shape.tokens);
    std::swap(x.strides.sample, x.strides.token);
    std::swap(g.strides.sample, g.strides.token);
  }
  static const TileKernel wide = choose_kernel<Score, From>(false), narrow = choose_kernel<Score, From>(true);
  accumulate<Score>({scores.mutable_data_ptr<Score>(), scale, shape, one ? wide : narrow, one}, x, g);
}

void accumulate_squared_per_sample_cpu(Tensor scores, Tensor inputs, Tensor grad_outputs, std::optional<Tensor> scale) {
  const Shape shape = check_accumulate_squared(scores, inputs, grad_outputs, scale);
  if (is_empty(shape)) return;
  const ScalarType type = scores.scalar_type(), from = inputs.scalar_type();
  if (type == ScalarType::Double || from == ScalarType::Double) {
    inputs = torch::stable::to(inputs, type);
    grad_outputs = torch::stable::to(grad_outputs, type);
  }
  if (type == ScalarType::Double) {
    const double factor = scale.has_value() ? *scale->const_data_ptr<double>() : 1.0;
    return accumulate_from<double, double>(scores, inputs, grad_outputs, factor, shape);
  }
  const float factor = scale.has_value() ? *scale->const_data_ptr<float>() : 1.0f;
  if (from == ScalarType::BFloat16) {
    accumulate_from<float, BFloat16>(scores, inputs, grad_outputs, factor, shape);
  } else if (from == ScalarType::Half) {
    accumulate_from<float, Half>(scores, inputs, grad_outputs, factor, shape);
  } else {
    accumulate_from<float, float>(scores, inputs, grad_outputs, factor, shape);
  }
}

}  // namespace talos

STABLE_TORCH_LIBRARY_IMPL(talos_fast, CPU, m) {
  m.impl("accumulate_squared_per_sample_", TORCH_BOX(&talos::accumulate_squared_per_sample_cpu));
}

// The operators' schemas, the CPU implementation of one (masked_adam.cpp has the other's), and the empty Python module
// that makes the shared library importable. Only stable headers of torch: see TORCH_STABLE_ONLY in setup.py.
#include <Python.h>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "check.h"
#include "cpu_tile.h"

namespace talos {

template <typename T>
void accumulate(const Tensor& scores, const Tensor& inputs, const Tensor& grads, const Shape& shape) {
  static const TileKernel<T> kernel = choose_kernel<T>();
  Panels<T> x(shape.samples, shape.tokens, shape.ins, kernel.cols),
      g(shape.samples, shape.tokens, shape.outs, kernel.rows);
  torch::stable::parallel_for(0, shape.samples, 1, [&](int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; ++n) {
      (x.*kernel.pack_inputs)(inputs.const_data_ptr<T>(), n);
      (g.*kernel.pack_grads)(grads.const_data_ptr<T>(), n);
    }
  });
  const Problem<T> problem{scores.mutable_data_ptr<T>(), x, g, shape};
  const int64_t across = tile_count(shape.ins, kTileIns);
  // Every tile belongs to one thread and sees its samples in order: the result does not depend on the
  // number of threads.
  torch::stable::parallel_for(0, tile_count(shape.outs, kTileOuts) * across, 1, [&](int64_t begin, int64_t end) {
    Scratch<T> scratch(shape);
    for (int64_t tile = begin; tile < end; ++tile) {
      kernel.accumulate(problem, tile / across * kTileOuts, tile % across * kTileIns, scratch);
    }
  });
}

Tensor prepare(const Tensor& tensor, ScalarType type) {
  const Tensor cast = tensor.scalar_type() == type ? tensor : torch::stable::to(tensor, type);
  return torch::stable::contiguous(cast);
}

void accumulate_squared_per_sample_cpu(Tensor scores, Tensor inputs, Tensor grad_outputs) {
  const Shape shape = check_accumulate_squared(scores, inputs, grad_outputs);
  if (is_empty(shape)) return;
  const ScalarType type = scores.scalar_type();
  const Tensor x = prepare(inputs, type), g = prepare(grad_outputs, type);
  if (type == ScalarType::Double) {
    accumulate<double>(scores, x, g, shape);
  } else {
    accumulate<float>(scores, x, g, shape);
  }
}

}  // namespace talos

STABLE_TORCH_LIBRARY(talos_fast, m) {
  m.def("accumulate_squared_per_sample_(Tensor(a!) scores, Tensor inputs, Tensor grad_outputs) -> ()");
  m.def(
      "masked_adam_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs, "
      "Tensor(d!)[] max_exp_avg_sqs, Tensor(e!)[] masters, Tensor[] work, Tensor?[] index, *, float decay, float "
      "beta1, "
      "float beta2, float step_size, float correction, float eps, float grad_scale, bool maximize) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(talos_fast, CPU, m) {
  m.impl("accumulate_squared_per_sample_", TORCH_BOX(&talos::accumulate_squared_per_sample_cpu));
}

PyMODINIT_FUNC PyInit__C(void) {
  static PyModuleDef module = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr};
  return PyModule_Create(&module);
}

// The operators' schemas, and the empty Python module that makes the shared library importable. Implementations: one
// .cpp file an operator. Only stable headers of torch: see TORCH_STABLE_ONLY in setup.py.
#include <Python.h>

#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(talos_fast, m) {
  m.def(
      "accumulate_squared_per_sample_(Tensor(a!) scores, Tensor inputs, Tensor grad_outputs, Tensor? scale=None) -> "
      "()");
  m.def("radix_histogram_(Tensor(a!) counts, Tensor scores, int digit, int prefix) -> ()");
  m.def(
      "masked_adam_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs, "
      "Tensor(d!)[] max_exp_avg_sqs, Tensor(e!)[] masters, Tensor[] work, Tensor?[] index, *, "
      "Tensor(f!)[] steps, float step, float decay, float beta1, float beta2, float step_size, float correction, "
      "float eps, float grad_scale, bool maximize) -> ()");
  m.def("compact_gradient_(Tensor(a!) compact, Tensor grad, Tensor work, Tensor? index, *, bool accumulate) -> ()");
}

PyMODINIT_FUNC PyInit__C(void) {
  static PyModuleDef module = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr};
  return PyModule_Create(&module);
}

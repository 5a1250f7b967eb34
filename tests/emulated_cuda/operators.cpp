// torch's CUDA operators, computed by its CPU ones: the emulated device's memory is the host's, so that a CUDA tensor
// has an alias on the CPU. As on a GPU an operator returns before it has computed anything: results get their shapes
// from a run on the meta device, and the work goes to the stream.
#include <ATen/ThreadLocalState.h>
#include <c10/cuda/CUDAFunctions.h>
#include <c10/cuda/CUDAGraphsC10Utils.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/extension.h>
#include <torch/library.h>

#include <set>

#include "operator_call.h"

extern "C" void emulated_submit(cudaStream_t, void (*)(void*), void (*)(void*), void*);

namespace {

using namespace emulated;

// The result's size depends on values, so the host waits.
const std::set<std::string> kWaiting = {
    "aten::nonzero",     "aten::masked_select",      "aten::equal",    "aten::_unique2",
    "aten::unique_dim",  "aten::unique_consecutive", "aten::bincount", "aten::repeat_interleave.Tensor",
    "aten::nonzero.out", "aten::masked_select.out"};

// Whatever modes are on when its turn comes.
template <typename W>
void submit(W work) {
  auto run = [work = std::move(work), state = at::ThreadLocalState()]() mutable {
    const at::ThreadLocalStateGuard as_launched(state);
    work();
  };
  using Run = decltype(run);
  emulated_submit(
      c10::cuda::getCurrentCUDAStream(), [](void* r) { (*static_cast<Run*>(r))(); },
      [](void* r) { delete static_cast<Run*>(r); }, new Run(std::move(run)));
}

void wait(const std::string& what) {
  TORCH_CHECK(c10::cuda::currentStreamCaptureStatusMayInitCtx() == c10::cuda::CaptureStatus::None, what,
              ": operation not permitted when stream is capturing");
  c10::cuda::warn_or_error_on_sync();
  c10::cuda::getCurrentCUDAStream().synchronize();
}

// Without a run on meta, though its size does not depend on values: it runs at once too, on what is there.
const std::string kShapedByRun = "aten::_slow_conv2d_forward";

std::vector<at::Tensor> flat(const Stack& results) {
  std::vector<at::Tensor> all;
  const auto add = [&](const at::Tensor& t) { return all.push_back(t), t; };
  for (const IValue& value : results) converted(value, add, at::kCPU);
  return all;
}

void fill(const Made& made, const Stack& results) {
  const at::AutoDispatchBelowAutograd guard;
  const std::vector<at::Tensor> values = flat(results);
  for (const auto& [place, to] : made) {
    if (values[place].defined()) to.copy_(values[place]);  // meta also makes gradients that nobody asked for
  }
}

void emulate(const c10::OperatorHandle& op, Stack* stack) {
  const auto& schema = op.schema();
  const std::string name = toString(op.operator_name());
  const Stack given = torch::jit::pop(*stack, schema.arguments().size());
  Made made;
  Call call(op, given);
  std::optional<Stack> results;
  if (kWaiting.count(name) == 0) results = call.makes_nothing() ? call.written() : call.run_on_meta();
  if (name == kShapedByRun) results = call.run();
  if (!results.has_value()) {
    wait(name);
    const Stack computed = call.run();
    const Stack out = call.on_cuda(computed, made);
    fill(made, computed);
    stack->insert(stack->end(), out.begin(), out.end());
    return;
  }
  const Stack out = call.on_cuda(*results, made);
  call.let_go();
  submit([call, made] { fill(made, call.run()); });
  stack->insert(stack->end(), out.begin(), out.end());
}

// An empty `out=` takes its size from the result, which an alias cannot.
bool grows(const c10::OperatorHandle& op, const Stack& given) {
  for (size_t n = 0; n < given.size(); ++n) {
    if (op.schema().arguments()[n].is_out() && given[n].isTensor() && given[n].toTensor().numel() == 0) return true;
  }
  return false;
}

// It is resized here, to what meta says.
void grow(const c10::OperatorHandle& op, Stack& given) {
  const at::AutoDispatchBelowAutograd guard;
  Stack stack;
  std::vector<std::pair<at::Tensor, at::Tensor>> outs;
  for (size_t n = 0; n < given.size(); ++n) {
    stack.push_back(converted(given[n], meta_of, at::kMeta));
    if (op.schema().arguments()[n].is_out() && given[n].isTensor()) {
      outs.emplace_back(given[n].toTensor(), stack.back().toTensor());
    }
  }
  op.callBoxed(&stack);
  for (const auto& [cuda, meta] : outs) {
    if (cuda.sizes() != meta.sizes()) cuda.resize_(meta.sizes());
  }
}

void kernel(const c10::OperatorHandle& op, c10::DispatchKeySet, Stack* stack) {
  const size_t count = op.schema().arguments().size();
  Stack given(stack->end() - static_cast<int64_t>(count), stack->end());
  if (grows(op, given)) grow(op, given);
  emulate(op, stack);
}

at::Tensor& copy(at::Tensor& self, const at::Tensor& source, bool non_blocking) {
  const at::AutoDispatchBelowAutograd guard;
  const at::Tensor& host = self.is_cuda() ? source : self;
  const bool waits = !host.is_cuda() && !(non_blocking && host.is_pinned()) && host.numel() > 0;
  submit([to = on_cpu(self), from = on_cpu(source)] {
    const at::AutoDispatchBelowAutograd guard;
    to.copy_(from);
  });
  if (waits) wait("aten::copy_");
  return self;
}

// Attention in its plain form: the fused ones have no counterpart on the CPU.
int64_t choose_math(const at::Tensor&, const at::Tensor&, const at::Tensor&, const std::optional<at::Tensor>&, double,
                    bool, std::optional<double>, bool) {
  return 0;
}

// Replaces what has a CUDA kernel and a CPU one, but for `left`, which launch none.
void install(const std::vector<std::string>& left) {
  static torch::Library aten(torch::Library::IMPL, "aten", c10::DispatchKey::CUDA, __FILE__, __LINE__);
  aten.impl("copy_", copy);
  aten.impl("_fused_sdp_choice", choose_math);
  std::set<std::string> done(left.begin(), left.end());
  done.insert({"copy_", "_fused_sdp_choice"});
  for (const auto& name : c10::Dispatcher::singleton().getAllOpNames()) {
    const std::string full = toString(name), inner = full.substr(full.find(':') + 2);
    const auto op = c10::Dispatcher::singleton().findSchema(name);
    if (!op.has_value() || full.rfind("aten::", 0) != 0 || done.count(inner) != 0) continue;
    if (op->hasKernelForDispatchKey(c10::DispatchKey::CUDA) &&
        op->hasComputedKernelForDispatchKey(c10::DispatchKey::CPU)) {
      aten.impl(inner.c_str(), torch::CppFunction::makeFromBoxedFunction<kernel>());
    }
  }
}

void submit_python(py::function work) {
  submit([owned = std::shared_ptr<py::function>(new py::function(std::move(work)), [](py::function* f) {
            const py::gil_scoped_acquire gil;
            delete f;
          })] {
    const py::gil_scoped_acquire gil;
    (*owned)();
  });
}

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.def("install", &install);
  m.def("submit", &submit_python);
  m.def("on_cpu", &on_cpu);
}

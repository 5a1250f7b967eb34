// One call of an operator on the emulated device: its arguments on the CPU, its results on CUDA.
#pragma once

#include <ATen/ATen.h>
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/dispatch/Dispatcher.h>

#include <algorithm>
#include <optional>
#include <utility>
#include <vector>

namespace emulated {

using c10::IValue;
using torch::jit::Stack;
using Convert = std::function<at::Tensor(const at::Tensor&)>;
using Made = std::vector<std::pair<size_t, at::Tensor>>;  // place among the results, alias of the new tensor

// The device's memory is the host's.
inline at::Tensor on_cpu(const at::Tensor& t) {
  if (!t.defined() || !t.is_cuda()) return t;
  const auto options = t.options().device(at::kCPU);
  if (t._is_zerotensor()) return at::_efficientzerotensor(t.sizes(), options);
  void* const begin = t.numel() == 0 ? nullptr : t.storage().mutable_data();
  void* const data = begin == nullptr ? nullptr : static_cast<char*>(begin) + t.storage_offset() * t.itemsize();
  const at::Tensor alias = at::from_blob(data, t.sizes(), t.strides(), options);
  alias._set_conj(t.is_conj());
  alias._set_neg(t.is_neg());
  return alias;
}

// A tensor's shape without its values.
inline at::Tensor meta_of(const at::Tensor& t) {
  return t.defined() ? at::empty_strided(t.sizes(), t.strides(), t.options().device(at::kMeta)) : t;
}

// The tensors in an argument or result, and its device, replaced.
inline IValue converted(const IValue& value, const Convert& convert, at::DeviceType device) {
  if (value.isTensor()) return convert(value.toTensor());
  if (value.isTensorList()) {
    c10::List<at::Tensor> list;
    for (const at::Tensor& t : value.toTensorVector()) list.push_back(convert(t));
    return list;
  }
  if (value.isOptionalTensorList()) {
    c10::List<std::optional<at::Tensor>> list;
    for (const std::optional<at::Tensor>& t : value.toOptionalTensorVector()) {
      list.push_back(t.has_value() ? std::optional(convert(*t)) : t);
    }
    return list;
  }
  if (value.isDevice() && value.toDevice().is_cuda()) return c10::Device(device);
  return value.isGenerator() ? IValue() : value;
}

// A seed for one run of a random operator, from the CUDA generator as it is at the launch.
inline uint64_t seed_of(const Stack& given) {
  at::Generator generator = at::globalContext().defaultGenerator(c10::Device(at::kCUDA, 0));
  for (const IValue& value : given) {
    if (value.isGenerator()) generator = value.toGenerator();
  }
  const std::lock_guard lock(generator.mutex());
  const uint64_t offset = generator.get_offset();
  generator.set_offset(offset + 4);
  return generator.current_seed() * 0x9e3779b97f4a7c15 + offset;
}

// The CPU's generator is seeded for a while.
class Seeded {
 public:
  explicit Seeded(std::optional<uint64_t> seed) {
    if (!seed.has_value()) return;
    before_ = generator_.get_state();
    generator_.set_current_seed(*seed);
  }
  ~Seeded() {
    if (before_.defined()) generator_.set_state(before_);
  }

 private:
  at::Generator generator_ = at::detail::getDefaultCPUGenerator();
  at::Tensor before_;
};

// A call of an operator: its arguments on the CPU, and which CUDA tensor each of them, or of those on meta, stands for.
class Call {
 public:
  Call(const c10::OperatorHandle& op, const Stack& given) : op_(op) {
    if (op.hasTag(at::Tag::nondeterministic_seeded)) seed_ = seed_of(given);
    for (const IValue& value : given) {
      arguments_.push_back(converted(value, [this](const at::Tensor& t) { return argument(t); }, at::kCPU));
    }
  }

  bool is_written(size_t n) const {
    const auto* const info = op_.schema().arguments()[n].alias_info();
    return info != nullptr && info->isWrite();
  }

  // Whether nothing comes out but tensors that were given.
  bool makes_nothing() const {
    for (const auto& result : op_.schema().returns()) {
      if (result.alias_info() == nullptr || !result.alias_info()->isWrite()) return false;
    }
    return true;
  }

  Stack written() const {
    Stack results;
    for (size_t n = 0; n < arguments_.size() && results.size() < op_.schema().returns().size(); ++n) {
      if (is_written(n)) results.push_back(arguments_[n]);
    }
    return results;
  }

  Stack run() const {
    const at::AutoDispatchBelowAutograd guard;
    const Seeded random(seed_);
    Stack stack = arguments_;
    op_.callBoxed(&stack);
    return stack;
  }

  // The results without their values; nullopt if the operator has no such run.
  std::optional<Stack> run_on_meta() {
    const at::AutoDispatchBelowAutograd guard;
    const auto shape = [this](const at::Tensor& t) {
      const bool of_cuda =
          std::any_of(known_.begin(), known_.end(), [&](const auto& one) { return one.first.is_same(t); });
      return of_cuda ? remember(t, meta_of(t)) : t;
    };
    Stack stack;
    for (const IValue& value : arguments_) stack.push_back(converted(value, shape, at::kMeta));
    try {
      op_.callBoxed(&stack);
    } catch (const std::exception&) {
      return std::nullopt;
    }
    return stack;
  }

  // The CUDA tensors for results of `run` or `run_on_meta`; `made` gets the aliases of new ones with their places.
  Stack on_cuda(const Stack& results, Made& made) const {
    size_t place = 0;
    Stack stack;
    const auto back = [&](const at::Tensor& t) {
      const size_t here = place++;
      if (!t.defined()) return t;
      for (const auto& [stands, cuda] : known_) {
        if (stands.is_same(t)) return cuda;
      }
      const at::Tensor fresh = at::empty_strided(t.sizes(), t.strides(), t.options().device(at::kCUDA));
      made.emplace_back(here, on_cpu(fresh));
      return fresh;
    };
    for (const IValue& value : results) stack.push_back(converted(value, back, at::kCUDA));
    return stack;
  }

  // Before it waits for its turn: the allocator hands memory on in the order of the stream, whoever still reads it.
  void let_go() { known_.clear(); }

 private:
  at::Tensor argument(const at::Tensor& t) {
    if (!t.defined()) return t;
    if (!t.is_cpu()) return remember(t, on_cpu(t));
    const bool indexes = op_.operator_name().name.find("index") != std::string::npos;
    TORCH_CHECK(t.dim() == 0 || indexes, op_.operator_name(), ": Expected all tensors to be on the same device");
    const at::Tensor number = t.clone();  // one of the host's counts as it is at the launch
    if (t.unsafeGetTensorImpl()->is_wrapped_number()) number.unsafeGetTensorImpl()->set_wrapped_number(true);
    return number;
  }

  at::Tensor remember(const at::Tensor& t, const at::Tensor& stands) {
    at::Tensor cuda = t;
    for (const auto& [other, its] : known_) {
      if (other.is_same(t)) cuda = its;
    }
    if (cuda.is_cuda()) known_.emplace_back(stands, cuda);
    return stands;
  }

  c10::OperatorHandle op_;
  Stack arguments_;
  std::optional<uint64_t> seed_;
  std::vector<std::pair<at::Tensor, at::Tensor>> known_;
};

}  // namespace emulated

// The CPU implementation of compact_gradient_: the selected entries of a dense gradient, gathered or added.
//
// The gradient is read a block of the work table at a time, right after the backward pass wrote it. Each compact entry
// belongs to one row, so rows run on any number of threads with one result.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "check.h"
#include "isa.h"
#include "selection.h"

namespace talos {
namespace {

// Rows that one thread takes at a time: some 10 microseconds of work.
constexpr int64_t kRowsAtOnce = 32;

// T: gradient; A: compact gradient.
template <typename T, typename A>
struct CompactTensor {
  A* compact;
  const T* grad;
  const void* index;
  Encoding encoding;
  bool accumulate;
};

// `place` maps an entry of the row to its element.
template <typename T, typename A, typename Place>
TALOS_SHARED void compact_row(A* __restrict compact, const T* __restrict grad, int64_t count, bool accumulate,
                              Place place) {
  if (accumulate) {
    for (int64_t i = 0; i < count; ++i) compact[i] += static_cast<A>(grad[place(i)]);
  } else {
    for (int64_t i = 0; i < count; ++i) compact[i] = static_cast<A>(grad[place(i)]);
  }
}

// A tile of bits: read as a stream with AVX-512, decoded to offsets elsewhere.
template <typename Isa, typename T, typename A>
TALOS_SHARED void compact_tile(A* compact, const T* grad, const uint8_t* bits, int64_t count, bool accumulate) {
  if constexpr (Isa::kBytes == 64) {
    T packed[kBlock + kSlack];
    const int64_t found = compress(Isa{}, grad, bits, kBlock, packed);
    compact_row(compact, packed, found < count ? found : count, accumulate,
                [](int64_t i) __attribute__((always_inline)) { return i; });
  } else {
    uint16_t offsets[kBlock + kSlack];
    const int64_t found = decode_bits(bits, kBlock, offsets);
    compact_row(compact, grad, found < count ? found : count, accumulate,
                [&](int64_t i) __attribute__((always_inline)) { return int32_t{offsets[i]}; });
  }
}

template <typename Isa, typename T, typename A>
TALOS_SHARED void compact_rows(const CompactTensor<T, A>& tensor, const Row* rows, int64_t count) {
  for (const Row* row = rows; row < rows + count; ++row) {
    A* const compact = tensor.compact + row->first;
    const T* const grad = tensor.grad + row->base;
    if (tensor.encoding == Encoding::kRuns) {
      compact_row(compact, grad, row->count, tensor.accumulate,
                  [](int64_t i) __attribute__((always_inline)) { return i; });
    } else if (tensor.encoding == Encoding::kBits) {
      const uint8_t* const bits = static_cast<const uint8_t*>(tensor.index) + row->at;
      compact_tile<Isa>(compact, grad, bits, row->count, tensor.accumulate);
    } else {
      const uint16_t* const offsets = static_cast<const uint16_t*>(tensor.index) + row->at;
      compact_row(compact, grad, row->count, tensor.accumulate,
                  [=](int64_t i) __attribute__((always_inline)) { return int32_t{offsets[i]}; });
    }
  }
}

template <typename T, typename A>
void compact_portable(const CompactTensor<T, A>& tensor, const Row* rows, int64_t count) {
  compact_rows<Portable>(tensor, rows, count);
}

#if defined(__x86_64__)
template <typename T, typename A>
TALOS_AVX2 void compact_avx2(const CompactTensor<T, A>& tensor, const Row* rows, int64_t count) {
  compact_rows<Avx2>(tensor, rows, count);
}

template <typename T, typename A>
TALOS_AVX512 void compact_avx512(const CompactTensor<T, A>& tensor, const Row* rows, int64_t count) {
  compact_rows<Avx512>(tensor, rows, count);
}
#endif

template <typename T, typename A>
auto choose_compact() {
#if defined(__x86_64__)
  const CpuCapability capability = cpu_capability();
  if (capability == CpuCapability::kAvx512) return compact_avx512<T, A>;
  if (capability == CpuCapability::kAvx2) return compact_avx2<T, A>;
#endif
  return compact_portable<T, A>;
}

void compact_gradient_cpu(Tensor compact, Tensor grad, Tensor work, std::optional<Tensor> index, bool accumulate) {
  const ScalarType type = grad.scalar_type();
  STD_TORCH_CHECK(is_supported(type), "grad must be float32, float64, bfloat16 or float16");
  STD_TORCH_CHECK(compact.scalar_type() == (type == ScalarType::Double ? type : ScalarType::Float),
                  "compact must be float64 for float64 gradients, else float32");
  STD_TORCH_CHECK(compact.is_contiguous() && grad.is_contiguous(), "compact and grad must be contiguous");
  check_work(work);
  const Row* const rows = reinterpret_cast<const Row*>(work.const_data_ptr<int64_t>());
  check_stray(find_stray(rows, work.size(0), {grad.numel(), compact.numel(), index}));
  int64_t covered = 0;
  for (int64_t r = 0; r < work.size(0); ++r) covered += rows[r].count;
  STD_TORCH_CHECK(covered == compact.numel(), "work covers ", covered, " entries, compact has ", compact.numel());

  auto go = [&](auto element, auto arithmetic) {
    using T = decltype(element);
    using A = decltype(arithmetic);
    static const auto gather = choose_compact<T, A>();
    const CompactTensor<T, A> tensor{compact.mutable_data_ptr<A>(), static_cast<const T*>(grad.const_data_ptr()),
                                     index.has_value() ? index->const_data_ptr() : nullptr, encoding_of(index),
                                     accumulate};
    torch::stable::parallel_for(0, work.size(0), kRowsAtOnce,
                                [&](int64_t begin, int64_t end) { gather(tensor, rows + begin, end - begin); });
  };
  for_type(type, go);
}

}  // namespace
}  // namespace talos

STABLE_TORCH_LIBRARY_IMPL(talos_fast, CPU, m) { m.impl("compact_gradient_", TORCH_BOX(&talos::compact_gradient_cpu)); }

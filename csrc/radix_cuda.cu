// The CUDA implementation of radix_histogram_: each block counts in shared memory and adds its counts to the whole's.
// Atomics of integers: the result is the same in any order.
#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/ops.h>

#include "check.h"
#include "radix.h"

namespace talos {

constexpr int kRadixThreads = 512;
constexpr int kNotCounted = kCounts;  // the bin of an entry that is not counted

__device__ int bin_of(uint32_t entry, const Digit& digit, bool first) {
  if (first && !is_score(entry)) return kInvalid;
  return digit.matches(entry) ? static_cast<int>(digit.bin(entry)) : kNotCounted;
}

// Long runs of equal scores are common (zeros, and infinity where an entry is out already), and 32 additions to one
// place would wait for each other: then one lane adds them all.
__device__ void count_warp(uint32_t* counts, int bin) {
  const int leader = __shfl_sync(0xffffffffu, bin, 0);
  if (__all_sync(0xffffffffu, bin == leader)) {
    if (bin != kNotCounted && threadIdx.x % 32 == 0) atomicAdd(&counts[bin], 32);
  } else if (bin != kNotCounted) {
    atomicAdd(&counts[bin], 1);
  }
}

__global__ void __launch_bounds__(kRadixThreads)
    radix_histogram(unsigned long long* counts, const uint32_t* entries, int64_t count, Digit digit, bool first) {
  __shared__ uint32_t own[kCounts];
  for (int b = threadIdx.x; b < kCounts; b += kRadixThreads) own[b] = 0;
  __syncthreads();
  const int64_t stride = int64_t{gridDim.x} * kRadixThreads;
  // All lanes of a warp take every step: they vote.
  for (int64_t begin = int64_t{blockIdx.x} * kRadixThreads; begin < count; begin += stride) {
    const int64_t e = begin + threadIdx.x;
    count_warp(own, e < count ? bin_of(entries[e], digit, first) : kNotCounted);
  }
  __syncthreads();
  for (int b = threadIdx.x; b < kCounts; b += kRadixThreads) {
    if (own[b] != 0) atomicAdd(&counts[b], static_cast<unsigned long long>(own[b]));
  }
}

void radix_histogram_cuda(Tensor counts, Tensor scores, int64_t digit, int64_t prefix) {
  check_radix_histogram(counts, scores, digit);
  if (scores.numel() == 0) return;
  const torch::stable::accelerator::DeviceGuard guard(scores.get_device_index());
  void* current = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(scores.get_device_index(), &current));
  int multiprocessors = 0;
  STD_CUDA_CHECK(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, scores.get_device_index()));
  const int64_t wanted = tile_count(scores.numel(), kRadixThreads), most = int64_t{multiprocessors} * 4;
  radix_histogram<<<static_cast<unsigned>(wanted < most ? wanted : most), kRadixThreads, 0,
                    static_cast<cudaStream_t>(current)>>>(
      reinterpret_cast<unsigned long long*>(counts.mutable_data_ptr<int64_t>()),
      static_cast<const uint32_t*>(scores.const_data_ptr()), scores.numel(),
      Digit(static_cast<int>(digit), static_cast<uint32_t>(prefix)), digit == 0);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

}  // namespace talos

STABLE_TORCH_LIBRARY_IMPL(talos_fast, CUDA, m) { m.impl("radix_histogram_", TORCH_BOX(&talos::radix_histogram_cuda)); }

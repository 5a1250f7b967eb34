// What the CUDA sources need to be compiled for the CPU, as libraries.py rewrites them: a launch is work in its
// stream, that runs its blocks one after the other, and the threads of a block as fibers (emulated_block.h).
#pragma once

#include <cuda_runtime_api.h>

#include <algorithm>
#include <limits>
#include <stdexcept>

#include "../emulated_gpu.h"

#undef __global__
#undef __device__
#undef __shared__
#undef __launch_bounds__
#undef __grid_constant__
#undef __align__
#define __global__
#define __device__
#define __shared__ static  // blocks run one after the other; the next finds what this one left
#define __launch_bounds__(...)
#define __grid_constant__
#define __align__(bytes) __attribute__((aligned(bytes)))

extern "C" void emulated_submit(cudaStream_t, void (*)(void*), void (*)(void*), void*);

namespace emulated {

// The thread that runs.
struct Here {
  Block* block;
  dim3 grid, threads, index;
};
inline thread_local Here here;

inline Block& block() { return *here.block; }

template <typename Call>
void run_grid(const Call& call, dim3 grid, dim3 threads, size_t shared) {
  const Range everything{nullptr, std::numeric_limits<int64_t>::max()};
  for (unsigned y = 0; y < grid.y; ++y) {
    for (unsigned x = 0; x < grid.x; ++x) {
      Block gpu(static_cast<int>(threads.x), static_cast<int>(shared), {true, (x + y) % 2 != 0, {everything}});
      here = {&gpu, grid, threads, dim3(x, y)};
      gpu.run([&](int) { call(); });
      if (!gpu.error.empty()) throw std::runtime_error(gpu.error);
    }
  }
}

inline size_t most_shared = 48 << 10;  // bytes that a launch gets; more only after cudaFuncSetAttribute

// launch(kernel, grid, threads, shared, stream)(arguments...) stands for kernel<<<...>>>(arguments...).
template <typename Kernel>
auto launch(Kernel kernel, dim3 grid, dim3 threads, size_t shared, cudaStream_t stream) {
  const bool fits = grid.x > 0 && grid.x < 1u << 31 && grid.y > 0 && grid.y < 1u << 16 && threads.x > 0 &&
                    threads.x <= 1024 && shared <= most_shared;
  if (!fits) throw std::runtime_error("invalid configuration argument");
  return [=](auto... arguments) {
    auto work = [=] { run_grid([&] { kernel(arguments...); }, grid, threads, shared); };
    emulated_submit(
        stream, [](void* w) { (*static_cast<decltype(work)*>(w))(); },
        [](void* w) { delete static_cast<decltype(work)*>(w); }, new decltype(work)(std::move(work)));
  };
}

struct ThreadIndex {
  struct Coordinate {
    operator unsigned() const { return static_cast<unsigned>(block().thread()); }
  } x;
};

}  // namespace emulated

inline constexpr emulated::ThreadIndex threadIdx;
#define blockIdx emulated::here.index
#define blockDim emulated::here.threads
#define gridDim emulated::here.grid

inline void __syncthreads() { emulated::block().sync(); }

inline int __shfl_sync(unsigned, int value, int lane) {
  return static_cast<int>(emulated::block().exchange(static_cast<uint32_t>(value))[lane]);
}

inline int __all_sync(unsigned, int holds) {
  const auto votes = emulated::block().exchange(static_cast<uint32_t>(holds != 0));
  return std::all_of(votes.begin(), votes.end(), [](uint32_t vote) { return vote != 0; });
}

template <typename T, typename U>
T atomicAdd(T* to, U value) {
  const T before = *to;
  *to += static_cast<T>(value);
  return before;
}

template <typename Kernel>
cudaError_t cudaFuncSetAttribute(Kernel*, cudaFuncAttribute attribute, int value) {
  const bool fits = attribute == cudaFuncAttributeMaxDynamicSharedMemorySize && value <= 227 << 10;
  if (fits) emulated::most_shared = std::max(emulated::most_shared, static_cast<size_t>(value));
  return fits ? cudaSuccess : cudaErrorInvalidValue;
}

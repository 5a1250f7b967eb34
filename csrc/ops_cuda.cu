// The CUDA implementation, in a library of its own so that torch without CUDA never has to load it.
//
// One block owns one tile of scores and walks over samples (outside) and tokens (inside): products and
// squares stay in registers, no block writes another's entries, so there are no atomics and the result
// is deterministic. Plain fp32 (or fp64) FMA on shared-memory tiles: right on every GPU from sm_80.
#include <Python.h>

#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/core/Dispatch_v2.h>

#include "check.h"
#include "squared.h"

namespace talos {

constexpr int kTile = 64;      // scores of one block: kTile x kTile
constexpr int kTokens = 16;    // tokens in shared memory at a time
constexpr int kPerThread = 4;  // scores of one thread: kPerThread x kPerThread
constexpr int kSide = kTile / kPerThread;
constexpr int kThreads = kSide * kSide;

// from (tokens, stride), columns [begin, begin + inside) -> to (kTokens, kTile), zeros outside.
template <typename A, typename T>
__device__ void load_tile(A (&to)[kTokens][kTile], const T* from, int64_t stride, int64_t tokens, int64_t inside) {
  for (int e = threadIdx.x; e < kTokens * kTile; e += kThreads) {
    const int t = e / kTile, c = e % kTile;
    to[t][c] = t < tokens && c < inside ? static_cast<A>(from[t * stride + c]) : A(0);
  }
}

template <typename A, typename T>
__global__ void __launch_bounds__(kThreads)
    accumulate_kernel(A* scores, const T* inputs, const T* grads, Shape shape, int64_t across) {
  __shared__ A input[kTokens][kTile], grad[kTokens][kTile];
  const int64_t out = blockIdx.x / across * kTile, in = blockIdx.x % across * kTile;
  const int row = threadIdx.x / kSide * kPerThread, col = threadIdx.x % kSide * kPerThread;
  A squares[kPerThread][kPerThread] = {};
  for (int64_t n = 0; n < shape.samples; ++n) {
    A products[kPerThread][kPerThread] = {};
    for (int64_t begin = 0; begin < shape.tokens; begin += kTokens) {
      const int64_t token = n * shape.tokens + begin, tokens = tile_extent(begin, shape.tokens, kTokens);
      load_tile(input, inputs + token * shape.ins + in, shape.ins, tokens, shape.ins - in);
      load_tile(grad, grads + token * shape.outs + out, shape.outs, tokens, shape.outs - out);
      __syncthreads();
      for (int t = 0; t < kTokens; ++t) {
        A x[kPerThread];
        for (int c = 0; c < kPerThread; ++c) x[c] = input[t][col + c];
        add_outer_product(products, &grad[t][row], x);
      }
      __syncthreads();
    }
    add_squares(squares, products);
  }
  for (int r = 0; r < kPerThread; ++r) {
    for (int c = 0; c < kPerThread; ++c) {
      if (out + row + r < shape.outs && in + col + c < shape.ins) {
        scores[(out + row + r) * shape.ins + in + col + c] += squares[r][c];
      }
    }
  }
}

template <typename A, typename T>
void launch(const Tensor& scores, const Tensor& inputs, const Tensor& grads, const Shape& shape, cudaStream_t stream) {
  const int64_t across = tile_count(shape.ins, kTile);
  const auto blocks = static_cast<unsigned>(tile_count(shape.outs, kTile) * across);
  accumulate_kernel<<<blocks, kThreads, 0, stream>>>(scores.mutable_data_ptr<A>(), inputs.const_data_ptr<T>(),
                                                     grads.const_data_ptr<T>(), shape, across);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

// A function of its own: commas between template arguments would split the dispatch macro's arguments.
template <typename T>
void launch_for(const Tensor& scores, const Tensor& inputs, const Tensor& grads, const Shape& shape,
                cudaStream_t stream) {
  if (scores.scalar_type() == ScalarType::Double) {
    launch<double, T>(scores, inputs, grads, shape, stream);
  } else {
    launch<float, T>(scores, inputs, grads, shape, stream);
  }
}

void accumulate_squared_per_sample_cuda(Tensor scores, Tensor inputs, Tensor grad_outputs) {
  const Shape shape = check_accumulate_squared(scores, inputs, grad_outputs);
  if (is_empty(shape)) return;
  const torch::stable::accelerator::DeviceGuard guard(scores.get_device_index());
  void* current = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(scores.get_device_index(), &current));
  const auto stream = static_cast<cudaStream_t>(current);
  const Tensor x = torch::stable::contiguous(inputs), g = torch::stable::contiguous(grad_outputs);
  THO_DISPATCH_V2(x.scalar_type(), "accumulate_squared_per_sample_",
                  AT_WRAP([&] { launch_for<scalar_t>(scores, x, g, shape, stream); }), ScalarType::Float,
                  ScalarType::Double, ScalarType::Half, ScalarType::BFloat16);
}

}  // namespace talos

STABLE_TORCH_LIBRARY_IMPL(talos_fast, CUDA, m) {
  m.impl("accumulate_squared_per_sample_", TORCH_BOX(&talos::accumulate_squared_per_sample_cuda));
}

PyMODINIT_FUNC PyInit__C_cuda(void) {
  static PyModuleDef module = {PyModuleDef_HEAD_INIT, "_C_cuda", nullptr, -1, nullptr};
  return PyModule_Create(&module);
}

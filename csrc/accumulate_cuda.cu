// The CUDA implementation of accumulate_squared_per_sample_, in a library of its own so that torch without CUDA never
// has to load it. fp32 scores of fp32, bfloat16 or float16 operands go to the tensor cores (mma_tile.h); float64 scores
// or operands to plain FMA on shared-memory tiles. Both are right on every GPU from sm_80.
#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/ops.h>

#include <optional>

#include "check.h"
#include "cuda_machine.h"
#include "mma_tile.h"

namespace talos {

template <typename Kind>
__global__ void __launch_bounds__(mma::kThreads, 1) accumulate_mma(const __grid_constant__ mma::Arguments args) {
  extern __shared__ __align__(16) unsigned char shared[];
  CudaMachine machine(shared);
  mma::accumulate_tile<Kind>(machine, args, blockIdx.x, blockIdx.y);
}

// In the order of the parts, so the sum does not depend on which block was first.
__global__ void add_parts(float* scores, const float* parts, int64_t entries, int64_t splits, const float* scale) {
  const int64_t e = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  if (e >= entries) return;
  float sum = 0;
  for (int64_t split = 0; split < splits; ++split) sum += parts[split * entries + e];
  scores[e] += (scale == nullptr ? 1.0f : *scale) * sum;
}

constexpr int kFmaTile = 64;    // scores of one block: kFmaTile x kFmaTile
constexpr int kFmaTokens = 16;  // tokens in shared memory at a time
constexpr int kPerThread = 4;   // scores of one thread: kPerThread x kPerThread
constexpr int kSide = kFmaTile / kPerThread;

// Tokens of one sample, features [begin, begin + inside) -> (kFmaTokens, kFmaTile), zeros outside.
template <typename A>
__device__ void load_tile(A (&to)[kFmaTokens][kFmaTile], const double* from, const Strides& strides, int64_t tokens,
                          int64_t inside) {
  for (int e = threadIdx.x; e < kFmaTokens * kFmaTile; e += kSide * kSide) {
    const int t = e / kFmaTile, c = e % kFmaTile;
    to[t][c] = t < tokens && c < inside ? static_cast<A>(from[t * strides.token + c * strides.feature]) : A(0);
  }
}

template <typename A>
__global__ void __launch_bounds__(kSide* kSide)
    accumulate_fma(A* scores, const double* inputs, Strides x, const double* grads, Strides g, Shape shape,
                   const A* scale) {
  __shared__ A input[kFmaTokens][kFmaTile], grad[kFmaTokens][kFmaTile];
  const int64_t across = tile_count(shape.ins, kFmaTile);
  const int64_t out = blockIdx.x / across * kFmaTile, in = blockIdx.x % across * kFmaTile;
  const int row = threadIdx.x / kSide * kPerThread, col = threadIdx.x % kSide * kPerThread;
  A squares[kPerThread][kPerThread] = {};
  for (int64_t n = 0; n < shape.samples; ++n) {
    A products[kPerThread][kPerThread] = {};
    for (int64_t t = 0; t < shape.tokens; t += kFmaTokens) {
      const int64_t tokens = tile_extent(t, shape.tokens, kFmaTokens);
      load_tile(input, inputs + n * x.sample + t * x.token + in * x.feature, x, tokens, shape.ins - in);
      load_tile(grad, grads + n * g.sample + t * g.token + out * g.feature, g, tokens, shape.outs - out);
      __syncthreads();
      for (int step = 0; step < kFmaTokens; ++step) {
        A values[kPerThread];
        for (int c = 0; c < kPerThread; ++c) values[c] = input[step][col + c];
        add_outer_product(products, &grad[step][row], values);
      }
      __syncthreads();
    }
    add_squares(squares, products);
  }
  const A factor = scale == nullptr ? A(1) : *scale;
  for (int r = 0; r < kPerThread; ++r) {
    for (int c = 0; c < kPerThread; ++c) {
      if (out + row + r < shape.outs && in + col + c < shape.ins) {
        scores[(out + row + r) * shape.ins + in + col + c] += factor * squares[r][c];
      }
    }
  }
}

template <typename A>
void launch_fma(const Tensor& scores, const Tensor& inputs, const Tensor& grads, const std::optional<Tensor>& scale,
                const Shape& shape, cudaStream_t stream) {
  const auto blocks = static_cast<unsigned>(tile_count(shape.outs, kFmaTile) * tile_count(shape.ins, kFmaTile));
  accumulate_fma<A><<<blocks, kSide * kSide, 0, stream>>>(
      scores.mutable_data_ptr<A>(), inputs.const_data_ptr<double>(), strides_of(inputs), grads.const_data_ptr<double>(),
      strides_of(grads), shape, scale.has_value() ? scale->const_data_ptr<A>() : nullptr);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

int64_t multiprocessors(int32_t device) {
  int count = 0;
  STD_CUDA_CHECK(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device));
  return count;
}

template <typename Kind>
void launch_mma(const Tensor& scores, const Tensor& inputs, const Tensor& grads, const std::optional<Tensor>& scale,
                const Shape& shape, cudaStream_t stream) {
  constexpr int kShared = mma::kSharedBytes<Kind>;
  const int64_t tiles = tile_count(shape.outs, mma::kTile) * tile_count(shape.ins, mma::kTile);
  const int64_t splits = mma::choose_splits(tiles, shape.samples, multiprocessors(scores.get_device_index()));
  const float* const factor = scale.has_value() ? scale->const_data_ptr<float>() : nullptr;
  std::optional<Tensor> parts;
  if (splits > 1) parts = torch::stable::new_empty(scores, {splits, shape.outs, shape.ins});
  const mma::Arguments args{mma::operand_of<Kind>(grads.const_data_ptr(), strides_of(grads), shape.outs),
                            mma::operand_of<Kind>(inputs.const_data_ptr(), strides_of(inputs), shape.ins),
                            shape,
                            splits,
                            factor,
                            scores.mutable_data_ptr<float>(),
                            splits > 1 ? parts->mutable_data_ptr<float>() : nullptr};
  STD_CUDA_CHECK(cudaFuncSetAttribute(accumulate_mma<Kind>, cudaFuncAttributeMaxDynamicSharedMemorySize, kShared));
  const dim3 grid(static_cast<unsigned>(tiles), static_cast<unsigned>(splits));
  accumulate_mma<Kind><<<grid, mma::kThreads, kShared, stream>>>(args);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  if (splits == 1) return;
  const int64_t entries = shape.outs * shape.ins;
  const auto blocks = static_cast<unsigned>(tile_count(entries, 256));
  add_parts<<<blocks, 256, 0, stream>>>(args.scores, args.parts, entries, splits, factor);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

void accumulate_squared_per_sample_cuda(Tensor scores, Tensor inputs, Tensor grad_outputs,
                                        std::optional<Tensor> scale) {
  const Shape shape = check_accumulate_squared(scores, inputs, grad_outputs, scale);
  if (is_empty(shape)) return;
  const torch::stable::accelerator::DeviceGuard guard(scores.get_device_index());
  void* current = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(scores.get_device_index(), &current));
  const auto stream = static_cast<cudaStream_t>(current);
  const ScalarType type = scores.scalar_type(), from = inputs.scalar_type();
  if (type == ScalarType::Double || from == ScalarType::Double) {
    const Tensor x = torch::stable::to(inputs, ScalarType::Double);
    const Tensor g = torch::stable::to(grad_outputs, ScalarType::Double);
    const auto launch = type == ScalarType::Double ? launch_fma<double> : launch_fma<float>;
    launch(scores, x, g, scale, shape, stream);
  } else if (from == ScalarType::BFloat16) {
    launch_mma<mma::Bf16>(scores, inputs, grad_outputs, scale, shape, stream);
  } else if (from == ScalarType::Half) {
    launch_mma<mma::Fp16>(scores, inputs, grad_outputs, scale, shape, stream);
  } else {
    launch_mma<mma::Fp32>(scores, inputs, grad_outputs, scale, shape, stream);
  }
}

}  // namespace talos

STABLE_TORCH_LIBRARY_IMPL(talos_fast, CUDA, m) {
  m.impl("accumulate_squared_per_sample_", TORCH_BOX(&talos::accumulate_squared_per_sample_cuda));
}

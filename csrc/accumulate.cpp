// The CPU implementation of accumulate_squared_per_sample_.
//
// Operands are packed once, a bounded number of samples at a time, into panels of the register tile's width. Then every
// tile of scores belongs to one thread, which passes all samples over it: samples outside, register tiles inside, so
// neither (samples, outs, ins) nor (outs, ins) products are ever in memory. An entry's sum is taken in an order that
// depends on neither tiles nor threads, so the result does not either.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <optional>
#include <vector>

#include "check.h"
#include "cpu_panels.h"
#include "cpu_tile.h"

namespace talos {

constexpr int64_t kTileOuts = 96;        // a multiple of every kernel's rows
constexpr int64_t kTileIns = 256;        // a multiple of every kernel's columns
constexpr int64_t kRunTokens = 288;      // panels of more tokens than this leave the L2 cache
constexpr int64_t kTilesPerThread = 16;  // with fewer, threads wait long for the last one

// Calls work(next) until every index below `count` is taken: whichever thread is free takes the next one.
template <typename Worker>
void share_out(int64_t count, const Worker& make_worker) {
  std::atomic<int64_t> next{0};
  torch::stable::parallel_for(0, std::min<int64_t>(count, torch::stable::get_num_threads()), 1, [&](int64_t, int64_t) {
    auto work = make_worker();
    for (int64_t index; (index = next.fetch_add(1)) < count;) work(index);
  });
}

// The scores as tiles: as large as they may be, but enough of them for every thread.
struct Tiles {
  Tiles(const Shape& shape, const TileKernel& kernel, int64_t threads) : shape(shape) {
    while (threads > 1 && count() < kTilesPerThread * threads) {
      if (ins > outs && ins / 2 % kernel.cols == 0) {
        ins /= 2;
      } else if (outs / 2 % kernel.rows == 0) {
        outs /= 2;
      } else {
        break;
      }
    }
  }

  int64_t down() const { return tile_count(shape.outs, outs); }
  int64_t count() const { return down() * tile_count(shape.ins, ins); }

  Shape shape;
  int64_t outs = kTileOuts, ins = kTileIns;
};

// One call: what is added to which scores, with which kernel.
template <typename Score>
struct Call {
  Score* scores;
  Score scale;
  Shape shape;
  TileKernel kernel;
  bool squared;  // the entries are squares already, and so are their products
};

// Passes all packed samples over one tile of the scores; reused from tile to tile by one thread.
template <typename Score>
class TileWorker {
 public:
  TileWorker(const Call<Score>& call, const Tiles& tiles, const Panels& inputs, const Panels& grads, int64_t samples)
      : call_(call),
        tiles_(tiles),
        inputs_(inputs),
        grads_(grads),
        samples_(samples),
        area_(call.kernel.rows * call.kernel.cols),
        steps_(tile_count(call.shape.tokens, call.kernel.tokens_per_step)),
        run_steps_(tile_count(steps_, tile_count(call.shape.tokens, kRunTokens))),
        squares_(tiles.outs * tiles.ins),
        parked_(run_steps_ < steps_ ? squares_.size() : 0) {}

  void operator()(int64_t tile) {
    const int64_t out = tile % tiles_.down() * tiles_.outs, in = tile / tiles_.down() * tiles_.ins;
    const int64_t outs = tile_extent(out, call_.shape.outs, tiles_.outs);
    const int64_t ins = tile_extent(in, call_.shape.ins, tiles_.ins);
    std::fill(squares_.begin(), squares_.end(), Score(0));
    for (int64_t sample = 0; sample < samples_; ++sample) {
      for (int64_t step = 0; step < steps_; step += run_steps_) add_run(sample, step, out, outs, in, ins);
    }
    add_to_scores(out, outs, in, ins);
  }

 private:
  // All register tiles over one run of tokens. They lie one after another, those of one panel of inputs together.
  // Products of squares are parked where the squares are, and never squared.
  void add_run(int64_t sample, int64_t step, int64_t out, int64_t outs, int64_t in, int64_t ins) {
    const int64_t steps = tile_extent(step, steps_, run_steps_);
    const bool first = step == 0 && !call_.squared, last = step + steps == steps_ && !call_.squared;
    Score *squares = squares_.data(), *parked = call_.squared ? squares : parked_.data();
    for (int64_t c = 0; c < ins; c += call_.kernel.cols) {
      const void* const inputs = inputs_.at(sample, in + c, step);
      for (int64_t r = 0; r < outs; r += call_.kernel.rows, squares += area_, parked += area_) {
        call_.kernel.run(grads_.at(sample, out + r, step), inputs, steps, first, last, parked, squares);
      }
    }
  }

  void add_to_scores(int64_t out, int64_t outs, int64_t in, int64_t ins) const {
    const int64_t rows = call_.kernel.rows, cols = call_.kernel.cols, down = tile_count(outs, rows);
    for (int64_t r = 0; r < outs; ++r) {
      Score* const row = call_.scores + (out + r) * call_.shape.ins + in;
      for (int64_t c = 0; c < ins; c += cols) {
        const Score* const from = squares_.data() + (c / cols * down + r / rows) * area_ + r % rows * cols;
        for (int64_t i = 0; i < tile_extent(c, ins, cols); ++i) row[c + i] += call_.scale * from[i];
      }
    }
  }

  const Call<Score>& call_;
  const Tiles& tiles_;
  const Panels &inputs_, &grads_;
  int64_t samples_, area_, steps_, run_steps_;
  std::vector<Score> squares_, parked_;
};

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
  const Tiles tiles(call.shape, kernel, torch::stable::get_num_threads());
  for (int64_t first = 0; first < call.shape.samples; first += block) {
    const int64_t samples = tile_extent(first, call.shape.samples, block), split = samples * x.groups();
    share_out(split + samples * g.groups(), [&] {
      return [&](int64_t index) {
        const Bytes packed = index < split ? x.pack(first, index) : g.pack(first, index - split);
        if (call.squared) square_entries<Score>(packed);
      };
    });
    share_out(tiles.count(), [&] { return TileWorker<Score>(call, tiles, x, g, samples); });
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

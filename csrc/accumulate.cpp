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
#include <memory>
#include <mutex>
#include <new>
#include <optional>
#include <vector>

#include "check.h"
#include "cpu_tile.h"

namespace talos {

constexpr int64_t kTileOuts = 96;                  // a multiple of every kernel's rows
constexpr int64_t kTileIns = 256;                  // a multiple of every kernel's columns
constexpr int64_t kRunTokens = 288;                // panels of more tokens than this leave the L2 cache
constexpr int64_t kTilesPerThread = 16;            // with fewer, threads wait long for the last one
constexpr int64_t kWorkspace = int64_t{24} << 20;  // bytes of panels, kept from call to call

// A (samples, tokens, features) array of any strides.
struct Operand {
  const void* data;
  Strides strides;
  int64_t features, entry_bytes;
};

// Memory for panels. One of up to kWorkspace bytes is kept, because the pages of a new one cost up to a tenth of the
// sums; a call that finds it taken by another thread, or too small, gets its own.
class Workspace {
 public:
  explicit Workspace(int64_t bytes) : lock_(kept_mutex_, std::try_to_lock) {
    if (!lock_.owns_lock() || bytes > kWorkspace) {
      own_ = allocate(bytes);
    } else if (bytes > kept_bytes_) {
      kept_.reset();
      kept_bytes_ = 0;
      kept_ = allocate(bytes);
      kept_bytes_ = bytes;
    }
  }

  char* data() const { return own_ ? own_.get() : kept_.get(); }

 private:
  static constexpr std::align_val_t kCacheLine{64};  // a load across two lines costs two
  struct Free {
    void operator()(char* data) const { ::operator delete(data, kCacheLine); }
  };
  using Memory = std::unique_ptr<char, Free>;
  static Memory allocate(int64_t bytes) { return Memory(static_cast<char*>(::operator new(bytes, kCacheLine))); }

  static inline std::mutex kept_mutex_;
  static inline Memory kept_;
  static inline int64_t kept_bytes_ = 0;

  std::unique_lock<std::mutex> lock_;
  Memory own_;
};

struct Bytes {
  void* data;
  int64_t count;
};

// An operand as (samples, features / width, steps, width): for every sample, panels of `width` features, the last one
// filled up with zeros.
class Panels {
 public:
  Panels(const Operand& operand, int64_t width, Pack pack, const TileKernel& kernel, int64_t tokens)
      : operand_(operand),
        width_(width),
        tokens_(tokens),
        pack_(pack),
        across_(tile_count(operand.features, width)),
        step_bytes_(width * kernel.entry_bytes),
        bytes_(tile_count(tokens, kernel.tokens_per_step) * step_bytes_) {}

  int64_t groups() const { return tile_count(across_, kGroup); }
  int64_t sample_bytes() const { return across_ * bytes_; }
  void place(char* data) { data_ = data; }

  // Packs the index-th group of panels of the samples from `first` on; returns where it lies.
  Bytes pack(int64_t first, int64_t index) const {
    const int64_t sample = index / groups(), panel = index % groups() * kGroup, feature = panel * width_;
    const int64_t panels = tile_extent(panel, across_, kGroup);
    const int64_t offset = (first + sample) * operand_.strides.sample + feature * operand_.strides.feature;
    char* const to = data_ + (sample * across_ + panel) * bytes_;
    pack_(static_cast<const char*>(operand_.data) + offset * operand_.entry_bytes, operand_.strides, tokens_,
          tile_extent(feature, operand_.features, kGroup * width_), to);
    return {to, panels * bytes_};
  }

  const void* at(int64_t sample, int64_t feature, int64_t step) const {
    return data_ + (sample * across_ + feature / width_) * bytes_ + step * step_bytes_;
  }

 private:
  static constexpr int64_t kGroup = 16;  // panels of one piece of work

  Operand operand_;
  int64_t width_, tokens_;
  Pack pack_;
  int64_t across_, step_bytes_, bytes_;
  char* data_ = nullptr;
};

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

Strides strides_of(const Tensor& tensor) { return {tensor.stride(0), tensor.stride(1), tensor.stride(2)}; }

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

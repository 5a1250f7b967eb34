// One thread's work in the CPU kernel: tiles of the scores, and all packed samples passed over one of them.
#pragma once

#include <algorithm>

#include "cpu_panels.h"

namespace talos {

constexpr int64_t kRunTokens = 288;               // panels of more tokens than this leave the L2 cache
constexpr int64_t kKeptBytes = int64_t{1} << 20;  // panels that stay there from one pass over a tile to the next
constexpr int64_t kTilesPerThread = 16;           // with fewer, threads wait long for the last one

// The scores as tiles: as large as they may be, but enough of them for every thread.
struct Tiles {
  Tiles(const Shape& shape, const TileKernel& kernel, int64_t threads)
      : shape(shape), outs(kernel.tile.outs), ins(kernel.tile.ins) {
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
  int64_t outs, ins;
};

// Some of the scores.
struct Part {
  int64_t out, outs, in, ins;
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

// Around everything that one thread does with a kernel.
class Turn {
 public:
  explicit Turn(const TileKernel& kernel) : kernel_(kernel) {
    if (kernel_.begin != nullptr) kernel_.begin();
  }
  ~Turn() {
    if (kernel_.end != nullptr) kernel_.end();
  }
  Turn(const Turn&) = delete;
  Turn& operator=(const Turn&) = delete;

 private:
  const TileKernel& kernel_;
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
        kept_samples_(std::max<int64_t>(1, kKeptBytes / ((tiles.outs + tiles.ins) * steps_ * call.kernel.entry_bytes))),
        squares_(aligned<Score>(tiles.outs * tiles.ins)),
        parked_(run_steps_ < steps_ ? aligned<Score>(tiles.outs * tiles.ins) : nullptr),
        turn_(call.kernel) {}

  void operator()(int64_t tile) {
    const int64_t out = tile % tiles_.down() * tiles_.outs, in = tile / tiles_.down() * tiles_.ins;
    const Part whole{out, tile_extent(out, call_.shape.outs, tiles_.outs), in,
                     tile_extent(in, call_.shape.ins, tiles_.ins)};
    const Extent pass = call_.kernel.pass;
    std::fill_n(squares_.get(), tiles_.outs * tiles_.ins, Score(0));
    for (int64_t first = 0; first < samples_; first += kept_samples_) {
      for (int64_t c = 0; c < whole.ins; c += pass.ins) {
        for (int64_t r = 0; r < whole.outs; r += pass.outs) {
          const Part part{r, tile_extent(r, whole.outs, pass.outs), c, tile_extent(c, whole.ins, pass.ins)};
          add_samples(first, std::min(first + kept_samples_, samples_), whole, part);
        }
      }
    }
    add_to_scores(whole);
  }

 private:
  // Register tiles lie one after another, those of one panel of inputs together.
  int64_t register_tile(int64_t r, int64_t c) const {
    return (c / call_.kernel.cols * (tiles_.outs / call_.kernel.rows) + r / call_.kernel.rows) * area_;
  }

  void add_samples(int64_t first, int64_t end, const Part& whole, const Part& part) {
    for (int64_t sample = first; sample < end; ++sample) {
      for (int64_t step = 0; step < steps_; step += run_steps_) add_run(sample, step, whole, part);
    }
  }

  // All register tiles of a part of a tile over one run of tokens. Products of squares are parked where the squares
  // are, and never squared.
  void add_run(int64_t sample, int64_t step, const Part& whole, const Part& part) {
    const TileKernel& kernel = call_.kernel;
    const int64_t steps = tile_extent(step, steps_, run_steps_), across = tiles_.outs / kernel.rows * area_;
    const bool first = step == 0 && !call_.squared, last = step + steps == steps_ && !call_.squared;
    int64_t column = register_tile(part.out, part.in);
    for (int64_t c = part.in; c < part.in + part.ins; c += kernel.cols, column += across) {
      const void* const inputs = inputs_.at(sample, whole.in + c, step);
      Score* squares = squares_.get() + column;
      Score* parked = call_.squared ? squares : parked_.get() + column;
      for (int64_t r = part.out; r < part.out + part.outs; r += kernel.rows, squares += area_, parked += area_) {
        kernel.run(grads_.at(sample, whole.out + r, step), inputs, steps, first, last, parked, squares);
      }
    }
  }

  void add_to_scores(const Part& whole) const {
    const int64_t rows = call_.kernel.rows, cols = call_.kernel.cols;
    for (int64_t r = 0; r < whole.outs; ++r) {
      Score* const row = call_.scores + (whole.out + r) * call_.shape.ins + whole.in;
      for (int64_t c = 0; c < whole.ins; c += cols) {
        const Score* const from = squares_.get() + register_tile(r, c) + r % rows * cols;
        for (int64_t i = 0; i < tile_extent(c, whole.ins, cols); ++i) row[c + i] += call_.scale * from[i];
      }
    }
  }

  const Call<Score>& call_;
  const Tiles& tiles_;
  const Panels &inputs_, &grads_;
  int64_t samples_, area_, steps_, run_steps_, kept_samples_;
  Aligned<Score> squares_, parked_;
  Turn turn_;
};

}  // namespace talos

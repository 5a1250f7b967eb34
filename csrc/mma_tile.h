// The tensor-core kernel: one block's tile of scores, written once for the GPU and for the emulator of the CPU tests.
//
//   scores[o, i] += scale * sum_n (sum_t grads[n, t, o] * inputs[n, t, i])^2
//
// The trick is that products and their squares both stay in registers: samples outside, tokens inside, and at the end
// of a sample products are squared in place. Every score has one owner, so there are no atomics and the result is
// deterministic. One pipeline of asynchronous copies runs over all samples, without draining between them.
//
// 16-bit operands go to mma.sync as they are, with exact products and fp32 sums. An fp32 operand x is split into
// bfloat16 high = round(x) and low = round(x - high), and high*high + high*low + low*high is summed: each product is
// off by less than 2^-15 of itself, low*low up to 2^-16 and what low leaves of each operand up to 2^-17. Of operands
// below 2^-117 low is subnormal, and they lose more. NaN, infinity and what rounds beyond bfloat16 become NaN.
#pragma once

#include "mma_layout.h"

namespace talos::mma {

struct Operand {
  const void* data;
  Strides strides;
  int64_t features;
  bool aligned;  // rows of consecutive features that begin on 16 bytes
};

template <typename Kind>
Operand operand_of(const void* data, const Strides& strides, int64_t features) {
  constexpr int64_t kChunk = 16 / sizeof(typename Kind::Stored);
  const bool aligned = reinterpret_cast<uintptr_t>(data) % 16 == 0 && strides.feature == 1 &&
                       strides.token % kChunk == 0 && strides.sample % kChunk == 0;
  return {data, strides, features, aligned};
}

struct Arguments {
  Operand grads, inputs;
  Shape shape;
  int64_t splits;
  const float* scale;  // null: 1
  float* scores;       // (outs, ins), added to; or with several splits
  float* parts;        // (splits, outs, ins), written, to be added in order
};

// The part of the work that one block has.
struct Block {
  int64_t out, in, first, last;  // its tile, and its samples
  TALOS_SHARED Block(const Arguments& args, int64_t tile, int64_t split)
      : out(tile / tile_count(args.shape.ins, kTile) * kTile),
        in(tile % tile_count(args.shape.ins, kTile) * kTile),
        first(args.shape.samples * split / args.splits),
        last(args.shape.samples * (split + 1) / args.splits) {}
};

// Walks over runs of tokens, sample after sample.
template <typename Kind>
struct Cursor {
  int64_t sample, token = 0;
  TALOS_SHARED int tokens(const Shape& shape) const {
    return static_cast<int>(tile_extent(token, shape.tokens, Kind::kTokens));
  }
  TALOS_SHARED bool ends_sample(const Shape& shape) const { return token + Kind::kTokens >= shape.tokens; }
  TALOS_SHARED void advance(const Shape& shape) {
    token += Kind::kTokens;
    if (token >= shape.tokens) token = 0, ++sample;
  }
};

// Entries of 16 bits one by one: cp.async moves four bytes at least. Several are on their way before the first is
// stored, since the compiler moves no load across a store to shared memory.
template <typename Layout, typename Machine, typename Load>
TALOS_DEVICE void store_entries(Machine& machine, int rows, int shared, const Load& load) {
  static_assert(kMma * kTile % kThreads == 0, "rows come kMma at a time");
  constexpr int kBatch = kMma * kTile / kThreads;
  for (int e = machine.thread(); e < rows * kTile; e += kBatch * kThreads) {
    uint16_t entries[kBatch];
    TALOS_UNROLL
    for (int b = 0; b < kBatch; ++b) entries[b] = load((e + b * kThreads) / kTile, (e + b * kThreads) % kTile);
    TALOS_UNROLL
    for (int b = 0; b < kBatch; ++b) {
      const int t = (e + b * kThreads) / kTile, f = (e + b * kThreads) % kTile;
      machine.store_entry(shared + Layout::at(t, f) * 2, entries[b]);
    }
  }
}

// Starts copying `tokens` tokens of one operand, features [begin, begin + kTile), to shared memory; zeros where there
// are none. Rows that no instruction reads are left alone.
template <typename Kind, typename Machine>
TALOS_DEVICE void copy_operand(Machine& machine, const Operand& operand, const Cursor<Kind>& cursor, int tokens,
                               int64_t begin, int shared) {
  using Stored = typename Kind::Stored;
  using Layout = StageLayout<Stored>;
  constexpr int kSize = sizeof(Stored), kChunk = 16 / kSize;
  const int rows = (tokens + kMma - 1) / kMma * kMma;
  const Stored* const from = static_cast<const Stored*>(operand.data) + cursor.sample * operand.strides.sample +
                             cursor.token * operand.strides.token + begin * operand.strides.feature;
  const int inside = static_cast<int>(tile_extent(begin, operand.features, kTile));
  if (operand.aligned) {
    constexpr int kAcross = kTile / kChunk;
    for (int c = machine.thread(); c < rows * kAcross; c += kThreads) {
      const int t = c / kAcross, f = c % kAcross * kChunk, left = t < tokens ? inside - f : 0;
      const int entries = left < 0 ? 0 : left < kChunk ? left : kChunk;
      machine.copy16(shared + Layout::at(t, f) * kSize, entries > 0 ? from + t * operand.strides.token + f : from,
                     entries * kSize);
    }
    return;
  }
  const auto there = [&](int t, int f) { return t < tokens && f < inside; };
  const auto entry = [&](int t, int f) { return from + t * operand.strides.token + f * operand.strides.feature; };
  if constexpr (kSize == 2) {
    store_entries<Layout>(machine, rows, shared,
                          [&](int t, int f) { return there(t, f) ? machine.load_entry(entry(t, f)) : uint16_t{0}; });
  } else {
    for (int e = machine.thread(); e < rows * kTile; e += kThreads) {
      const int t = e / kTile, f = e % kTile;
      machine.copy_entry(shared + Layout::at(t, f) * kSize, there(t, f) ? entry(t, f) : from, there(t, f));
    }
  }
}

// products += 16 tokens of both operands, which lie at bytes `grads` and `inputs` of shared memory.
template <typename Machine, typename Kind>
TALOS_DEVICE void multiply(Machine& machine, Kind kind, const Place& place, int grads, int inputs,
                           float (&products)[kRows][kCols * 4]) {
  using Layout = StageLayout<uint16_t>;
  uint32_t b[kCols][2];
  TALOS_UNROLL
  for (int col = 0; col < kCols; col += 2) {
    const Entry at = inputs_row(place, col);
    uint32_t both[4];
    machine.load_matrices(both, inputs + Layout::at(at.row, at.col) * 2);
    b[col][0] = both[0], b[col][1] = both[1], b[col + 1][0] = both[2], b[col + 1][1] = both[3];
  }
  TALOS_UNROLL
  for (int row = 0; row < kRows; ++row) {
    const Entry at = grads_row(place, row);
    uint32_t a[4];
    machine.load_matrices(a, grads + Layout::at(at.row, at.col) * 2);
    TALOS_UNROLL
    for (int col = 0; col < kCols; ++col) machine.multiply_add(kind, &products[row][col * 4], a, b[col]);
  }
}

// Two neighbouring tokens as bfloat16: their high parts, and what is left of them.
struct Split {
  uint32_t high, low;
};

template <typename Machine>
TALOS_DEVICE Split split_pair(Machine& machine, int shared) {
  const float x = machine.load_float(shared), y = machine.load_float(shared + StageLayout<float>::kPitch * 4);
  const uint32_t high = machine.pack_bf16(x, y);
  return {high, machine.pack_bf16(x - machine.as_float(high << 16), y - machine.as_float(high & 0xffff0000u))};
}

template <typename Machine>
TALOS_DEVICE void multiply(Machine& machine, Fp32, const Place& place, int grads, int inputs,
                           float (&products)[kRows][kCols * 4]) {
  using Layout = StageLayout<float>;
  uint32_t b_high[kCols][2], b_low[kCols][2];
  TALOS_UNROLL
  for (int col = 0; col < kCols; ++col) {
    TALOS_UNROLL
    for (int r = 0; r < 2; ++r) {
      const Entry at = inputs_pair(place, col, r);
      const Split split = split_pair(machine, inputs + Layout::at(at.row, at.col) * 4);
      b_high[col][r] = split.high, b_low[col][r] = split.low;
    }
  }
  TALOS_UNROLL
  for (int row = 0; row < kRows; ++row) {
    uint32_t a_high[4], a_low[4];
    TALOS_UNROLL
    for (int r = 0; r < 4; ++r) {
      const Entry at = grads_pair(place, row, r);
      const Split split = split_pair(machine, grads + Layout::at(at.row, at.col) * 4);
      a_high[r] = split.high, a_low[r] = split.low;
    }
    TALOS_UNROLL
    for (int col = 0; col < kCols; ++col) {
      float* const product = &products[row][col * 4];
      machine.multiply_add(Bf16{}, product, a_low, b_high[col]);
      machine.multiply_add(Bf16{}, product, a_high, b_low[col]);
      machine.multiply_add(Bf16{}, product, a_high, b_high[col]);
    }
  }
}

template <typename Machine>
TALOS_DEVICE void write_tile(Machine& machine, const Arguments& args, const Block& block, int64_t split,
                             const float (&squares)[kRows][kCols * 4]) {
  const Place place(machine.thread());
  const float scale = args.scale == nullptr ? 1.0f : *args.scale;
  TALOS_UNROLL
  for (int row = 0; row < kRows; ++row) {
    TALOS_UNROLL
    for (int c = 0; c < kCols * 4; ++c) {
      const Entry entry = score_of(place, row, c / 4, c % 4);
      const int64_t out = block.out + entry.row, in = block.in + entry.col;
      if (out >= args.shape.outs || in >= args.shape.ins) continue;
      if (args.splits == 1) {
        args.scores[out * args.shape.ins + in] += scale * squares[row][c];
      } else {
        args.parts[(split * args.shape.outs + out) * args.shape.ins + in] = squares[row][c];
      }
    }
  }
}

template <typename Kind, typename Machine>
TALOS_DEVICE void accumulate_tile(Machine& machine, const Arguments& args, int64_t tile, int64_t split) {
  constexpr int kOperand = kOperandBytes<Kind>, kStep = kOperand / Kind::kTokens * kMma;
  const Block block(args, tile, split);
  const Place place(machine.thread());
  float products[kRows][kCols * 4] = {}, squares[kRows][kCols * 4] = {};
  Cursor<Kind> loading{block.first}, computing{block.first};

  const auto load_next = [&](int stage) {
    if (loading.sample < block.last) {
      const int tokens = loading.tokens(args.shape), at = stage * 2 * kOperand;
      copy_operand<Kind>(machine, args.grads, loading, tokens, block.out, at);
      copy_operand<Kind>(machine, args.inputs, loading, tokens, block.in, at + kOperand);
      loading.advance(args.shape);
    }
    machine.commit();  // an empty one too: the waits below count them
  };

  for (int stage = 0; stage < kStages - 1; ++stage) load_next(stage);
  for (int stage = 0; computing.sample < block.last; stage = (stage + 1) % kStages) {
    machine.template wait<kStages - 2>();
    machine.sync();  // everybody's copies of this stage have landed, and the one before it is read
    load_next((stage + kStages - 1) % kStages);
    const int steps = (computing.tokens(args.shape) + kMma - 1) / kMma, at = stage * 2 * kOperand;
    for (int step = 0; step < steps; ++step) {
      multiply(machine, Kind{}, place, at + step * kStep, at + kOperand + step * kStep, products);
    }
    if (computing.ends_sample(args.shape)) {
      add_squares(squares, products);
      TALOS_UNROLL
      for (int row = 0; row < kRows; ++row) {
        TALOS_UNROLL
        for (int c = 0; c < kCols * 4; ++c) products[row][c] = 0;
      }
    }
    computing.advance(args.shape);
  }
  write_tile(machine, args, block, split, squares);
}

}  // namespace talos::mma

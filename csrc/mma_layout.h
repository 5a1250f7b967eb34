// Where everything lies in the tensor-core kernel: pure index arithmetic with neither torch nor CUDA in it, so that CPU
// tests run it (tests/emulated_gpu.h). The layouts of mma.sync and ldmatrix are those of the PTX manual.
#pragma once

#include "squared.h"

namespace talos::mma {

constexpr int kTile = 128;  // scores of one block: kTile outs x kTile ins
constexpr int kThreads = 256;
constexpr int kWarpOuts = 64, kWarpIns = 32;  // scores of one warp; 2 x 4 warps a block
constexpr int kMma = 16, kMmaIns = 8;         // one instruction: 16 outs x 8 ins, over 16 tokens
constexpr int kRows = kWarpOuts / kMma, kCols = kWarpIns / kMmaIns;
constexpr int kStages = 4;

// Kinds of operands. `kTokens` of both operands are in one stage of shared memory.
struct Bf16 {
  using Stored = uint16_t;
  static constexpr int kTokens = 32;
};
struct Fp16 {
  using Stored = uint16_t;
  static constexpr int kTokens = 32;
};
struct Fp32 {
  using Stored = float;
  static constexpr int kTokens = 16;
};

// A stage of one operand holds (tokens, kTile) entries. 16-bit rows are 256 bytes, so ldmatrix would read eight rows
// from the same banks: the 16-byte chunks of row t are permuted by t. 32-bit rows are padded for the same reason.
template <typename Stored>
struct StageLayout;
template <>
struct StageLayout<uint16_t> {
  static constexpr int kPitch = kTile;
  static TALOS_SHARED int at(int token, int feature) {
    return token * kPitch + (feature / 8 ^ token % 8) * 8 + feature % 8;
  }
};
template <>
struct StageLayout<float> {
  static constexpr int kPitch = kTile + 4;
  static TALOS_SHARED int at(int token, int feature) { return token * kPitch + feature; }
};

// Bytes of one operand's stage, and of all shared memory.
template <typename Kind>
constexpr int kOperandBytes =
    Kind::kTokens * StageLayout<typename Kind::Stored>::kPitch * int{sizeof(typename Kind::Stored)};
template <typename Kind>
constexpr int kSharedBytes = kStages * 2 * kOperandBytes<Kind>;

// A thread's place in its block. `group` and `member` are the PTX manual's groupID and threadID_in_group.
struct Place {
  int lane, out, in;  // out, in: the first score of its warp, in the tile
  TALOS_SHARED explicit Place(int thread)
      : lane(thread % 32),
        out(thread / 32 % (kTile / kWarpOuts) * kWarpOuts),
        in(thread / 32 / (kTile / kWarpOuts) * kWarpIns) {}
  TALOS_SHARED int group() const { return lane / 4; }
  TALOS_SHARED int member() const { return lane % 4; }
};

struct Entry {
  int row, col;
};

// Accumulator `r` of instruction (row, col) of this warp: which score of the tile it is.
TALOS_SHARED Entry score_of(const Place& place, int row, int col, int r) {
  return {place.out + row * kMma + place.group() + r / 2 * 8, place.in + col * kMmaIns + place.member() * 2 + r % 2};
}

// The row of an 8 x 8 matrix that this lane hands to ldmatrix.x4.trans, as (token, feature). Both operands lie token by
// token, so the transposing load brings them into the instruction's order. Grads: four matrices make one A of 16 outs
// x 16 tokens. Inputs: they make two B of 16 tokens x 8 ins.
TALOS_SHARED Entry grads_row(const Place& place, int row) {
  return {place.lane % 8 + place.lane / 16 * 8, place.out + row * kMma + place.lane / 8 % 2 * 8};
}
TALOS_SHARED Entry inputs_row(const Place& place, int col) {
  return {place.lane % 8 + place.lane / 8 % 2 * 8, place.in + col * kMmaIns + place.lane / 16 * 8};
}

// The first of the two neighbouring tokens in register `r` of an operand of 32-bit entries, and its feature.
TALOS_SHARED Entry grads_pair(const Place& place, int row, int r) {
  return {place.member() * 2 + r / 2 * 8, place.out + row * kMma + place.group() + r % 2 * 8};
}
TALOS_SHARED Entry inputs_pair(const Place& place, int col, int r) {
  return {place.member() * 2 + r * 8, place.in + col * kMmaIns + place.group()};
}

// How many parts the samples are cut into, so that few tiles still fill the multiprocessors: the fewest that fill nine
// tenths of the last wave, else what fills most. A part has at least four samples.
inline int64_t choose_splits(int64_t tiles, int64_t samples, int64_t multiprocessors) {
  const int64_t most = samples / 4 < 1 ? 1 : samples / 4;
  int64_t best = 1;
  double filled_most = 0;
  for (int64_t splits = 1; splits <= most && splits <= 64; ++splits) {
    const int64_t blocks = tiles * splits;
    const double filled =
        static_cast<double>(blocks) / static_cast<double>(tile_count(blocks, multiprocessors) * multiprocessors);
    if (filled > filled_most) best = splits, filled_most = filled;
    if (filled >= 0.9) break;
  }
  return best;
}

}  // namespace talos::mma

// A register tile as the loops around it see it: its size, what it reads, and the functions that pack and run it.
#pragma once

#include "squared.h"

namespace talos {

struct Extent {
  int64_t outs, ins;
};

// Adds one sample's squared products to `squares`, or parks the products between the runs of a sample's tokens.
using Run = void (*)(const void* grads, const void* inputs, int64_t steps, bool first, bool last, void* parked,
                     void* squares);
// All tokens of some features of one sample -> panels, one behind the other.
using Pack = void (*)(const void* from, const Strides& strides, int64_t tokens, int64_t features, void* panels);

// A register tile of rows x cols scores for one instruction set and one kind of input, and the panels that it reads:
// per step of `tokens_per_step` tokens, `entry_bytes` for each feature.
struct TileKernel {
  int64_t rows, cols, tokens_per_step, entry_bytes;
  Run run;
  Pack pack_grads, pack_inputs;
  Extent tile = {96, 256};  // what a thread takes at most; multiples of rows and cols, as everything below
  Extent pass = tile;       // what all samples pass over before the next part of the tile
  void (*begin)() = nullptr;
  void (*end)() = nullptr;  // around a thread's calls of run
};

}  // namespace talos

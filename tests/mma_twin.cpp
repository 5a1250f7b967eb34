// The tensor-core kernel of csrc/mma_tile.h on the emulated GPU, for ctypes: see test_mma_twin.py.
#include <cstring>

#include "emulated_gpu.h"
#include "mma_tile.h"

using namespace talos;

struct Problem {
  const void *grads, *inputs;
  int64_t grads_bytes, inputs_bytes;
  Strides grads_strides, inputs_strides;
  Shape shape;
  int64_t splits;
  const float* scale;
  float *scores, *parts;
};

struct Report {
  int64_t bank_conflicts, aligned_operands;
  char error[80];
};

template <typename Kind>
static void run(const Problem& problem, bool late, bool reversed, Report& report) {
  const Shape& shape = problem.shape;
  const mma::Arguments args{
      mma::operand_of<Kind>(problem.grads, problem.grads_strides, shape.outs),
      mma::operand_of<Kind>(problem.inputs, problem.inputs_strides, shape.ins),
      shape,
      problem.splits,
      problem.scale,
      problem.scores,
      problem.parts,
  };
  const emulated::Options options{late,
                                  reversed,
                                  {{static_cast<const char*>(problem.grads), problem.grads_bytes},
                                   {static_cast<const char*>(problem.inputs), problem.inputs_bytes}}};
  report = {0, args.grads.aligned + args.inputs.aligned, ""};
  const int64_t tiles = tile_count(shape.outs, mma::kTile) * tile_count(shape.ins, mma::kTile);
  for (int64_t block = 0; block < tiles * problem.splits; ++block) {
    emulated::Block gpu(mma::kThreads, mma::kSharedBytes<Kind>, options);
    gpu.run([&](int thread) {
      emulated::Machine machine(gpu, thread);
      mma::accumulate_tile<Kind>(machine, args, block % tiles, block / tiles);
    });
    report.bank_conflicts += gpu.bank_conflicts;
    std::strncpy(report.error, gpu.error.c_str(), sizeof(report.error) - 1);
    if (report.error[0] != 0) return;
  }
}

extern "C" void run_twin(int kind, const Problem* problem, int late, int reversed, Report* report) {
  const auto runner = kind == 0 ? run<mma::Bf16> : kind == 1 ? run<mma::Fp16> : run<mma::Fp32>;
  runner(*problem, late != 0, reversed != 0, *report);
}

extern "C" int64_t choose_splits(int64_t tiles, int64_t samples, int64_t multiprocessors) {
  return mma::choose_splits(tiles, samples, multiprocessors);
}

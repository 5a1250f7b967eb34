// The CPU kernel with AMX's register tile, on an emulated AMX, for ctypes: see test_amx_twin.py.
#define TALOS_AMX_TARGET  // nothing that not every processor has
#include <vector>

#include "amx.h"
#include "cpu_worker.h"
#include "emulated_amx.h"
#if defined(__x86_64__) && defined(__linux__)
#include "trapped_amx.h"
#endif

using namespace talos;

struct Problem {
  const void *grads, *inputs;
  Strides grads_strides, inputs_strides;
  Shape shape;
  float scale;
  float* scores;
};

// Panels with NaN before, behind and in them: what is read but was not packed shows in the scores.
static std::vector<uint16_t> poisoned(int64_t bytes) { return std::vector<uint16_t>(bytes / 2 + 8192, 0xffff); }

// What accumulate.cpp does with one block of samples, one worker after the other. Returns the first fault, if any.
static const char* run(const TileKernel& tile_kernel, const Problem* problem, int64_t threads) {
  using emulated::Amx;
  Amx::reset();
  const Shape& shape = problem->shape;
  const Call<float> call{problem->scores, problem->scale, shape, tile_kernel, false};
  const TileKernel& kernel = call.kernel;
  const auto panels_of = [&](const void* data, const Strides& strides, int64_t features, int64_t width, Pack pack) {
    return Panels({data, strides, features, sizeof(uint16_t)}, width, pack, kernel, shape.tokens);
  };
  Panels x = panels_of(problem->inputs, problem->inputs_strides, shape.ins, kernel.cols, kernel.pack_inputs);
  Panels g = panels_of(problem->grads, problem->grads_strides, shape.outs, kernel.rows, kernel.pack_grads);
  auto x_memory = poisoned(shape.samples * x.sample_bytes()), g_memory = poisoned(shape.samples * g.sample_bytes());
  x.place(reinterpret_cast<char*>(x_memory.data() + 4096));
  g.place(reinterpret_cast<char*>(g_memory.data() + 4096));
  for (int64_t index = 0; index < shape.samples * x.groups(); ++index) x.pack(0, index);
  for (int64_t index = 0; index < shape.samples * g.groups(); ++index) g.pack(0, index);
  const Tiles tiles(shape, kernel, threads);
  for (int64_t thread = 0; thread < threads; ++thread) {
    TileWorker<float> worker(call, tiles, x, g, shape.samples);
    for (int64_t tile = thread; tile < tiles.count(); tile += threads) worker(tile);
  }
  return Amx::is_configured() ? "the tile registers were not released" : Amx::error;
}

extern "C" const char* run_amx_twin(const Problem* problem, int64_t threads) {
  return run(amx::Kernel<emulated::Amx>::kernel(), problem, threads);
}

// The same with the processor's own instructions; counts those that it does not know.
extern "C" const char* run_amx_trapped(const Problem* problem, int64_t threads, int64_t* trapped) {
#if defined(__x86_64__) && defined(__linux__)
  const trapped::Trap trap;
  trapped::Trap::trapped = 0;
  const char* const fault = run(amx::Kernel<amx::Processor>::kernel(), problem, threads);
  *trapped = trapped::Trap::trapped;
  return fault;
#else
  (void)problem, (void)threads, (void)trapped;
  return "not an x86 processor under Linux";
#endif
}

// The register tile without ldtilecfg before it.
extern "C" const char* run_unconfigured() {
  emulated::Amx::reset();
  std::vector<uint16_t> panels(2 * amx::kEntries * 2);
  std::vector<float> squares(amx::kWidth * amx::kWidth);
  amx::Kernel<emulated::Amx>::run(panels.data(), panels.data(), 1, true, true, nullptr, squares.data());
  return emulated::Amx::error;
}

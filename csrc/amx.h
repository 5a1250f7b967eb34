// The processor's AMX, for amx_tile.h. Assembly, because the intrinsics of GCC take literal register numbers only and
// do not tell the compiler which memory they read.
#pragma once

#if defined(__x86_64__)
#ifndef TALOS_AMX_TARGET
#define TALOS_AMX_TARGET __attribute__((target("avx512f,avx512bw,avx512vl")))
#endif
#include "amx_tile.h"

namespace talos::amx {

struct Processor {
  // Tile registers belong to a thread. Configured ones make every switch of threads save 8 KB, until they are released.
  static void configure(const TileConfig& config) { asm volatile("ldtilecfg %0" ::"m"(config)); }
  static void release() { asm volatile("tilerelease"); }

  template <int TILE>
  TALOS_SHARED static void zero() {
    asm volatile("tilezero %%tmm%c0" ::"n"(TILE));
  }
  template <int TILE>
  TALOS_SHARED static void load(const void* from, int64_t stride) {
    asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(stride), "n"(TILE) : "memory");
  }
  template <int TILE>
  TALOS_SHARED static void store(void* to, int64_t stride) {
    asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(to), "r"(stride), "n"(TILE) : "memory");
  }
  // Tile SUM += GRADS (outs x tokens) times INPUTS (tokens x ins).
  template <int SUM, int GRADS, int INPUTS>
  TALOS_SHARED static void multiply_add() {
    asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"n"(SUM), "n"(GRADS), "n"(INPUTS));
  }
};

}  // namespace talos::amx
#endif

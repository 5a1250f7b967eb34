// Which instruction set the CPU kernels use, decided when the code runs: a wheel must work on every machine.
#pragma once

#include <cstdlib>
#include <string_view>

#if defined(__x86_64__) && defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace talos {

enum class CpuCapability { kPortable, kAvx2, kAvx512 };

// The variable is torch's own, with torch's own values, so that it caps torch's kernels and ours together.
inline CpuCapability cpu_capability() {
#if defined(__x86_64__)
  const char* variable = std::getenv("ATEN_CPU_CAPABILITY");
  const std::string_view cap = variable == nullptr ? "" : variable;
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && cap != "default";
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (avx2 && avx512 && cap != "avx2") return CpuCapability::kAvx512;
  if (avx2) return CpuCapability::kAvx2;
#endif
  return CpuCapability::kPortable;
}

// Whether this process may multiply bfloat16 tiles with AMX. The processor has it, the system saves its registers, and
// Linux lets the process use them, which has to be asked for (once; all threads may then). The variable has no value
// for AMX, so where it is set, whatever it says, there is none.
inline bool may_use_amx_bf16() {
#if defined(__x86_64__) && defined(__linux__)
  constexpr unsigned kOsSaves = 1u << 27, kAmxBf16 = 1u << 22, kAmxTile = 1u << 24, kTileState = 3u << 17;
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  unsigned a, b, c, d;
  if (cpu_capability() != CpuCapability::kAvx512 || std::getenv("ATEN_CPU_CAPABILITY") != nullptr) return false;
  if (!__get_cpuid(1, &a, &b, &c, &d) || (c & kOsSaves) == 0) return false;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d & kAmxBf16) == 0 || (d & kAmxTile) == 0) return false;
  asm("xgetbv" : "=a"(a), "=d"(d) : "c"(0));
  return (a & kTileState) == kTileState && syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}

}  // namespace talos

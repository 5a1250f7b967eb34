// Which instruction set the CPU kernels use, decided when the code runs: a wheel must work on every machine.
#pragma once

#include <cstdlib>
#include <string_view>

namespace talos {

enum class Isa { kPortable, kAvx2, kAvx512 };

// The variable is torch's own, with torch's own values, so that it caps torch's kernels and ours together.
inline Isa choose_isa() {
#if defined(__x86_64__)
  const char* variable = std::getenv("ATEN_CPU_CAPABILITY");
  const std::string_view cap = variable == nullptr ? "" : variable;
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && cap != "default";
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (avx2 && avx512 && cap != "avx2") return Isa::kAvx512;
  if (avx2) return Isa::kAvx2;
#endif
  return Isa::kPortable;
}

}  // namespace talos

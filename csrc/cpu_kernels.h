// Which register tile this machine multiplies with.
#pragma once

#include <type_traits>

#include "amx.h"
#include "cpu_tile.h"
#include "isa.h"

namespace talos {

// The widest kernel of this machine for entries of type From, summed in Packed; `pairs` allows it to take two bfloat16
// tokens or more at a time. ROWS fills the register file: 32 vectors with AVX-512, 16 with AVX2 and SSE2, 32 on Arm.
template <typename Packed, typename From>
TileKernel choose_kernel(bool pairs) {
#if defined(__x86_64__)
  const CpuCapability capability = cpu_capability();
  if constexpr (std::is_same_v<From, BFloat16>) {
    if (pairs && may_use_amx_bf16()) return amx::Kernel<amx::Processor>::kernel();
    if (pairs && capability == CpuCapability::kAvx512 && __builtin_cpu_supports("avx512bf16")) {
      return Avx512Bf16Tile<TokenPair, From, 12, 64>::kernel();
    }
  }
  if (capability == CpuCapability::kAvx512) return Avx512Tile<Packed, From, 12, 64>::kernel();
  if (capability == CpuCapability::kAvx2) return Avx2Tile<Packed, From, 6, 32>::kernel();
#endif
  return PortableTile<Packed, From, 6, 16>::kernel();
}

}  // namespace talos

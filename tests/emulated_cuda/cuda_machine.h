// In the place of csrc/cuda_machine.h: the tensor-core kernel's instructions, emulated.
#pragma once

#include "kernels.h"
#include "mma_layout.h"

namespace talos {

inline unsigned char shared[1];  // the emulated machine has its own; this is only named

class CudaMachine : public emulated::Machine {
 public:
  explicit CudaMachine(const void*) : Machine(emulated::block(), emulated::block().thread()) {}
};

}  // namespace talos

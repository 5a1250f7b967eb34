// The instructions of a GPU that the tensor-core kernel is made of. CPU tests put an emulated machine in this one's
// place.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "mma_layout.h"

namespace talos {

// What mma_tile.h asks of a GPU: its instructions, one line each.
class CudaMachine {
 public:
  __device__ explicit CudaMachine(const void* shared)
      : shared_(static_cast<uint32_t>(__cvta_generic_to_shared(shared))) {}

  __device__ static int thread() { return static_cast<int>(threadIdx.x); }

  __device__ void copy16(int to, const void* from, int bytes) const {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_ + to), "l"(global(from)), "r"(bytes)
                 : "memory");
  }
  __device__ void copy_entry(int to, const float* from, bool there) const {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(shared_ + to), "l"(global(from)),
                 "r"(there ? 4 : 0)
                 : "memory");
  }
  __device__ static uint16_t load_entry(const uint16_t* from) { return *from; }
  __device__ void store_entry(int to, uint16_t entry) const {
    asm volatile("st.shared.b16 [%0], %1;" ::"r"(shared_ + to), "h"(entry) : "memory");
  }
  __device__ static void commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
  template <int PENDING>
  __device__ static void wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
  }
  __device__ static void sync() { __syncthreads(); }

  __device__ void load_matrices(uint32_t (&to)[4], int from) const {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(shared_ + from)
                 : "memory");
  }
  __device__ float load_float(int from) const {
    float value;
    asm volatile("ld.shared.f32 %0, [%1];" : "=f"(value) : "r"(shared_ + from) : "memory");
    return value;
  }

  // x in the low half, y in the high one, rounded to nearest even.
  __device__ static uint32_t pack_bf16(float x, float y) {
    uint32_t pair;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(y), "f"(x));
    return pair;
  }
  __device__ static float as_float(uint32_t bits) { return __uint_as_float(bits); }

  __device__ static void multiply_add(mma::Bf16, float* sums, const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  }
  __device__ static void multiply_add(mma::Fp16, float* sums, const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  }

 private:
  __device__ static uint64_t global(const void* pointer) { return __cvta_generic_to_global(pointer); }

  uint32_t shared_;
};

}  // namespace talos

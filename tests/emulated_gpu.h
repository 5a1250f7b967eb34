// A GPU block on the CPU, for kernels that are written against a Machine (csrc/mma_tile.h): the emulated counterpart of
// CudaMachine. Asynchronous copies land either at once or as late as the waits allow: the first shows a buffer that is
// overwritten too early, the second a missing wait. Shared memory starts as NaN. Bank conflicts are counted.
//
// What ldmatrix, mma.sync and cp.async do is taken from the PTX manual, not from the kernel's own index maps.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#include "emulated_block.h"
#include "mma_layout.h"

namespace emulated {

inline float float_of(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

inline uint32_t round_to_bf16(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  if (std::isnan(value)) return 0x7fff;
  return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}

inline float bf16(uint16_t bits) { return float_of(uint32_t{bits} << 16); }

inline float fp16(uint16_t bits) {
  const int exponent = bits >> 10 & 31, mantissa = bits & 1023;
  const float magnitude = exponent == 31  ? (mantissa != 0 ? NAN : INFINITY)
                          : exponent == 0 ? std::ldexp(static_cast<float>(mantissa), -24)
                                          : std::ldexp(static_cast<float>(1024 + mantissa), exponent - 25);
  return bits >> 15 != 0 ? -magnitude : magnitude;
}

class Machine {
 public:
  Machine(Block& block, int thread) : block_(block), thread_(thread) {}

  int thread() const { return thread_; }

  void copy16(int to, const void* from, int bytes) {
    if (to % 16 != 0 || (bytes > 0 && reinterpret_cast<uintptr_t>(from) % 16 != 0)) block_.fail("copy16 off alignment");
    start_copy({to, from, bytes, 16});
  }
  void copy_entry(int to, const float* from, bool there) { start_copy({to, from, there ? 4 : 0, 4}); }
  uint16_t load_entry(const uint16_t* from) {
    check_read(from, 2);
    return block_.error.empty() ? *from : uint16_t{0};
  }
  void store_entry(int to, uint16_t entry) {
    check_write(to, 2);
    land({to, &entry, 2, 2});
  }
  void commit() { groups_.emplace_back(); }
  template <int PENDING>
  void wait() {
    // The last group is still open.
    while (static_cast<int>(groups_.size()) - 1 > PENDING) {
      for (const Copy& copy : groups_.front()) land(copy);
      groups_.erase(groups_.begin());
    }
  }
  void sync() { block_.sync(); }

  // ldmatrix.x4.trans: lanes 8j to 8j + 7 give the rows of matrix j; a lane gets column lane / 4 of rows 2 (lane % 4)
  // and the next.
  void load_matrices(uint32_t (&to)[4], int from) {
    if (from % 16 != 0) block_.fail("ldmatrix off alignment");
    const int turn = gather([&](Collective& warp, int turn) { warp.address[turn][lane()] = from; },
                            [&](const Collective& warp, int turn) { count_conflicts(warp.address[turn], 16); });
    const Collective& warp = own_warp();
    for (int j = 0; j < 4; ++j) {
      const int row = 8 * j + lane() % 4 * 2, column = lane() / 4 * 2;
      to[j] = read<uint16_t>(warp.address[turn][row] + column) |
              uint32_t{read<uint16_t>(warp.address[turn][row + 1] + column)} << 16;
    }
  }

  float load_float(int from) {
    const int turn = gather([&](Collective& warp, int turn) { warp.address[turn][lane()] = from; },
                            [&](const Collective& warp, int turn) { count_conflicts(warp.address[turn], 4); });
    return read<float>(own_warp().address[turn][lane()]);
  }

  static uint32_t pack_bf16(float x, float y) { return round_to_bf16(x) | round_to_bf16(y) << 16; }
  static float as_float(uint32_t bits) { return float_of(bits); }

  void multiply_add(talos::mma::Bf16, float* sums, const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    mma(bf16, sums, a, b);
  }
  void multiply_add(talos::mma::Fp16, float* sums, const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    mma(fp16, sums, a, b);
  }

 private:
  int lane() const { return thread_ % kLanes; }
  Collective& own_warp() { return block_.warps[thread_ / kLanes]; }

  // Waits until all lanes of the warp are here.
  template <typename Give, typename Once>
  int gather(const Give& give, const Once& once) {
    Collective& warp = own_warp();
    const int turn = turn_;
    turn_ = 1 - turn_;
    give(warp, turn);
    if (++warp.arrived[turn] == kLanes) {
      once(warp, turn);
      warp.arrived[1 - turn] = 0;
    }
    block_.wait_until([&] { return warp.arrived[turn] == kLanes; });
    return turn;
  }

  // mma.m16n8k16, row.col: register r of A holds row lane / 4 (+ 8 if r is odd), columns 2 (lane % 4) and the next (+ 8
  // from r = 2 on); of B rows 2 (lane % 4) and the next (+ 8 if r = 1), column lane / 4; of the sums row lane / 4 (+ 8
  // from r = 2 on), column 2 (lane % 4) + r % 2.
  void mma(float (*decode)(uint16_t), float* sums, const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    const int turn = gather(
        [&](Collective& warp, int turn) {
          std::memcpy(warp.a[turn][lane()], a, sizeof(a));
          std::memcpy(warp.b[turn][lane()], b, sizeof(b));
        },
        [](const Collective&, int) {});
    const Collective& warp = own_warp();
    const auto half = [&](uint32_t pair, int k) { return double{decode(static_cast<uint16_t>(pair >> k % 2 * 16))}; };
    for (int r = 0; r < 4; ++r) {
      const int row = lane() / 4 + r / 2 * 8, column = lane() % 4 * 2 + r % 2;
      double sum = sums[r];
      for (int k = 0; k < 16; ++k) {
        const int member = k % 8 / 2;
        sum += half(warp.a[turn][row % 8 * 4 + member][row / 8 + k / 8 * 2], k) *
               half(warp.b[turn][column * 4 + member][k / 8], k);
      }
      sums[r] = static_cast<float>(sum);
    }
  }

  template <typename T>
  T read(int from) {
    T value{};
    if (from < 0 || from + int{sizeof(T)} > static_cast<int>(block_.shared.size())) {
      block_.fail("a load leaves shared memory");
      return value;
    }
    std::memcpy(&value, block_.shared.data() + from, sizeof(T));
    return value;
  }

  // Lanes that read `size` bytes at once are served 128 bytes at a time, without delay if those are in different banks.
  void count_conflicts(const int (&address)[kLanes], int size) {
    const int together = size == 4 ? kLanes : 8;
    for (int first = 0; first < kLanes; first += together) {
      uint64_t seen = 0;
      for (int l = first; l < first + together; ++l) {
        const uint64_t bank = uint64_t{1} << address[l] % 128 / size;
        block_.bank_conflicts += (seen & bank) != 0;
        seen |= bank;
      }
    }
  }

  void check_read(const void* from, int bytes) {
    bool readable = bytes == 0;
    for (const Range& range : block_.options.readable) readable |= range.holds(from, bytes);
    if (!readable) block_.fail("a copy reads outside its operand");
  }
  void check_write(int to, int size) {
    if (to < 0 || to + size > static_cast<int>(block_.shared.size())) block_.fail("a copy leaves shared memory");
  }

  void start_copy(const Copy& copy) {
    check_read(copy.from, copy.bytes);
    check_write(copy.to, copy.size);
    if (block_.options.late) {
      groups_.back().push_back(copy);
    } else {
      land(copy);
    }
  }

  void land(const Copy& copy) {
    if (!block_.error.empty()) return;
    char* const to = block_.shared.data() + copy.to;
    std::memset(to, 0, copy.size);
    std::memcpy(to, copy.from, copy.bytes);
  }

  Block& block_;
  const int thread_;
  int turn_ = 0;
  std::vector<std::vector<Copy>> groups_{1};
};

}  // namespace emulated

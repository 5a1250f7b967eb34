// AMX instructions as they are encoded, on a processor that has none: each raises SIGILL, and the handler decodes it by
// Intel's manual, has the emulated AMX do it, and goes on behind it. So the very assembly of csrc/amx.h is run.
#pragma once

#include <signal.h>
#include <ucontext.h>

#include "emulated_amx.h"

namespace trapped {

// An instruction with a three-byte VEX prefix: C4, RXBm'mmmm, Wv'vvvLpp, opcode, ModRM, maybe SIB, maybe displacement.
class Instruction {
 public:
  explicit Instruction(ucontext_t& context)
      : registers_(context.uc_mcontext.gregs), code_(reinterpret_cast<const uint8_t*>(registers_[REG_RIP])) {
    if (mode() == 3) return;
    if (rm() == 4) {
      const int base = code_[5] & 7, index = code_[5] >> 3 & 7, index_high = (~code_[1] >> 6 & 1) * 8;
      at_ = 6;
      if (index + index_high != 4) stride_ = general(index + index_high) << (code_[5] >> 6);
      address_ = base == 5 && mode() == 0 ? displacement(4) : general(base + high_base());
    } else {
      at_ = 5;
      address_ = rm() == 5 && mode() == 0 ? displacement(4) : general(rm() + high_base());
      if (rm() == 5 && mode() == 0) address_ += registers_[REG_RIP] + at_;
    }
    if (mode() == 1) address_ += displacement(1);
    if (mode() == 2) address_ += displacement(4);
  }

  // Whether it is an AMX instruction; does it, and steps behind it.
  bool run() {
    if (code_[0] != 0xc4 || (code_[1] & 0x1f) != 2 || (code_[2] & 0x84) != 0) return false;  // map 0F38, W0, 128
    const int key = code_[3] << 4 | (code_[2] & 3) << 1 | (mode() == 3), reg = code_[4] >> 3 & 7;
    void* const memory = reinterpret_cast<void*>(address_);
    if (key == (0x49 << 4 | kNone << 1)) {
      emulated::Amx::configure(*static_cast<const talos::amx::TileConfig*>(memory));
    } else if (key == (0x49 << 4 | kNone << 1 | 1)) {
      emulated::Amx::release();
    } else if (key == (0x49 << 4 | kF2 << 1 | 1)) {
      emulated::Amx::zero(reg);
    } else if (key == (0x4b << 4 | kF2 << 1)) {
      emulated::Amx::load(reg, memory, stride_);
    } else if (key == (0x4b << 4 | kF3 << 1)) {
      emulated::Amx::store(reg, memory, stride_);
    } else if (key == (0x5c << 4 | kF3 << 1 | 1)) {
      emulated::Amx::multiply_add(reg, rm(), ~code_[2] >> 3 & 15);
    } else {
      return false;
    }
    registers_[REG_RIP] += at_;
    return true;
  }

 private:
  static constexpr int kNone = 0, kF3 = 2, kF2 = 3;  // what pp stands for

  int mode() const { return code_[4] >> 6; }
  int rm() const { return code_[4] & 7; }
  int high_base() const { return (~code_[1] >> 5 & 1) * 8; }

  int64_t general(int number) const {
    static constexpr int kOrder[] = {REG_RAX, REG_RCX, REG_RDX, REG_RBX, REG_RSP, REG_RBP, REG_RSI, REG_RDI,
                                     REG_R8,  REG_R9,  REG_R10, REG_R11, REG_R12, REG_R13, REG_R14, REG_R15};
    return registers_[kOrder[number]];
  }

  int64_t displacement(int bytes) {
    int32_t value = 0;
    std::memcpy(&value, code_ + at_, bytes);
    at_ += bytes;
    return bytes == 1 ? static_cast<int8_t>(value) : value;
  }

  greg_t* const registers_;
  const uint8_t* const code_;
  int at_ = 5;  // bytes decoded
  int64_t address_ = 0, stride_ = 0;
};

// While it lives, AMX instructions of this process are done by the emulator.
class Trap {
 public:
  Trap() {
    struct sigaction action = {};
    action.sa_sigaction = [](int, siginfo_t*, void* context) {
      ++trapped;
      if (!Instruction(*static_cast<ucontext_t*>(context)).run()) signal(SIGILL, SIG_DFL);  // and it comes again
    };
    action.sa_flags = SA_SIGINFO;
    sigaction(SIGILL, &action, &before_);
  }
  ~Trap() { sigaction(SIGILL, &before_, nullptr); }

  static inline int64_t trapped = 0;

 private:
  struct sigaction before_ = {};
};

}  // namespace trapped

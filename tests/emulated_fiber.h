// A stack of its own, to switch to and from. On x86-64 without swapcontext, whose two system calls are most of its
// time.
#pragma once

#include <cstdint>
#include <memory>

#if defined(__x86_64__)

extern "C" void emulated_switch(void** from, void* to);
asm(R"(
.pushsection .text
.weak emulated_switch
.hidden emulated_switch
.type emulated_switch, @function
emulated_switch:
  push %rbp
  push %rbx
  push %r12
  push %r13
  push %r14
  push %r15
  mov %rsp, (%rdi)
  mov %rsi, %rsp
  pop %r15
  pop %r14
  pop %r13
  pop %r12
  pop %rbx
  pop %rbp
  ret
.popsection
)");

#else
#include <ucontext.h>
#endif

namespace emulated {

class Stack {
 public:
  // What runs there; it never returns, it switches.
  void start(void (*entry)()) {
    constexpr size_t kBytes = 64 << 10;
    memory_.reset(new char[kBytes]);
#if defined(__x86_64__)
    auto* const top = reinterpret_cast<uintptr_t*>(reinterpret_cast<uintptr_t>(memory_.get() + kBytes) / 16 * 16);
    top[-1] = 0;  // where entry would return to
    top[-2] = reinterpret_cast<uintptr_t>(entry);
    for (int saved = 3; saved <= 8; ++saved) top[-saved] = 0;
    at_ = top - 8;
#else
    getcontext(&at_);
    at_.uc_stack.ss_sp = memory_.get();
    at_.uc_stack.ss_size = kBytes;
    at_.uc_link = nullptr;
    makecontext(&at_, entry, 0);
#endif
  }

  // Goes on with another one until it switches back.
  void switch_to(Stack& other) {
#if defined(__x86_64__)
    emulated_switch(&at_, other.at_);
#else
    swapcontext(&at_, &other.at_);
#endif
  }

 private:
#if defined(__x86_64__)
  void* at_ = nullptr;
#else
  ucontext_t at_;
#endif
  std::unique_ptr<char[]> memory_;
};

}  // namespace emulated

// The threads of an emulated GPU block: fibers. One runs as far as it can before the next warp does, which is the
// schedule that shows a missing barrier.
#pragma once

#include <ucontext.h>

#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <string>
#include <vector>

namespace emulated {

constexpr int kLanes = 32;

struct Range {
  const char* begin;
  int64_t bytes;
  bool holds(const void* at, int64_t count) const {
    const char* const p = static_cast<const char*>(at);
    return p >= begin && p + count <= begin + bytes;
  }
};

struct Options {
  bool late;      // when copies land
  bool reversed;  // which warp runs first
  std::vector<Range> readable;
};

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack;
  bool finished = false;
};

struct Copy {
  int to;
  const void* from;
  int bytes, size;  // bytes are copied, zeros fill up to size
};

// What the lanes of a warp hand to an instruction that they execute together. Two of each, because a lane may be at the
// next instruction while others still read this one's.
struct Collective {
  int arrived[2] = {0, 0};
  int address[2][kLanes];
  uint32_t a[2][kLanes][4], b[2][kLanes][2];
};

class Block {
 public:
  Block(int threads, int shared_bytes, Options options)
      : options(std::move(options)), shared(shared_bytes, '\xff'), fibers_(threads), warps(threads / kLanes) {}

  // Runs body(thread) for every thread of the block.
  void run(const std::function<void(int)>& body) {
    body_ = &body;
    for (size_t t = 0; t < fibers_.size(); ++t) start(static_cast<int>(t));
    bool progress = true;
    while (progress) {
      progress = false;
      for (size_t w = 0; w < warps.size(); ++w) progress |= run_warp(options.reversed ? warps.size() - 1 - w : w);
    }
    for (const Fiber& fiber : fibers_) {
      if (!fiber.finished) fail("a thread waits for ever");
    }
  }

  template <typename Condition>
  void wait_until(const Condition& holds) {
    while (!holds()) {
      swapcontext(&fibers_[current_].context, &scheduler_);
    }
    moved_ = true;
  }

  void fail(const std::string& what) {
    if (error.empty()) error = what;
  }

  int threads() const { return static_cast<int>(fibers_.size()); }

  const Options options;
  std::vector<char> shared;
  std::string error;
  int64_t bank_conflicts = 0;
  int arrived = 0, generation = 0;  // of the barrier

 private:
  static void enter(unsigned high, unsigned low) {
    Block* const block = reinterpret_cast<Block*>(uintptr_t{high} << 32 | low);
    const int thread = block->current_;
    (*block->body_)(thread);
    block->fibers_[thread].finished = true;
    block->moved_ = true;
    swapcontext(&block->fibers_[thread].context, &block->scheduler_);
  }

  void start(int thread) {
    constexpr size_t kStack = 64 << 10;
    Fiber& fiber = fibers_[thread];
    fiber.stack.reset(new char[kStack]);
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = kStack;
    fiber.context.uc_link = nullptr;
    const uintptr_t self = reinterpret_cast<uintptr_t>(this);
    makecontext(&fiber.context, reinterpret_cast<void (*)()>(&Block::enter), 2, static_cast<unsigned>(self >> 32),
                static_cast<unsigned>(self));
  }

  // Until every lane of it is finished or waits for another warp; whether any of them moved at all.
  bool run_warp(size_t warp) {
    bool any = false;
    do {
      moved_ = false;
      for (int lane = 0; lane < kLanes; ++lane) {
        current_ = static_cast<int>(warp) * kLanes + lane;
        if (!fibers_[current_].finished) swapcontext(&scheduler_, &fibers_[current_].context);
      }
      any |= moved_;
    } while (moved_);
    return any;
  }

  const std::function<void(int)>* body_ = nullptr;
  std::vector<Fiber> fibers_;
  ucontext_t scheduler_;
  int current_ = 0;
  bool moved_ = false;

 public:
  std::vector<Collective> warps;
};

}  // namespace emulated

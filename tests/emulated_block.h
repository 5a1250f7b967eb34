// The threads of an emulated GPU block: fibers. One runs as far as it can before the next warp does, which is the
// schedule that shows a missing barrier.
#pragma once

#include <cstdint>
#include <cstring>
#include <functional>
#include <string>
#include <vector>

#include "emulated_fiber.h"

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
  Stack stack;
  bool finished = false;
  int turn = 0;  // of its next exchange
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
    running_ = this;
    for (Fiber& fiber : fibers_) fiber.stack.start(enter);
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
      fibers_[current_].stack.switch_to(scheduler_);
    }
    moved_ = true;
  }

  void fail(const std::string& what) {
    if (error.empty()) error = what;
  }

  int threads() const { return static_cast<int>(fibers_.size()); }
  int thread() const { return current_; }

  // The barrier: no thread goes on before all have come.
  void sync() {
    const int generation = generation_;
    if (++arrived_ == threads()) {
      arrived_ = 0;
      ++generation_;
    }
    wait_until([&] { return generation_ != generation; });
  }

  // Every lane of a warp gives a value and gets those of all, in the order of the lanes.
  std::vector<uint32_t> exchange(uint32_t given) {
    Collective& warp = warps[current_ / kLanes];
    const int turn = fibers_[current_].turn;
    fibers_[current_].turn = 1 - turn;
    warp.a[turn][current_ % kLanes][0] = given;
    if (++warp.arrived[turn] == kLanes) warp.arrived[1 - turn] = 0;
    wait_until([&] { return warp.arrived[turn] == kLanes; });
    std::vector<uint32_t> values;
    for (const auto& lane : warp.a[turn]) values.push_back(lane[0]);
    return values;
  }

  const Options options;
  std::vector<char> shared;
  std::string error;
  int64_t bank_conflicts = 0;

 private:
  static void enter() {
    Block* const block = running_;
    const int thread = block->current_;
    (*block->body_)(thread);
    block->fibers_[thread].finished = true;
    block->moved_ = true;
    block->fibers_[thread].stack.switch_to(block->scheduler_);
  }

  // Until every lane of it is finished or waits for another warp; whether any of them moved at all.
  bool run_warp(size_t warp) {
    bool any = false;
    do {
      moved_ = false;
      for (int lane = 0; lane < kLanes; ++lane) {
        current_ = static_cast<int>(warp) * kLanes + lane;
        if (!fibers_[current_].finished) scheduler_.switch_to(fibers_[current_].stack);
      }
      any |= moved_;
    } while (moved_);
    return any;
  }

  inline static thread_local Block* running_ = nullptr;
  const std::function<void(int)>* body_ = nullptr;
  std::vector<Fiber> fibers_;
  Stack scheduler_;
  int current_ = 0;
  int arrived_ = 0, generation_ = 0;  // of the barrier
  bool moved_ = false;

 public:
  std::vector<Collective> warps;
};

}  // namespace emulated

// What the CPU kernel reads: operands of any strides, packed into panels, and the memory that holds them.
#pragma once

#include <memory>
#include <mutex>
#include <new>

#include "tile_kernel.h"

namespace talos {

constexpr int64_t kWorkspace = int64_t{24} << 20;  // bytes of panels, kept from call to call

// A (samples, tokens, features) array of any strides.
struct Operand {
  const void* data;
  Strides strides;
  int64_t features, entry_bytes;
};

inline constexpr std::align_val_t kCacheLine{64};  // a load across two lines costs two
struct FreeAligned {
  void operator()(void* data) const { ::operator delete(data, kCacheLine); }
};
template <typename T>
using Aligned = std::unique_ptr<T[], FreeAligned>;

// Uninitialised; whole cache lines.
template <typename T>
Aligned<T> aligned(int64_t count) {
  return Aligned<T>(static_cast<T*>(::operator new(count * sizeof(T), kCacheLine)));
}

// Memory for panels. One of up to kWorkspace bytes is kept, because the pages of a new one cost up to a tenth of the
// sums; a call that finds it taken by another thread, or too small, gets its own.
class Workspace {
 public:
  explicit Workspace(int64_t bytes) : lock_(kept_mutex_, std::try_to_lock) {
    if (!lock_.owns_lock() || bytes > kWorkspace) {
      own_ = aligned<char>(bytes);
    } else if (bytes > kept_bytes_) {
      kept_.reset();
      kept_bytes_ = 0;
      kept_ = aligned<char>(bytes);
      kept_bytes_ = bytes;
    }
  }

  char* data() const { return own_ ? own_.get() : kept_.get(); }

 private:
  static inline std::mutex kept_mutex_;
  static inline Aligned<char> kept_;
  static inline int64_t kept_bytes_ = 0;

  std::unique_lock<std::mutex> lock_;
  Aligned<char> own_;
};

struct Bytes {
  void* data;
  int64_t count;
};

// An operand as (samples, features / width, steps, width): for every sample, panels of `width` features, the last one
// filled up with zeros.
class Panels {
 public:
  Panels(const Operand& operand, int64_t width, Pack pack, const TileKernel& kernel, int64_t tokens)
      : operand_(operand),
        width_(width),
        tokens_(tokens),
        pack_(pack),
        across_(tile_count(operand.features, width)),
        step_bytes_(width * kernel.entry_bytes),
        bytes_(tile_count(tokens, kernel.tokens_per_step) * step_bytes_) {}

  int64_t groups() const { return tile_count(across_, kGroup); }
  int64_t sample_bytes() const { return across_ * bytes_; }
  void place(char* data) { data_ = data; }

  // Packs the index-th group of panels of the samples from `first` on; returns where it lies.
  Bytes pack(int64_t first, int64_t index) const {
    const int64_t sample = index / groups(), panel = index % groups() * kGroup, feature = panel * width_;
    const int64_t panels = tile_extent(panel, across_, kGroup);
    const int64_t offset = (first + sample) * operand_.strides.sample + feature * operand_.strides.feature;
    char* const to = data_ + (sample * across_ + panel) * bytes_;
    pack_(static_cast<const char*>(operand_.data) + offset * operand_.entry_bytes, operand_.strides, tokens_,
          tile_extent(feature, operand_.features, kGroup * width_), to);
    return {to, panels * bytes_};
  }

  const void* at(int64_t sample, int64_t feature, int64_t step) const {
    return data_ + (sample * across_ + feature / width_) * bytes_ + step * step_bytes_;
  }

 private:
  static constexpr int64_t kGroup = 16;  // panels of one piece of work

  Operand operand_;
  int64_t width_, tokens_;
  Pack pack_;
  int64_t across_, step_bytes_, bytes_;
  char* data_ = nullptr;
};

}  // namespace talos

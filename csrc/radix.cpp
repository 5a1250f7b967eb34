// The CPU implementation of radix_histogram_. Counts are integers, so threads add theirs in any order.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <array>
#include <cstring>
#include <mutex>

#include "check.h"
#include "radix.h"

namespace talos {

constexpr int64_t kGrainEntries = 1 << 18;  // of one thread: some 300 microseconds
constexpr int64_t kBlockEntries = 32;       // looked at together, to pass over those without a match
constexpr int kCopies = 4;                  // neighbours that are equal do not wait for each other's count

struct Histogram {
  std::array<std::array<uint32_t, kBins>, kCopies> bins{};
  int64_t invalid = 0;
};

void count_entries(const uint32_t* entries, int64_t count, const Digit& digit, Histogram& histogram) {
  for (int64_t e = 0; e < count; ++e) {
    if (digit.matches(entries[e])) ++histogram.bins[e % kCopies][digit.bin(entries[e])];
  }
}

// Every entry has the first digit; few match the digits after it.
void count_blocks(const uint32_t* entries, int64_t count, const Digit& digit, bool first, Histogram& histogram) {
  for (int64_t begin = 0; begin < count; begin += kBlockEntries) {
    const uint32_t* const block = entries + begin;
    const int64_t inside = tile_extent(begin, count, kBlockEntries);
    if (inside == kBlockEntries) {
      uint32_t invalid = 0, matches = 0;
      for (int64_t e = 0; e < kBlockEntries; ++e) invalid += !is_score(block[e]);
      for (int64_t e = 0; e < kBlockEntries; ++e) matches += digit.matches(block[e]);
      if (first) histogram.invalid += invalid;
      if (matches == 0) continue;
    } else if (first) {
      for (int64_t e = 0; e < inside; ++e) histogram.invalid += !is_score(block[e]);
    }
    count_entries(block, inside, digit, histogram);
  }
}

void radix_histogram_cpu(Tensor counts, Tensor scores, int64_t digit, int64_t prefix) {
  check_radix_histogram(counts, scores, digit);
  const Digit place(static_cast<int>(digit), static_cast<uint32_t>(prefix));
  const uint32_t* const entries = static_cast<const uint32_t*>(scores.const_data_ptr());
  int64_t* const to = counts.mutable_data_ptr<int64_t>();
  std::mutex mutex;
  torch::stable::parallel_for(0, scores.numel(), kGrainEntries, [&](int64_t begin, int64_t end) {
    // A count of 32 bits holds what one thread sees in 2^32 entries.
    for (; begin < end; begin += int64_t{1} << 32) {
      Histogram own;
      count_blocks(entries + begin, tile_extent(begin, end, int64_t{1} << 32), place, digit == 0, own);
      const std::lock_guard<std::mutex> lock(mutex);
      for (const auto& bins : own.bins) {
        for (int b = 0; b < kBins; ++b) to[b] += bins[b];
      }
      to[kInvalid] += own.invalid;
    }
  });
}

}  // namespace talos

STABLE_TORCH_LIBRARY_IMPL(talos_fast, CPU, m) { m.impl("radix_histogram_", TORCH_BOX(&talos::radix_histogram_cpu)); }

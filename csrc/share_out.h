// Work of uneven pieces on all threads.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>

namespace talos {

// Calls work(index) for every index below `count`: whichever of at most `threads` threads is free takes the next one,
// with a `work` that make_worker() made for it alone.
template <typename MakeWorker>
void share_out(int64_t count, int64_t threads, const MakeWorker& make_worker) {
  std::atomic<int64_t> next{0};
  torch::stable::parallel_for(0, std::min(count, threads), 1, [&](int64_t, int64_t) {
    auto work = make_worker();
    for (int64_t index; (index = next.fetch_add(1)) < count;) work(index);
  });
}

}  // namespace talos

// What the parts of the emulated CUDA runtime share: streams, and work as closures. Work runs as late as CUDA allows,
// when something waits for its stream or event; in a stream that is being captured, when the graph is launched. So what
// the host reads or rewrites too early shows, as it seldom does on a GPU.
#pragma once

#include <cuda_runtime_api.h>

#include <chrono>
#include <deque>
#include <functional>
#include <map>
#include <mutex>
#include <vector>

namespace emulated {

using Work = std::function<void()>;

struct Graph {
  unsigned long long id;
  std::vector<Work> work;
};

struct Stream {
  std::deque<Work> work;
  Graph* capture = nullptr;
};

struct Event {
  std::chrono::steady_clock::time_point at;
  cudaStream_t stream = nullptr;
  Graph* capture = nullptr;  // of the stream when the event was recorded
  int pending = 0;           // records that have not run
  bool recorded = false;
};

extern std::recursive_mutex mutex;  // of everything here
extern std::map<cudaStream_t, Stream> streams;
extern thread_local cudaError_t last_error;

inline cudaError_t fail(cudaError_t error) { return last_error = error; }

void submit(cudaStream_t stream, Work work);

// Runs what a stream holds until `until`, or all of it. An error in the work is the device's, and so is told here.
cudaError_t run(cudaStream_t stream, const std::function<bool()>& until = [] { return false; });

// As when the host waits for the whole device, which no capture allows.
cudaError_t run_all();

}  // namespace emulated

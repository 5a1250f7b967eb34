// Streams, events, captures and graphs of the emulated CUDA runtime.
#include "streams.h"

#include <cstdio>
#include <exception>
#include <memory>
#include <string>

#define CUDA extern "C" cudaError_t

namespace emulated {

std::recursive_mutex mutex;
std::map<cudaStream_t, Stream> streams;
thread_local cudaError_t last_error = cudaSuccess;

static Event* of(cudaEvent_t event) { return reinterpret_cast<Event*>(event); }

void submit(cudaStream_t stream, Work work) {
  const std::lock_guard lock(mutex);
  Stream& to = streams[stream];
  if (to.capture != nullptr) {
    to.capture->work.push_back(std::move(work));
  } else {
    to.work.push_back(std::move(work));
  }
}

cudaError_t run(cudaStream_t stream, const std::function<bool()>& until) {
  const std::lock_guard lock(mutex);
  std::deque<Work>& work = streams[stream].work;
  while (!work.empty() && !until()) {
    const Work next = std::move(work.front());
    work.pop_front();
    try {
      next();
    } catch (const std::exception& error) {
      const std::string what = error.what();
      std::fprintf(stderr, "emulated CUDA: an error on the device: %s\n", what.substr(0, what.find('\n')).c_str());
      return fail(cudaErrorAssert);
    }
  }
  return cudaSuccess;
}

static bool is_capturing() {
  for (const auto& [stream, state] : streams) {
    if (state.capture != nullptr) return true;
  }
  return false;
}

cudaError_t run_all() {
  const std::lock_guard lock(mutex);
  if (is_capturing()) return fail(cudaErrorStreamCaptureUnsupported);
  std::vector<cudaStream_t> all;
  for (const auto& [stream, state] : streams) all.push_back(stream);
  for (const cudaStream_t stream : all) {
    if (const cudaError_t error = run(stream)) return error;
  }
  return cudaSuccess;
}

static cudaError_t wait_for(Event* event) {
  return run(event->stream, [event] { return event->pending == 0; });
}

template <typename T, typename Handle>
static cudaError_t make(Handle* handle) {
  *handle = reinterpret_cast<Handle>(new T);
  return cudaSuccess;
}

}  // namespace emulated

using namespace emulated;

// For the emulated operators: work that others wrote.
extern "C" void emulated_submit(cudaStream_t stream, void (*run)(void*), void (*drop)(void*), void* data) {
  const std::shared_ptr<void> owned(data, drop);
  submit(stream, [run, owned] { run(owned.get()); });
}

CUDA cudaStreamCreateWithPriority(cudaStream_t* stream, unsigned, int) { return make<char>(stream); }
CUDA cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned) { return make<char>(stream); }
CUDA cudaStreamDestroy(cudaStream_t stream) { return run(stream); }
CUDA cudaDeviceSynchronize() { return run_all(); }

CUDA cudaStreamSynchronize(cudaStream_t stream) {
  const std::lock_guard lock(mutex);
  return is_capturing() ? fail(cudaErrorStreamCaptureUnsupported) : run(stream);
}

CUDA cudaStreamQuery(cudaStream_t stream) { return cudaStreamSynchronize(stream); }

CUDA cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned) {
  const std::lock_guard lock(mutex);
  Event* const awaited = of(event);
  if (awaited->capture != nullptr) {
    streams[stream].capture = awaited->capture;  // it joins the capture
  } else if (awaited->pending > 0 && awaited->stream != stream) {
    submit(stream, [awaited] { wait_for(awaited); });
  }
  return cudaSuccess;
}

CUDA cudaEventCreateWithFlags(cudaEvent_t* event, unsigned) { return make<Event>(event); }
CUDA cudaEventCreate(cudaEvent_t* event) { return make<Event>(event); }
CUDA cudaEventDestroy(cudaEvent_t) { return cudaSuccess; }  // work that has not run may still name it

CUDA cudaEventRecord(cudaEvent_t given, cudaStream_t stream) {
  const std::lock_guard lock(mutex);
  Event* const event = of(given);
  event->recorded = true;
  event->stream = stream;
  event->capture = streams[stream].capture;
  if (event->capture != nullptr) return cudaSuccess;
  ++event->pending;
  submit(stream, [event] {
    event->at = std::chrono::steady_clock::now();
    --event->pending;
  });
  return cudaSuccess;
}

CUDA cudaEventRecordWithFlags(cudaEvent_t event, cudaStream_t stream, unsigned) {
  return cudaEventRecord(event, stream);
}

// Not ready when first asked, and then the device goes on.
CUDA cudaEventQuery(cudaEvent_t given) {
  const std::lock_guard lock(mutex);
  Event* const event = of(given);
  if (event->capture != nullptr) return fail(cudaErrorCapturedEvent);
  if (event->pending == 0) return cudaSuccess;
  const cudaError_t error = wait_for(event);
  return error != cudaSuccess ? error : cudaErrorNotReady;
}

CUDA cudaEventSynchronize(cudaEvent_t event) {
  const std::lock_guard lock(mutex);
  return of(event)->capture != nullptr ? fail(cudaErrorCapturedEvent) : wait_for(of(event));
}

CUDA cudaEventElapsedTime(float* milliseconds, cudaEvent_t begin, cudaEvent_t end) {
  if (!of(begin)->recorded || !of(end)->recorded) return fail(cudaErrorInvalidResourceHandle);
  if (of(begin)->pending + of(end)->pending > 0) return fail(cudaErrorNotReady);
  *milliseconds = std::chrono::duration<float, std::milli>(of(end)->at - of(begin)->at).count();
  return cudaSuccess;
}

CUDA cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode*) { return cudaSuccess; }

CUDA cudaStreamGetCaptureInfo(cudaStream_t stream, cudaStreamCaptureStatus* status, unsigned long long* id,
                              cudaGraph_t* graph, const cudaGraphNode_t** nodes, const cudaGraphEdgeData** edges,
                              size_t* count) {
  const std::lock_guard lock(mutex);
  Graph* const capture = streams[stream].capture;
  *status = capture != nullptr ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusNone;
  if (id != nullptr) *id = capture != nullptr ? capture->id : 0;
  if (graph != nullptr) *graph = reinterpret_cast<cudaGraph_t>(capture);
  if (nodes != nullptr) *nodes = nullptr;
  if (edges != nullptr) *edges = nullptr;
  if (count != nullptr) *count = 0;
  return cudaSuccess;
}

CUDA cudaStreamIsCapturing(cudaStream_t stream, cudaStreamCaptureStatus* status) {
  return cudaStreamGetCaptureInfo(stream, status, nullptr, nullptr, nullptr, nullptr, nullptr);
}

CUDA cudaStreamBeginCapture(cudaStream_t stream, cudaStreamCaptureMode) {
  static unsigned long long captures = 0;
  const std::lock_guard lock(mutex);
  if (stream == nullptr) return fail(cudaErrorStreamCaptureUnsupported);
  streams[stream].capture = new Graph{++captures, {}};  // kept: a replay may not have run when the graph is dropped
  return cudaSuccess;
}

CUDA cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t* graph) {
  const std::lock_guard lock(mutex);
  Graph* const capture = streams[stream].capture;
  for (auto& [other, state] : streams) {
    if (state.capture == capture) state.capture = nullptr;
  }
  *graph = reinterpret_cast<cudaGraph_t>(capture);
  return capture != nullptr ? cudaSuccess : fail(cudaErrorIllegalState);
}

CUDA cudaGraphInstantiateWithFlags(cudaGraphExec_t* instance, cudaGraph_t graph, unsigned long long) {
  *instance = reinterpret_cast<cudaGraphExec_t>(graph);
  return cudaSuccess;
}

CUDA cudaGraphInstantiate(cudaGraphExec_t* instance, cudaGraph_t graph, unsigned long long flags) {
  return cudaGraphInstantiateWithFlags(instance, graph, flags);
}

CUDA cudaGraphGetNodes(cudaGraph_t graph, cudaGraphNode_t*, size_t* count) {
  *count = reinterpret_cast<Graph*>(graph)->work.size();
  return cudaSuccess;
}

CUDA cudaGraphLaunch(cudaGraphExec_t instance, cudaStream_t stream) {
  submit(stream, [graph = reinterpret_cast<Graph*>(instance)] {
    for (const Work& work : graph->work) work();
  });
  return cudaSuccess;
}

CUDA cudaGraphDestroy(cudaGraph_t) { return cudaSuccess; }
CUDA cudaGraphExecDestroy(cudaGraphExec_t) { return cudaSuccess; }
CUDA cudaUserObjectCreate(cudaUserObject_t* object, void*, cudaHostFn_t, unsigned, unsigned) {
  *object = nullptr;
  return cudaSuccess;
}
CUDA cudaGraphRetainUserObject(cudaGraph_t, cudaUserObject_t, unsigned, unsigned) { return cudaSuccess; }

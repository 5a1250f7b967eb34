// The device of the emulated CUDA runtime, and its memory, which is the host's. Its library stands for the driver too
// (libcuda.so.1); what is not here is the real runtime's, which finds no device and says so.
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "streams.h"

#define CUDA extern "C" cudaError_t

using namespace emulated;

static const size_t kMemory = size_t{8} << 30;
static const size_t kAlignment = 16;  // of the widest vectors; CUDA's own is at least 256
static const int kMultiprocessors = 8;
static std::map<char*, size_t> on_device, pinned;
static size_t allocated = 0;

static bool holds(const std::map<char*, size_t>& blocks, const void* pointer) {
  char* const at = static_cast<char*>(const_cast<void*>(pointer));
  auto block = blocks.upper_bound(at);
  return block != blocks.begin() && (--block, at < block->first + block->second);
}

// A block ends where a page begins that may not be touched, up to its alignment. What it does not use of its pages
// holds 0xff: NaN to who reads it, and looked at when the block is given back.
struct Pages {
  size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE)), open, inside;

  explicit Pages(size_t bytes)
      : open((bytes + kAlignment + page - 1) / page * page),
        inside((bytes + kAlignment - 1) / kAlignment * kAlignment) {}

  char* first(char* block) const { return block + inside - open; }
};

CUDA cudaMalloc(void** memory, size_t bytes) {
  const std::lock_guard lock(mutex);
  if (allocated + bytes > kMemory) return fail(cudaErrorMemoryAllocation);
  const Pages pages(bytes);
  void* const first =
      mmap(nullptr, pages.open + pages.page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (first == MAP_FAILED) return fail(cudaErrorMemoryAllocation);
  char* const end = static_cast<char*>(first) + pages.open;
  if (mprotect(end, pages.page, PROT_NONE) != 0) {
    munmap(first, pages.open + pages.page);
    return fail(cudaErrorMemoryAllocation);
  }
  std::memset(first, 0xff, pages.open);  // NaN: what nobody wrote
  *memory = end - pages.inside;
  on_device[static_cast<char*>(*memory)] = bytes;
  allocated += bytes;
  return cudaSuccess;
}

CUDA cudaFree(void* memory) {
  const std::lock_guard lock(mutex);
  if (memory == nullptr) return cudaSuccess;
  if (const cudaError_t error = run_all()) return error;
  const auto block = on_device.find(static_cast<char*>(memory));
  if (block == on_device.end()) return fail(cudaErrorInvalidValue);
  const auto [begin, bytes] = *block;
  const Pages pages(bytes);
  char* const first = pages.first(begin);
  const auto untouched = [](char byte) { return byte == '\xff'; };
  if (!std::all_of(first, begin, untouched) || !std::all_of(begin + bytes, begin + pages.inside, untouched)) {
    std::fprintf(stderr, "emulated CUDA: something was written beside a block of %zu bytes\n", bytes);
    std::abort();
  }
  munmap(first, pages.open + pages.page);
  allocated -= bytes;
  on_device.erase(block);
  return cudaSuccess;
}

CUDA cudaMemGetInfo(size_t* free, size_t* total) {
  const std::lock_guard lock(mutex);
  *free = kMemory - allocated;
  *total = kMemory;
  return cudaSuccess;
}

CUDA cudaHostAlloc(void** memory, size_t bytes, unsigned) {
  const std::lock_guard lock(mutex);
  if (posix_memalign(memory, 4096, bytes) != 0) return fail(cudaErrorMemoryAllocation);
  pinned[static_cast<char*>(*memory)] = bytes;
  return cudaSuccess;
}

CUDA cudaFreeHost(void* memory) {
  const std::lock_guard lock(mutex);
  if (const cudaError_t error = run_all()) return error;
  pinned.erase(static_cast<char*>(memory));
  std::free(memory);
  return cudaSuccess;
}

CUDA cudaPointerGetAttributes(cudaPointerAttributes* about, const void* pointer) {
  const std::lock_guard lock(mutex);
  *about = {};
  if (holds(on_device, pointer)) {
    about->type = cudaMemoryTypeDevice;
  } else if (holds(pinned, pointer)) {
    about->type = cudaMemoryTypeHost;
    about->hostPointer = const_cast<void*>(pointer);
  } else {
    return cudaSuccess;
  }
  about->devicePointer = const_cast<void*>(pointer);
  return cudaSuccess;
}

CUDA cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind, cudaStream_t stream) {
  const std::lock_guard lock(mutex);
  const auto known = [](const void* at) { return holds(on_device, at) || holds(pinned, at); };
  submit(stream, [=] { std::memcpy(to, from, bytes); });
  return known(to) && known(from) ? cudaSuccess : cudaStreamSynchronize(stream);  // the host waits for pageable memory
}

CUDA cudaMemcpy(void* to, const void* from, size_t bytes, cudaMemcpyKind) {
  if (const cudaError_t error = run_all()) return error;
  std::memcpy(to, from, bytes);
  return cudaSuccess;
}

CUDA cudaMemsetAsync(void* to, int value, size_t bytes, cudaStream_t stream) {
  submit(stream, [=] { std::memset(to, value, bytes); });
  return cudaSuccess;
}

CUDA cudaGetDeviceCount(int* count) {
  *count = 1;
  return cudaSuccess;
}

CUDA cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}

CUDA cudaSetDevice(int device) { return device == 0 ? cudaSuccess : fail(cudaErrorInvalidDevice); }

CUDA cudaGetDeviceProperties(cudaDeviceProp* about, int) {
  *about = {};
  std::strcpy(about->name, "emulated on the CPU");
  about->totalGlobalMem = kMemory;
  about->major = 9;
  about->multiProcessorCount = kMultiprocessors;
  about->warpSize = 32;
  about->maxThreadsPerBlock = 1024;
  about->maxThreadsPerMultiProcessor = 2048;
  about->sharedMemPerBlock = 48 << 10;
  about->sharedMemPerBlockOptin = 227 << 10;
  about->maxGridSize[0] = 2147483647;
  about->maxGridSize[1] = about->maxGridSize[2] = 65535;
  return cudaSuccess;
}

CUDA cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  *value = attribute == cudaDevAttrMultiProcessorCount ? kMultiprocessors : 0;
  return cudaSuccess;
}

CUDA cudaDeviceGetStreamPriorityRange(int* least, int* greatest) {
  *least = 0;
  *greatest = -5;
  return cudaSuccess;
}

CUDA cudaDeviceCanAccessPeer(int* can, int, int) {
  *can = 0;
  return cudaSuccess;
}

CUDA cudaRuntimeGetVersion(int* version) {
  *version = CUDART_VERSION;
  return cudaSuccess;
}

CUDA cudaDriverGetVersion(int* version) { return cudaRuntimeGetVersion(version); }

CUDA cudaPeekAtLastError() { return last_error; }

CUDA cudaGetLastError() {
  const cudaError_t error = last_error;
  last_error = cudaSuccess;
  return error;
}

// torch's own kernels are machine code of a GPU. One that is asked for has no emulation in operators.cpp.
static cudaError_t refuse() {
  std::fprintf(stderr, "emulated CUDA: a kernel of torch's own was launched\n");
  return fail(cudaErrorNotSupported);
}
CUDA cudaLaunchKernel(const void*, dim3, dim3, void**, size_t, cudaStream_t) { return refuse(); }
CUDA cudaLaunchKernelExC(const cudaLaunchConfig_t*, const void*, void**) { return refuse(); }
CUDA __cudaLaunchKernel(cudaKernel_t, dim3, dim3, void**, size_t, cudaStream_t) { return refuse(); }

CUDA cudaFuncSetAttribute(const void*, cudaFuncAttribute, int) { return cudaSuccess; }

CUDA cudaFuncGetAttributes(cudaFuncAttributes* about, const void*) {
  *about = {};
  about->binaryVersion = about->ptxVersion = 90;
  about->maxThreadsPerBlock = 1024;
  return cudaSuccess;
}

static int do_nothing() { return 0; }

CUDA cudaGetDriverEntryPointByVersion(const char*, void** function, unsigned, unsigned long long,
                                      cudaDriverEntryPointQueryResult* result) {
  *function = reinterpret_cast<void*>(do_nothing);
  if (result != nullptr) *result = cudaDriverEntryPointSuccess;
  return cudaSuccess;
}

// Of the driver, what autograd asks.
extern "C" int cuDevicePrimaryCtxGetState(int, unsigned* flags, int* active) {
  *flags = 0;
  *active = 1;
  return 0;
}

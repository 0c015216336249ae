#include "runtime.h"

#include <cuda_runtime.h>

#include <atomic>
#include <stdexcept>
#include <string>

#include <torch/csrc/inductor/aoti_torch/c/shim.h>

namespace fastcache::cuda {

namespace {

constexpr int kMostDevices = 64;

__device__ int32_t flag;  // zero in every context that loads the library

void must(cudaError_t code, const char* call) {
  if (code != cudaSuccess)
    throw std::runtime_error(std::string("fastcache: ") + call + ": " + cudaGetErrorString(code));
}
#define FASTCACHE_MUST(call) must((call), #call)

}  // namespace

DeviceScope::DeviceScope(int32_t device) {
  int current = -1;
  FASTCACHE_MUST(cudaGetDevice(&current));
  if (current == device) return;
  FASTCACHE_MUST(cudaSetDevice(device));
  before_ = current;
}

DeviceScope::~DeviceScope() {
  if (before_ >= 0) cudaSetDevice(before_);
}

void* current_stream(int32_t device) {
  void* stream = nullptr;
  if (aoti_torch_get_current_cuda_stream(device, &stream) != 0)
    throw std::runtime_error("fastcache: PyTorch has no current CUDA stream");
  return stream;
}

int multiprocessors(int32_t device) {
  static std::atomic<int> known[kMostDevices] = {};
  int count = device < kMostDevices ? known[device].load(std::memory_order_relaxed) : 0;
  if (count > 0) return count;
  FASTCACHE_MUST(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device));
  if (device < kMostDevices) known[device].store(count, std::memory_order_relaxed);
  return count;
}

int32_t* error_flag(int32_t device) {
  static std::atomic<void*> known[kMostDevices] = {};
  void* address = device < kMostDevices ? known[device].load(std::memory_order_relaxed) : nullptr;
  if (address == nullptr) {
    FASTCACHE_MUST(cudaGetSymbolAddress(&address, flag));
    if (device < kMostDevices) known[device].store(address, std::memory_order_relaxed);
  }
  return static_cast<int32_t*>(address);
}

int32_t take_errors(int32_t device) {
  const DeviceScope scope(device);
  const int32_t none = 0;
  int32_t bits = 0;
  FASTCACHE_MUST(cudaDeviceSynchronize());
  FASTCACHE_MUST(cudaMemcpy(&bits, error_flag(device), sizeof bits, cudaMemcpyDeviceToHost));
  FASTCACHE_MUST(cudaMemcpy(error_flag(device), &none, sizeof none, cudaMemcpyHostToDevice));
  return bits;
}

void clear(void* data, int64_t bytes, void* stream) {
  FASTCACHE_MUST(cudaMemsetAsync(data, 0, bytes, static_cast<cudaStream_t>(stream)));
}

void check_launch() { must(cudaGetLastError(), "kernel launch"); }

}  // namespace fastcache::cuda

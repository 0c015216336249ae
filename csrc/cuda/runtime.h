// What the operators need of a GPU besides kernels. runtime.cu implements it with CUDA,
// tests/emulator/runtime.cpp with a CPU.
#pragma once

#include <cstdint>

namespace fastcache::cuda {

// Makes a device current, and the one before at the end.
class DeviceScope {
 public:
  explicit DeviceScope(int32_t device);
  ~DeviceScope();
  DeviceScope(const DeviceScope&) = delete;
  DeviceScope& operator=(const DeviceScope&) = delete;

 private:
  int before_ = -1;
};

void* current_stream(int32_t device);  // PyTorch's
int multiprocessors(int32_t device);
int32_t* error_flag(
    int32_t device);  // in the memory of the device; kernels set its bits, nothing clears it but take_errors
int32_t take_errors(int32_t device);  // reads and clears the flag after all work on the device; waits
void clear(void* data, int64_t bytes, void* stream);
void check_launch();  // throws if the last launch failed

[[noreturn]] void refuse_size();  // x is larger than one launch can address

}  // namespace fastcache::cuda

// A CPU in the place of the GPU: csrc/cuda/runtime.h for the emulator, the operators under the name
// fastcache_emulated, and outputs that are surrounded by sentinels.
#include "../../csrc/cuda/runtime.h"

#include <cstdlib>
#include <cstring>
#include <utility>
#include <vector>

#include "../../csrc/cuda/residual_update.h"
#include "../../csrc/cuda/token_operators.h"
#include "block_emulator.h"

#define FASTCACHE_EXPORT extern "C" __attribute__((visibility("default")))

namespace fastcache::cuda {

namespace {

int32_t flag = 0;
int processors = 1;

}  // namespace

DeviceScope::DeviceScope(int32_t) {}
DeviceScope::~DeviceScope() {}
void* current_stream(int32_t) { return nullptr; }
int multiprocessors(int32_t) { return processors; }
int32_t* error_flag(int32_t) { return &flag; }
int32_t take_errors(int32_t) { return std::exchange(flag, 0); }
void clear(void* data, int64_t bytes, void*) { std::memset(data, 0, bytes); }
void check_launch() {}

FASTCACHE_EXPORT void emulator_seed(unsigned value) { emulator::seed(value); }

// Thread blocks and threads of the last launch.
FASTCACHE_EXPORT void emulator_last_launch(int64_t* out) {
  out[0] = int64_t{emulator::grid_size_.x} * emulator::grid_size_.y * emulator::grid_size_.z;
  out[1] = emulator::block_size_.x;
}

FASTCACHE_EXPORT void emulator_multiprocessors(int count) { processors = count; }

}  // namespace fastcache::cuda

// The build gives arguments.cpp this function for aoti_torch_empty_strided: memory full of 0xff (NaN),
// of which the output is the middle.
namespace {

constexpr int64_t kGuard = 256;  // bytes on each side

struct Guarded {
  unsigned char* data;
  int64_t bytes;
};
std::vector<Guarded> guarded;
std::vector<AtenTensorHandle> kept;

}  // namespace

extern "C" AOTITorchError emulated_empty_strided(int64_t rank, const int64_t* sizes, const int64_t* strides,
                                                 int32_t dtype, int32_t device_type, int32_t device_index,
                                                 AtenTensorHandle* out) {
  static const int32_t widths[][2] = {{aoti_torch_dtype_float32(), 4},
                                      {aoti_torch_dtype_float16(), 2},
                                      {aoti_torch_dtype_bfloat16(), 2},
                                      {aoti_torch_dtype_int32(), 4}};
  int64_t element = 0, elements = 1;
  for (const auto& width : widths) element = width[0] == dtype ? width[1] : element;
  for (int64_t i = 0; i < rank; ++i) elements *= sizes[i];
  const int64_t guard = element ? kGuard / element : 0, all = elements + 2 * guard, one = 1;
  AtenTensorHandle whole = nullptr;
  if (element == 0 || aoti_torch_empty_strided(1, &all, &one, dtype, device_type, device_index, &whole) != 0)
    return 1;
  void* data = nullptr;
  if (aoti_torch_get_data_ptr(whole, &data) != 0) return 1;
  std::memset(data, 0xff, all * element);
  kept.push_back(whole);
  guarded.push_back({static_cast<unsigned char*>(data), elements * element});
  return aoti_torch__reinterpret_tensor(whole, rank, sizes, strides, guard, out);
}

// Number of sentinel bytes beside the outputs since the last call that something wrote.
FASTCACHE_EXPORT int64_t emulator_damage() {
  int64_t damaged = 0;
  for (const Guarded& memory : guarded) {
    for (int64_t i = 0; i < kGuard; ++i)
      damaged += (memory.data[i] != 0xff) + (memory.data[kGuard + memory.bytes + i] != 0xff);
  }
  for (AtenTensorHandle handle : kept) aoti_torch_delete_tensor_object(handle);
  guarded.clear();
  kept.clear();
  return damaged;
}

#define FASTCACHE_OP(schema) library.def(schema);
STABLE_TORCH_LIBRARY(EMULATED_NAMESPACE, library) {
#include "schema.def"
}

STABLE_TORCH_LIBRARY_IMPL(EMULATED_NAMESPACE, CPU, library) {
  library.impl("residual_update", &fastcache::cuda::residual_update);
  library.impl("residual_update_scatter_", &fastcache::cuda::residual_update_scatter);
  library.impl("select_tokens_", &fastcache::cuda::select_tokens);
  library.impl("row_score", &fastcache::cuda::row_score);
  library.impl("value_norm", &fastcache::cuda::value_norm);
  library.impl("relative_error", &fastcache::cuda::relative_error);
}

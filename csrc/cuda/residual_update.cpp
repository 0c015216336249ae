// residual_update and residual_update_scatter_ on a GPU: checked arguments become the parameters of
// one launch (two with error sums, and a memset with packed rows). Nothing here waits for the GPU,
// and memory comes from PyTorch's allocator, so that a call can be captured in a CUDA graph.
#include "residual_update.h"

#include <optional>

#include "../arguments.h"
#include "../overlap.h"
#include "config.h"
#include "launch.h"
#include "parameters.h"
#include "runtime.h"

namespace fastcache {

namespace cuda {

void refuse_size() { fail("x: too large for one launch on a GPU; split the batch"); }

}  // namespace cuda

namespace {

using cuda::Call;

void* new_rows(Outputs& outputs, int index, const Tensor& x, int64_t rows) {
  const int64_t sizes[] = {x.sizes[0], rows, x.sizes[2]};
  return outputs.add(index, x.dtype, 3, sizes);
}

// Memory that a launch needs and its caller does not; PyTorch's allocator hands it out again in stream order.
class Workspace {
 public:
  Workspace(const Tensor& x, int64_t floats)
      : outputs_(x), data_(static_cast<float*>(outputs_.add(kErrors, float32_dtype(), 1, &floats))) {}
  float* data() const { return data_; }

 private:
  Outputs outputs_;
  float* data_;
};

template <Type X>
void launch_typed(const Call& call, bool rows) {
  rows ? cuda::launch_rows<X>(call) : cuda::launch_sum<X>(call);
}

void launch_update(const Call& call, bool rows) {
  switch (call.common.x_type) {
    case Type::kFloat32:
      return launch_typed<Type::kFloat32>(call, rows);
    case Type::kFloat16:
      return launch_typed<Type::kFloat16>(call, rows);
    default:
      return launch_typed<Type::kBFloat16>(call, rows);
  }
}

void run(const Arguments& a, Outputs& outputs) {
  a.check();
  if (a.scatter) check_slot_memory(a);
  const bool rows = cuda::needs_rows(a);
  if (rows && a.x.sizes[2] > cuda::kMostChannels) {
    fail("x: at most " + std::to_string(cuda::kMostChannels) +
         " channels with norm, reference or a float8 slot on a GPU, got " + std::to_string(a.x.sizes[2]) +
         "; use FASTCACHE_BACKEND=eager");
  }
  const cuda::DeviceScope scope(a.x.device_index);
  Call call{};
  call.common = cuda::common_of(a);
  call.stream = cuda::current_stream(a.x.device_index);
  cuda::Common& p = call.common;
  if (a.need_x) p.updated = new_rows(outputs, kUpdated, a.x, p.N);
  if (a.norm != 0) {
    p.modulated = new_rows(outputs, kModulated, a.x, p.target_count);
    const int64_t bytes = int64_t(p.B) * p.target_count * p.D * a.x.element;
    if (a.row_slots && bytes > 0) cuda::clear(p.modulated, bytes, call.stream);  // rows that no token maps to
  }
  std::optional<Workspace> workspace;
  float* errors = nullptr;
  if (a.reference) {
    const int64_t sizes[] = {p.B, 3};
    errors = static_cast<float*>(outputs.add(kErrors, float32_dtype(), 2, sizes));
    workspace.emplace(a.x, int64_t(p.B) * p.N * 3);
    p.row_errors = workspace->data();
  }
  if (!a.x.empty() && (a.need_x || a.scatter || rows)) {
    p.error_flag = cuda::error_flag(a.x.device_index);
    std::unique_ptr<cuda::TokenRows[]> features(new cuda::TokenRows[a.feature_count]);
    for (int64_t j = 0; j < a.feature_count; ++j) features[j] = cuda::token_rows(a.features[j]);
    call.features = features.get(), call.feature_count = static_cast<int32_t>(a.feature_count);
    call.width = cuda::width_of(a);
    call.device = a.x.device_index;
    call.multiprocessors = cuda::multiprocessors(a.x.device_index);
    launch_update(call, rows);
  }
  if (errors && p.B > 0) cuda::launch_errors(p.row_errors, errors, p.B, a.x.empty() ? 0 : p.N, call.stream);
}

void call_boxed(StableIValue* stack, uint64_t inputs, uint64_t outputs, bool scatter) {
  const Arguments arguments(stack, inputs, outputs, scatter);
  Outputs results(arguments.x);
  run(arguments, results);
  results.release(stack);
}

}  // namespace

void cuda::residual_update(StableIValue* stack, uint64_t inputs, uint64_t outputs) {
  call_boxed(stack, inputs, outputs, false);
}

void cuda::residual_update_scatter(StableIValue* stack, uint64_t inputs, uint64_t outputs) {
  call_boxed(stack, inputs, outputs, true);
}

}  // namespace fastcache

// Bits of bad values that kernels found in index tensors of this device since the last call: 1 gate_index,
// 2 fresh_slots or row_slots, 4 counts. Waits for the device; -1 if it cannot be asked.
extern "C" __attribute__((visibility("default"))) int32_t fastcache_cuda_error_flag(int32_t device) {
  try {
    return fastcache::cuda::take_errors(device);
  } catch (...) {
    return -1;
  }
}

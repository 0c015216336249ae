// Launcher of residual_update on a GPU: the trunk sum. All other forms say that they are still to
// come; fastcache.backends runs them elsewhere.
#include <cuda_runtime.h>

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/macros.h>

#include "arguments.h"
#include "fastcache/residual_update.cuh"

namespace fastcache {

namespace {

using cuda::Feature;
using cuda::GateType;
using cuda::TrunkSum;

[[noreturn]] void to_come(const char* what) {
  fail(std::string("residual_update: ") + what + " is not implemented in the cuda backend yet; use FASTCACHE_BACKEND=eager or fastcache.backends.use_backend(\"eager\")");
}

void check_form(const Arguments& a) {
  if (a.scatter) to_come("residual_update_scatter_");
  if (a.norm != 0) to_come("norm, the modulated output,");
  if (a.reference) to_come("reference, the error sums,");
  if (!a.need_x) to_come("need_x=False");
  if (a.scales) to_come("scales, compressed features,");
  if (a.feature_count > 0 && a.features[0].type == Type::kFloat8) to_come("a float8 feature");
  if (a.gates && vector_of(a.gates, a.x.sizes[1], static_cast<bool>(a.gate_index)).row != 0) to_come("a gate per frame or per token");
}

GateType gate_type(const Tensor& gates) {
  if (!gates) return GateType::kNone;
  if (gates.type == Type::kFloat32) return GateType::kFloat32;
  return gates.type == Type::kFloat16 ? GateType::kFloat16 : GateType::kBFloat16;
}

template <int capacity>
TrunkSum<capacity> trunk_sum_of(const Arguments& a, void* updated) {
  TrunkSum<capacity> p{};
  p.B = a.x.sizes[0], p.N = a.x.sizes[1], p.D = a.x.sizes[2];
  p.x = a.x.data, p.x_batch = a.x.strides[0], p.x_row = a.x.strides[1];
  p.updated = updated;
  p.gate_type = gate_type(a.gates);
  if (a.gates) {
    p.gates = a.gates.data;
    p.gate_batch = vector_of(a.gates, p.N, static_cast<bool>(a.gate_index)).batch / a.gates.element;
  }
  if (a.gate_index) {
    p.gate_index = reinterpret_cast<const int32_t*>(a.gate_index.data);
    p.gate_index_stride = a.gate_index.strides[0];
    p.gate_pack = a.gates.strides[0];
    p.gate_count = a.gates.sizes[0];
  }
  if (a.weights) {
    p.weights = reinterpret_cast<const float*>(a.weights.data);
    p.weight_stride = a.weights.strides[0];
  }
  p.term_count = static_cast<int32_t>(a.feature_count);
  for (int64_t j = 0; j < a.feature_count; ++j) {
    p.features[j] = {a.features[j].data, a.features[j].strides[0], a.features[j].strides[1]};
  }
  return p;
}

// Do all rows of the tensor start at a multiple of `elements` elements?
bool aligned(const Tensor& t, int64_t elements) {
  return reinterpret_cast<uintptr_t>(t.data) % (elements * t.element) == 0 && (t.sizes[0] <= 1 || t.strides[0] % elements == 0) && (t.sizes[1] <= 1 || t.strides[1] % elements == 0);
}

// Columns per thread: 16 bytes of the narrower type where everything is aligned, else one.
int64_t columns_per_thread(const Arguments& a) {
  const int64_t wide = a.x.element == 2 && (a.feature_count == 0 || a.features[0].element == 2) ? 8 : 4;
  if (a.x.sizes[2] % wide != 0 || !aligned(a.x, wide)) return 1;
  for (int64_t j = 0; j < a.feature_count; ++j) {
    if (!aligned(a.features[j], wide)) return 1;
  }
  return wide;
}

template <class X, class F, int V, int capacity>
void launch(const TrunkSum<capacity>& p, cudaStream_t stream) {
  const int64_t blocks = cuda::trunk_sum_blocks(p, V);
  if (blocks > 0x7fffffff) fail("x: too large for one launch; split the batch");
  cuda::trunk_sum<X, F, V, capacity><<<static_cast<unsigned>(blocks), cuda::kThreads, 0, stream>>>(p);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

template <class X, class F, int capacity>
void launch(const Arguments& a, void* updated, cudaStream_t stream) {
  constexpr int wide = sizeof(X) == 2 && sizeof(F) == 2 ? 8 : 4;
  const TrunkSum<capacity> p = trunk_sum_of<capacity>(a, updated);
  if (columns_per_thread(a) == wide) {
    launch<X, F, wide>(p, stream);
  } else {
    launch<X, F, 1>(p, stream);
  }
}

template <class X, class F>
void launch_sized(const Arguments& a, void* updated, cudaStream_t stream) {
  if (a.feature_count <= 64) {
    launch<X, F, 64>(a, updated, stream);
  } else {
    launch<X, F, cuda::kTerms>(a, updated, stream);
  }
}

template <class X>
void launch_typed(const Arguments& a, void* updated, cudaStream_t stream) {
  const Type type = a.feature_count > 0 ? a.features[0].type : a.x.type;
  switch (type) {
    case Type::kFloat32: launch_sized<X, float>(a, updated, stream); break;
    case Type::kFloat16: launch_sized<X, __half>(a, updated, stream); break;
    default: launch_sized<X, __nv_bfloat16>(a, updated, stream); break;
  }
}

void residual_update(StableIValue* stack, uint64_t inputs, uint64_t outputs, bool scatter) {
  const Arguments arguments(stack, inputs, outputs, scatter);
  arguments.check();
  check_form(arguments);
  const torch::stable::accelerator::DeviceGuard guard(arguments.x.device_index);
  void* stream = nullptr;
  FASTCACHE_MUST(aoti_torch_get_current_cuda_stream(arguments.x.device_index, &stream));
  Outputs results(arguments.x);
  void* updated = results.add(kUpdated, arguments.x.dtype, 3, arguments.x.sizes);
  if (!arguments.x.empty()) {
    switch (arguments.x.type) {
      case Type::kFloat32: launch_typed<float>(arguments, updated, static_cast<cudaStream_t>(stream)); break;
      case Type::kFloat16: launch_typed<__half>(arguments, updated, static_cast<cudaStream_t>(stream)); break;
      default: launch_typed<__nv_bfloat16>(arguments, updated, static_cast<cudaStream_t>(stream)); break;
    }
  }
  results.release(stack);
}

void pure(StableIValue* stack, uint64_t inputs, uint64_t outputs) { residual_update(stack, inputs, outputs, false); }

void scatter(StableIValue* stack, uint64_t inputs, uint64_t outputs) { residual_update(stack, inputs, outputs, true); }

}  // namespace

}  // namespace fastcache

STABLE_TORCH_LIBRARY_IMPL(fastcache, CUDA, library) {
  library.impl("residual_update", &fastcache::pure);
  library.impl("residual_update_scatter_", &fastcache::scatter);
}

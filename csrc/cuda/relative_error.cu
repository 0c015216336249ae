// Instantiations of the error kernels: three dtypes, two sizes of the table, 16-byte loads or one value at
// a time.
#include "fastcache/cuda/relative_error.cuh"
#include "launch.cuh"
#include "token_launch.h"

namespace fastcache::cuda {

namespace {

unsigned groups_of(const Comparison& p) {
  return static_cast<unsigned>((p.lookaheads + kLookaheads - 1) / kLookaheads);
}

template <Type X, int V, int capacity>
void launch_table(const Comparison& comparison, const TokenRows* tensors, int32_t layers, int32_t blocks,
                  void* stream) {
  Comparisons<capacity> p;
  static_cast<Comparison&>(p) = comparison;
  std::copy(tensors, tensors + layers * (1 + comparison.lookaheads), p.tensors);
  launch(relative_error_kernel<X, V, capacity>,
         dim3(static_cast<unsigned>(blocks), static_cast<unsigned>(layers), groups_of(p)), kRelativeThreads,
         stream, p);
}

template <Type X>
void launch_typed(const Comparison& p, const TokenRows* tensors, int32_t layers, int32_t blocks, int width,
                  void* stream) {
  const bool few = layers * (1 + p.lookaheads) <= kFewTensors;
  if (width == 1)
    return few ? launch_table<X, 1, kFewTensors>(p, tensors, layers, blocks, stream)
               : launch_table<X, 1, kManyTensors>(p, tensors, layers, blocks, stream);
  few ? launch_table<X, full_width(X), kFewTensors>(p, tensors, layers, blocks, stream)
      : launch_table<X, full_width(X), kManyTensors>(p, tensors, layers, blocks, stream);
}

}  // namespace

void launch_relative_error(const Comparison& p, const TokenRows* tensors, int32_t layers, int32_t blocks,
                           Type x, int width, void* stream) {
  if (x == Type::kFloat32) return launch_typed<Type::kFloat32>(p, tensors, layers, blocks, width, stream);
  if (x == Type::kFloat16) return launch_typed<Type::kFloat16>(p, tensors, layers, blocks, width, stream);
  launch_typed<Type::kBFloat16>(p, tensors, layers, blocks, width, stream);
}

void launch_relative_error_finish(const Comparison& p, float* errors, int32_t blocks, int32_t first_layer,
                                  int32_t layers, int32_t all_layers, void* stream) {
  launch(relative_error_finish_kernel, dim3(static_cast<unsigned>(layers), groups_of(p)), kRelativeThreads,
         stream, static_cast<const double*>(p.partials), errors, blocks, p.lookaheads, first_layer,
         all_layers);
}

}  // namespace fastcache::cuda

// Instantiations of the scoring kernels: three dtypes, 16-byte loads or one value at a time.
#include "fastcache/cuda/row_score.cuh"
#include "launch.cuh"
#include "token_launch.h"

namespace fastcache::cuda {

namespace {

dim3 grid_of(const Scores& p) {
  constexpr int64_t warps = kScoreThreads / 32;
  const int64_t rows = int64_t(p.B) * p.N;
  if (rows > INT32_MAX - warps) refuse_size();
  return dim3(static_cast<unsigned>((rows + warps - 1) / warps));
}

template <Type X>
void launch_scores(const Scores& p, int width, void* stream) {
  if (width == 1) return launch(row_score_kernel<X, 1>, grid_of(p), kScoreThreads, stream, p);
  launch(row_score_kernel<X, full_width(X)>, grid_of(p), kScoreThreads, stream, p);
}

template <Type X>
void launch_norms(const Scores& p, int width, void* stream) {
  if (width == 1) return launch(value_norm_kernel<X, 1>, grid_of(p), kScoreThreads, stream, p);
  launch(value_norm_kernel<X, full_width(X)>, grid_of(p), kScoreThreads, stream, p);
}

}  // namespace

void launch_row_score(const Scores& p, Type x, int width, void* stream) {
  if (x == Type::kFloat32) return launch_scores<Type::kFloat32>(p, width, stream);
  if (x == Type::kFloat16) return launch_scores<Type::kFloat16>(p, width, stream);
  launch_scores<Type::kBFloat16>(p, width, stream);
}

void launch_value_norm(const Scores& p, Type v, int width, void* stream) {
  if (v == Type::kFloat32) return launch_norms<Type::kFloat32>(p, width, stream);
  if (v == Type::kFloat16) return launch_norms<Type::kFloat16>(p, width, stream);
  launch_norms<Type::kBFloat16>(p, width, stream);
}

}  // namespace fastcache::cuda

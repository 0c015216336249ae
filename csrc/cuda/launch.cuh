// Chooses the instantiation of a kernel and launches it.
#pragma once

#include <algorithm>

#include "config.h"
#include "fastcache/cuda/rows.cuh"
#include "fastcache/cuda/sum.cuh"
#include "launch.h"
#include "runtime.h"
#include "tuning.h"

namespace fastcache::cuda {

#ifdef __CUDACC__
template <class... Arguments>
void launch(void (*kernel)(Arguments...), dim3 grid, unsigned block, void* stream,
            const Arguments&... arguments) {
  kernel<<<grid, block, 0, static_cast<cudaStream_t>(stream)>>>(arguments...);
  check_launch();
}
#else
using emulator::dim3;
using emulator::launch;
#endif

template <int capacity>
Parameters<capacity> parameters_of(const Call& call) {
  Parameters<capacity> p;
  static_cast<Common&>(p) = call.common;
  std::copy(call.features, call.features + call.feature_count, p.features);
  return p;
}

template <Type X, bool same, int V, int R, int capacity>
void launch_sum_kernel(const Call& call) {
  const Common& p = call.common;
  const int64_t threads = (int64_t(p.N) + R - 1) / R * (p.D / V);
  const int64_t blocks = (threads + kSumThreads - 1) / kSumThreads;
  if (blocks * kSumThreads > UINT32_MAX) refuse_size();
  launch(sum_kernel<X, same, V, R, capacity>, dim3(static_cast<unsigned>(blocks), std::min(p.B, 65535)),
         kSumThreads, call.stream, parameters_of<capacity>(call));
}

template <Type X, bool same, int capacity>
void launch_sum_sized(const Call& call) {
  constexpr int wide = full_width(X);
  const SumConfig config = chosen_sum_config(call);
  if (config.width == 1) return launch_sum_kernel<X, same, 1, 4, capacity>(call);
  if (config.rows == 4) return launch_sum_kernel<X, same, wide, 4, capacity>(call);
  if (config.rows == 2) return launch_sum_kernel<X, same, wide, 2, capacity>(call);
  launch_sum_kernel<X, same, wide, 1, capacity>(call);
}

template <Type X>
void launch_sum(const Call& call) {
  const bool same = call.feature_count == 0 || call.common.feature_type == X,
             few = call.feature_count <= kFewTerms;
  if (same && few) return launch_sum_sized<X, true, kFewTerms>(call);
  if (same) return launch_sum_sized<X, true, kMaxTerms>(call);
  if (few) return launch_sum_sized<X, false, kFewTerms>(call);
  launch_sum_sized<X, false, kMaxTerms>(call);
}

template <Type X, int THREADS, int VECTORS, int V, int capacity>
void launch_row_kernel(const Call& call) {
  const int64_t rows = int64_t(call.common.B) * call.common.N;
  constexpr int per_block = kRowsPerBlock<THREADS>;
  if (rows > INT32_MAX - per_block) refuse_size();
  launch(row_kernel<X, THREADS, VECTORS, V, capacity>,
         dim3(static_cast<unsigned>((rows + per_block - 1) / per_block)), THREADS * per_block, call.stream,
         parameters_of<capacity>(call));
}

template <Type X, int capacity, int i>
void launch_rows_sized(const Call& call, RowConfig chosen) {
  constexpr RowConfig config = RowConfigs<X, capacity>::values[i];
  if (chosen == config)
    return launch_row_kernel<X, config.threads, config.vectors, config.width, capacity>(call);
  if constexpr (i + 1 < RowConfigs<X, capacity>::count) launch_rows_sized<X, capacity, i + 1>(call, chosen);
}

template <Type X, int capacity>
void launch_rows_sized(const Call& call) {
  launch_rows_sized<X, capacity, 0>(call, chosen_row_config<X, capacity>(call));
}

template <Type X>
void launch_rows(const Call& call) {
  call.feature_count <= kFewTerms ? launch_rows_sized<X, kFewTerms>(call)
                                  : launch_rows_sized<X, kMaxTerms>(call);
}

}  // namespace fastcache::cuda

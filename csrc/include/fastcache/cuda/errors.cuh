// Error sums per row to error sums per sample: errors [B, 3] from row_errors [B, N, 3], in float64 and
// in an order that depends on N alone, so that equal inputs give equal bits.
// 12 bytes a row, a few microseconds of latency for any N in use.
#pragma once

#include "fastcache/cuda/target.cuh"

namespace fastcache::cuda {

constexpr int kErrorThreads = 256;

// Grid: B.
__global__ void __launch_bounds__(kErrorThreads)
    error_kernel(const float* row_errors, float* errors, int32_t N) {
  __shared__ double shared[3][kErrorThreads];
  const float* rows = row_errors + int64_t(blockIdx.x) * N * 3;
  double sums[3] = {};
  for (int64_t n = threadIdx.x; n < N; n += kErrorThreads) {
    for (int i = 0; i < 3; ++i) sums[i] += rows[n * 3 + i];
  }
  for (int i = 0; i < 3; ++i) shared[i][threadIdx.x] = sums[i];
  __syncthreads();
  for (int half = kErrorThreads / 2; half > 0; half /= 2) {
    if (static_cast<int>(threadIdx.x) < half) {
      for (int i = 0; i < 3; ++i) shared[i][threadIdx.x] += shared[i][threadIdx.x + half];
    }
    __syncthreads();
  }
  if (threadIdx.x < 3) errors[blockIdx.x * 3 + threadIdx.x] = static_cast<float>(shared[threadIdx.x][0]);
}

}  // namespace fastcache::cuda

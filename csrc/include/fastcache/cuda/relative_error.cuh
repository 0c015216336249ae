// Errors of calibration: sum|earlier - newest| / sum|newest| for all layers and look-aheads.
//
// Reads the newest feature of a layer and its K earlier ones once (the newest once more for every
// kLookaheads of K): (1 + K) * e bytes an element, where one comparison at a time reads 2 * K + 1, in
// 2 * K + 1 launches. Limited by memory: at 4.3 TB/s (copy bandwidth assumed for an H200) 56 layers of
// [2, 256, 1152] in bf16 with K = 3 are 264 MB: 61 us; not measured yet.
// blockIdx.y is the layer, whose tensors are found in a table among the parameters. A thread loads
// two runs of 16 bytes of all its tensors before it adds any: up to 10 loads in flight. Up to 16 values
// are added in float32, the rest in float64; partial sums per thread block, then a second kernel that adds
// them in order: equal inputs give equal bits, nothing is read back, and no counter has to be cleared.
// Contiguous tensors need no division to find a row.
#pragma once

#include "fastcache/cuda/target.cuh"
#include "fastcache/cuda/tokens.h"
#include "fastcache/cuda/values.cuh"

namespace fastcache::cuda {

// Tensors of layer l: entries l * (1 + K), the newest, and the K after it.
template <int capacity>
struct Comparisons : Comparison {
  TokenRows tensors[capacity];
};
static_assert(sizeof(Comparisons<kManyTensors>) <= 32764, "kernel parameters end here on sm_70 and later");

// Sums `count` values per thread over the thread block; results in out[0 .. count), in one order.
template <int count>
FASTCACHE_DEVICE void sum_block(double (&sums)[count], double (*shared)[kRelativeThreads / 32], double* out) {
#pragma unroll
  for (int i = 0; i < count; ++i) {
    for (int distance = 16; distance > 0; distance /= 2)
      sums[i] += __shfl_xor_sync(0xffffffffu, sums[i], distance);
    if (threadIdx.x % 32 == 0) shared[i][threadIdx.x / 32] = sums[i];
  }
  __syncthreads();
  if (threadIdx.x < count) {
    double total = 0.0;
    for (int warp = 0; warp < kRelativeThreads / 32; ++warp) total += shared[threadIdx.x][warp];
    out[threadIdx.x] = total;
  }
}

// Grid: (blocks of a layer, layers, groups of kLookaheads). Needs D % V == 0.
template <Type X, int V, int capacity>
__global__ void __launch_bounds__(kRelativeThreads)
    relative_error_kernel(const __grid_constant__ Comparisons<capacity> p) {
  __shared__ double shared[1 + kLookaheads][kRelativeThreads / 32];
  const int32_t first = blockIdx.z * kLookaheads, left = p.lookaheads - first;
  const int32_t own = blockIdx.y * (1 + p.lookaheads);
  const int64_t runs = p.elements / V, stride = int64_t(gridDim.x) * kRelativeThreads;
  const uint32_t runs_a_row = p.D / V;
  double sums[1 + kLookaheads] = {};
  for (int64_t run = int64_t(blockIdx.x) * kRelativeThreads + threadIdx.x; run < runs;
       run += kRelativeRuns * stride) {
    Raw<X, V> values[1 + kLookaheads][kRelativeRuns];
#pragma unroll
    for (int u = 0; u < kRelativeRuns; ++u) {
      const int64_t at = run + u * stride;
      if (at >= runs) continue;
      const int64_t row = p.dense ? 0 : at / runs_a_row, b = p.dense ? 0 : row / p.N;
      const int64_t column = p.dense ? at * V : (at - row * runs_a_row) * V;
#pragma unroll
      for (int k = 0; k <= kLookaheads; ++k) {
        if (k > left) continue;
        const TokenRows& tensor = p.tensors[k == 0 ? own : own + first + k];
        values[k][u] =
            load<X, V, Use::kOnce>(tensor.data, b * tensor.batch + (row - b * p.N) * tensor.row + column);
      }
    }
#pragma unroll
    for (int k = 0; k <= kLookaheads; ++k) {
      float sum = 0.0f;
#pragma unroll
      for (int u = 0; u < kRelativeRuns; ++u) {
#pragma unroll
        for (int i = 0; i < V; ++i)
          sum += fabsf(k == 0 ? values[0][u][i] : values[k][u][i] - values[0][u][i]);
      }
      if (k <= left) sums[k] += sum;
    }
  }
  const int64_t group = int64_t(blockIdx.y) * gridDim.z + blockIdx.z;
  sum_block(sums, shared, p.partials + (group * gridDim.x + blockIdx.x) * (1 + kLookaheads));
}

// errors[k * layers + l] for the layers first_layer + blockIdx.x. Grid: (layers of the launch, groups of
// kLookaheads).
__global__ void __launch_bounds__(kRelativeThreads)
    relative_error_finish_kernel(const double* partials, float* errors, int32_t blocks, int32_t lookaheads,
                                 int32_t first_layer, int32_t layers) {
  __shared__ double shared[1 + kLookaheads][kRelativeThreads / 32];
  __shared__ double totals[1 + kLookaheads];
  const double* own = partials + (int64_t(blockIdx.x) * gridDim.y + blockIdx.y) * blocks * (1 + kLookaheads);
  double sums[1 + kLookaheads] = {};
  for (int32_t i = threadIdx.x; i < blocks; i += kRelativeThreads) {
    for (int k = 0; k <= kLookaheads; ++k) sums[k] += own[i * (1 + kLookaheads) + k];
  }
  sum_block(sums, shared, totals);
  __syncthreads();
  const int32_t k = blockIdx.y * kLookaheads + threadIdx.x;
  if (threadIdx.x < kLookaheads && k < lookaheads)
    errors[int64_t(k) * layers + first_layer + blockIdx.x] =
        static_cast<float>(totals[1 + threadIdx.x] / totals[0]);
}

}  // namespace fastcache::cuda

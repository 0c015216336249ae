// row_score: ||x|| per token, or 1 - cos(x, reference). value_norm: sum over heads of 1 - ||v||.
//
// Reads every element once (of the reference too), writes 4 bytes a token. Limited by memory: at 4.3
// TB/s (copy bandwidth assumed for an H200) [2, 4096, 1152] in bf16 would be 4.4 us; not measured yet.
// A warp owns a token, so no barrier is needed; it asks for 4 runs of 32 * V columns at once, 16 bytes
// a lane. nvcc 13 keeps two or three of them in flight, which at 32 to 48 registers and 1280 to 2048
// threads a multiprocessor is 60 KB and more. For value_norm a head is often narrower than a warp: G
// lanes own one, and 32 / G heads go at once, four times over. Sums are float32 in a lane, and their
// tree and the rest are float64 and rounded once, in an order that depends on sizes alone.
#pragma once

#include "fastcache/cuda/target.cuh"
#include "fastcache/cuda/tokens.h"
#include "fastcache/cuda/values.cuh"

namespace fastcache::cuda {

constexpr int kScoreThreads = 256, kScoreRuns = 4;

// The sum over groups of `lanes` lanes; every lane of a group gets the same bits.
FASTCACHE_DEVICE double sum_lanes(double value, int lanes = 32) {
  for (int distance = lanes / 2; distance > 0; distance /= 2)
    value += __shfl_xor_sync(0xffffffffu, value, distance);
  return value;
}

// kScoreRuns runs from column `c` on, zeros beyond D.
template <Type type, int V>
FASTCACHE_DEVICE void load_runs(const void* data, int64_t start, int32_t c, int32_t D,
                                Raw<type, V> (&runs)[kScoreRuns]) {
#pragma unroll
  for (int u = 0; u < kScoreRuns; ++u) {
    if (c + u * 32 * V < D) runs[u] = load<type, V, Use::kOnce>(data, start + c + u * 32 * V);
  }
}

template <Type X, int V>
FASTCACHE_DEVICE float norm_of_row(const Scores& p, int64_t start, int32_t lane) {
  float squares = 0.0f;
  for (int32_t c = lane * V; c < p.D; c += kScoreRuns * 32 * V) {
    Raw<X, V> own[kScoreRuns];
    load_runs(p.x.data, start, c, p.D, own);
#pragma unroll
    for (int u = 0; u < kScoreRuns; ++u) {
#pragma unroll
      for (int i = 0; i < V; ++i) squares = fmaf(own[u][i], own[u][i], squares);
    }
  }
  return static_cast<float>(sqrt(sum_lanes(squares)));
}

template <Type X, Type Y, int V>
FASTCACHE_DEVICE float distance_of_rows(const Scores& p, int64_t start, int64_t other_start, int32_t lane) {
  float product = 0.0f, squares = 0.0f, other_squares = 0.0f;
  for (int32_t c = lane * V; c < p.D; c += kScoreRuns * 32 * V) {
    Raw<X, V> own[kScoreRuns];
    Raw<Y, V> other[kScoreRuns];
    load_runs(p.x.data, start, c, p.D, own);
    load_runs(p.reference.data, other_start, c, p.D, other);
#pragma unroll
    for (int u = 0; u < kScoreRuns; ++u) {
#pragma unroll
      for (int i = 0; i < V; ++i) {
        product = fmaf(own[u][i], other[u][i], product);
        squares = fmaf(own[u][i], own[u][i], squares);
        other_squares = fmaf(other[u][i], other[u][i], other_squares);
      }
    }
  }
  double norm = sqrt(sum_lanes(squares)), other_norm = sqrt(sum_lanes(other_squares));
  norm = norm < 1e-8 ? 1e-8 : norm;  // a NaN stays
  other_norm = other_norm < 1e-8 ? 1e-8 : other_norm;
  return static_cast<float>(1.0 - sum_lanes(product) / (norm * other_norm));
}

// Grid: thread blocks that cover B * N warps. Needs D % V == 0.
template <Type X, int V>
__global__ void __launch_bounds__(kScoreThreads) row_score_kernel(const __grid_constant__ Scores p) {
  const uint32_t row = blockIdx.x * (kScoreThreads / 32) + threadIdx.x / 32, lane = threadIdx.x % 32;
  if (row >= static_cast<uint32_t>(p.B) * static_cast<uint32_t>(p.N)) return;
  const uint32_t b = row / p.N, n = row - b * p.N;
  const int64_t start = b * p.x.batch + n * p.x.row;
  float score;
  if (p.compare) {
    const int64_t other_start = b * p.reference.batch + n * p.reference.row;
    visit_wide(p.reference_type,
               [&](auto tag) { score = distance_of_rows<X, tag.value, V>(p, start, other_start, lane); });
  } else {
    score = norm_of_row<X, V>(p, start, lane);
  }
  if (lane == 0) p.out[row] = score;
}

// The same grid; `x` is v, whose heads are `head` elements apart.
template <Type X, int V>
__global__ void __launch_bounds__(kScoreThreads) value_norm_kernel(const __grid_constant__ Scores p) {
  const uint32_t row = blockIdx.x * (kScoreThreads / 32) + threadIdx.x / 32, lane = threadIdx.x % 32;
  if (row >= static_cast<uint32_t>(p.B) * static_cast<uint32_t>(p.N)) return;
  const uint32_t b = row / p.N, n = row - b * p.N;
  const int32_t at_once = 32 / p.lanes, own = lane / p.lanes, column = lane % p.lanes * V;
  double total = 0.0;
  for (int32_t first = 0; first < p.heads; first += kScoreRuns * at_once) {
    float squares[kScoreRuns] = {};
    for (int32_t c = column; c < p.D; c += p.lanes * V) {
      Raw<X, V> values[kScoreRuns];
#pragma unroll
      for (int u = 0; u < kScoreRuns; ++u) {
        const int32_t h = first + u * at_once + own;
        if (h < p.heads)
          values[u] = load<X, V, Use::kOnce>(p.x.data, b * p.x.batch + n * p.x.row + h * p.head + c);
      }
#pragma unroll
      for (int u = 0; u < kScoreRuns; ++u) {
#pragma unroll
        for (int i = 0; i < V; ++i) squares[u] = fmaf(values[u][i], values[u][i], squares[u]);
      }
    }
#pragma unroll
    for (int u = 0; u < kScoreRuns; ++u) {
      const double norm = sqrt(sum_lanes(squares[u], p.lanes));
      if (first + u * at_once + own < p.heads) total += 1.0 - norm;
    }
  }
  if (lane % p.lanes != 0) total = 0.0;
  total = sum_lanes(total);
  if (lane == 0) p.out[row] = static_cast<float>(total);
}

}  // namespace fastcache::cuda

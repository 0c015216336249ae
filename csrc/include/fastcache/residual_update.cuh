// x' = x + sum of gated terms on a GPU. No framework header: csrc/cuda/residual_update.cu adapts it.
//
// Moves (J + 2) tensors of [B, N, D]; memory bandwidth limits it. A thread owns V neighbouring columns of
// kRows tokens of one sample, so that a gate vector is loaded once for kRows rows and every load
// of a 16-byte aligned tensor is 16 bytes wide. Sums stay in registers, in fp32, in term order.
// Terms are a table in the kernel's parameters: no copy to the device, and safe to capture.
// First version: correct, not tuned. Untried: cp.async or TMA rings to keep more loads in flight.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace fastcache::cuda {

constexpr int kRows = 4;
constexpr int kThreads = 256;
constexpr int kTerms = 1024;  // 24 KB of the 32 KB that kernel parameters may take

enum class GateType : int32_t { kNone, kFloat32, kFloat16, kBFloat16 };

// Strides count elements.
struct Feature {
  const void* data;
  int64_t batch;
  int64_t row;
};

template <int capacity>
struct TrunkSum {
  int64_t B, N, D;
  const void* x;
  int64_t x_batch, x_row;
  void* updated;  // contiguous
  const void* gates;
  GateType gate_type;
  int64_t gate_pack, gate_batch;  // from packed row to row, from sample to sample
  int64_t gate_count;             // packed rows; 0: one vector for all terms
  const int32_t* gate_index;
  int64_t gate_index_stride;
  const float* weights;  // nullptr: ones
  int64_t weight_stride;
  int32_t term_count;
  Feature features[capacity];
};

__device__ inline float widen(float value) { return value; }
__device__ inline float widen(__half value) { return __half2float(value); }
__device__ inline float widen(__nv_bfloat16 value) { return __bfloat162float(value); }
__device__ inline void narrow(float value, float& out) { out = value; }
__device__ inline void narrow(float value, __half& out) { out = __float2half_rn(value); }
__device__ inline void narrow(float value, __nv_bfloat16& out) { out = __float2bfloat16_rn(value); }

// V values of T at `data`, aligned to their total size (V == 1: to one element).
template <class T, int V>
struct alignas(sizeof(T) * V) Chunk {
  T value[V];
};

template <class T, int V>
__device__ inline void load(const T* data, float (&out)[V]) {
  const Chunk<T, V> chunk = *reinterpret_cast<const Chunk<T, V>*>(data);
  for (int i = 0; i < V; ++i) out[i] = widen(chunk.value[i]);
}

template <int V>
__device__ inline void load_gate(const void* gate, GateType type, int64_t offset, float (&out)[V]) {
  for (int i = 0; i < V; ++i) {
    switch (type) {
      case GateType::kFloat32: out[i] = static_cast<const float*>(gate)[offset + i]; break;
      case GateType::kFloat16: out[i] = widen(static_cast<const __half*>(gate)[offset + i]); break;
      default: out[i] = widen(static_cast<const __nv_bfloat16*>(gate)[offset + i]); break;
    }
  }
}

// weight * gate of term j for V columns. A gate row outside the table gives NaN, never a wild read.
template <int V, int capacity>
__device__ inline void coefficient(const TrunkSum<capacity>& p, int j, int64_t b, int64_t column, float (&out)[V]) {
  const float weight = p.weights ? p.weights[j * p.weight_stride] : 1.0f;
  for (int i = 0; i < V; ++i) out[i] = 1.0f;
  if (p.gate_type != GateType::kNone) {
    const int64_t row = p.gate_index ? p.gate_index[j * p.gate_index_stride] : 0;
    const int64_t rows = p.gate_index ? p.gate_count : 1;
    if (row < -1 || row >= rows) {
      for (int i = 0; i < V; ++i) out[i] = __int_as_float(0x7fc00000);
    } else if (row >= 0) {
      load_gate(p.gates, p.gate_type, row * p.gate_pack + b * p.gate_batch + column, out);
    }
  }
  for (int i = 0; i < V; ++i) out[i] *= weight;
}

template <class X, class F, int V, int capacity>
__global__ void __launch_bounds__(kThreads) trunk_sum(const __grid_constant__ TrunkSum<capacity> p) {
  const int64_t chunks = p.D / V;  // V divides D
  const int64_t groups = (p.N + kRows - 1) / kRows;
  const int64_t index = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  const int64_t column = index % chunks * V;
  const int64_t b = index / chunks / groups;
  const int64_t first = index / chunks % groups * kRows;
  if (b >= p.B) return;
  const X* x = static_cast<const X*>(p.x) + b * p.x_batch + column;
  float total[kRows][V];
  for (int r = 0; r < kRows; ++r) {
    if (first + r < p.N) load<X, V>(x + (first + r) * p.x_row, total[r]);
  }
  for (int j = 0; j < p.term_count; ++j) {
    const Feature& feature = p.features[j];
    const F* data = static_cast<const F*>(feature.data) + b * feature.batch + column;
    float value[kRows][V];
    for (int r = 0; r < kRows; ++r) {
      if (first + r < p.N) load<F, V>(data + (first + r) * feature.row, value[r]);
    }
    float gate[V];
    coefficient<V>(p, j, b, column, gate);
    for (int r = 0; r < kRows; ++r) {
      for (int i = 0; i < V; ++i) total[r][i] = fmaf(gate[i], value[r][i], total[r][i]);
    }
  }
  X* out = static_cast<X*>(p.updated) + b * p.N * p.D + column;
  for (int r = 0; r < kRows; ++r) {
    if (first + r >= p.N) break;
    Chunk<X, V> chunk;
    for (int i = 0; i < V; ++i) narrow(total[r][i], chunk.value[i]);
    *reinterpret_cast<Chunk<X, V>*>(out + (first + r) * p.D) = chunk;
  }
}

// Thread blocks that cover all rows and columns.
template <int capacity>
inline int64_t trunk_sum_blocks(const TrunkSum<capacity>& p, int V) {
  const int64_t threads = p.B * ((p.N + kRows - 1) / kRows) * (p.D / V);
  return (threads + kThreads - 1) / kThreads;
}

}  // namespace fastcache::cuda

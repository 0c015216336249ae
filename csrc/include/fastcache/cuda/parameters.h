// What one launch has to do, passed to the kernels by value: the table of features included, so
// that nothing is copied to the device before a launch and a launch can be captured in a graph.
// No framework header and no CUDA header. Strides count elements.
#pragma once

#include <cstdint>

#include "fastcache/plan.h"

namespace fastcache::cuda {

constexpr int kFewTerms = 64;  // 2 KB of parameters; kMaxTerms needs 25 of the 32 KB there are
constexpr int32_t kBadGate = 1, kBadSlot = 2;  // bits of the sticky error flag

// A tensor [B, N, D] with unit stride in D.
struct TokenRows {
  void* data;
  int64_t batch, row;
};

// A gate, shift, scale or norm vector: one row serves `span` consecutive tokens; row == 0: all.
struct VectorRows {
  const void* data;
  int64_t batch, row;
  int32_t span;
  Type type;
};

// int32 [B, N].
struct SlotMap {
  const int32_t* data;
  int64_t batch, row;
};

// The store: token n of `slot` first takes row map[n] of `fresh` (-1: keeps its own).
struct Refresh {
  TokenRows slot;  // no data: nothing is stored
  TokenRows fresh;
  SlotMap map;   // no data: token n takes row n
  float* scale;  // [B, N] row scales of a float8 slot
  int64_t scale_batch, scale_row;
  int32_t fresh_count;
  Type slot_type, fresh_type;
};

// Vectors of the norm half, in the order in which they act on h.
enum { kNormWeight, kNormBias, kScale, kShift, kVectors };

// All but the table of features.
struct Common {
  int32_t B, N, D;
  int32_t term_count;  // the slot's included
  int32_t position;    // of the slot's term; term_count if there is none
  TokenRows x;
  Type x_type;
  void* updated;  // x', contiguous; nullptr: not wanted

  VectorRows gates;
  int64_t gate_pack;   // elements from one packed gate to the next
  int32_t gate_count;  // packed gates
  const int32_t* gate_index;
  int64_t gate_index_stride;
  const float* weights;
  int64_t weight_stride;
  const float* scales;  // [J, B, N]
  int64_t scales_term, scales_batch, scales_row;
  Type feature_type;

  Refresh refresh;

  Norm norm;
  void* modulated;       // h, contiguous; rows of SlotMap target
  SlotMap target;        // no data: token n writes row n
  int32_t target_count;  // rows of h in a sample
  VectorRows vectors[kVectors];
  float eps;

  TokenRows reference;
  Type reference_type;
  float* row_errors;  // [B, N, 3]

  int32_t* error_flag;
};

template <int capacity>
struct Parameters : Common {
  TokenRows features[capacity];
};
static_assert(sizeof(Parameters<kMaxTerms>) <= 32764, "kernel parameters end here on sm_70 and later");

}  // namespace fastcache::cuda

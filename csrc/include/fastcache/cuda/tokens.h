// What one launch of an operator on tokens has to do, passed to its kernels by value (see parameters.h).
// Strides count elements.
#pragma once

#include "fastcache/cuda/parameters.h"

namespace fastcache::cuda {

constexpr int32_t kBadCount = 4;  // bit of the sticky error flag, beside kBadGate and kBadSlot

// select_tokens_.
struct Selection {
  int32_t N, capacity;
  const float* score;
  int64_t score_row, score_token;
  int32_t* age;
  int64_t age_row, age_token;
  const int32_t* counts;
  int64_t counts_stride;
  int32_t* slots;  // [R, N] contiguous
  int32_t* index;  // [R, capacity] contiguous
  float age_weight, bonus;
  bool aged, normalize;
  int32_t width, cell;
  int32_t* error_flag;
};

// row_score and value_norm.
struct Scores {
  int32_t B, N, D;
  TokenRows x;
  bool compare;  // with the reference; else the norm of x
  TokenRows reference;
  Type reference_type;
  float* out;     // [B, N] contiguous
  int32_t heads;  // of value_norm
  int64_t head;   // elements from one head to the next
  int32_t lanes;  // of one head, a power of two
};

// relative_error.
constexpr int kRelativeThreads = 256, kLookaheads = 4, kRelativeRuns = 2;
constexpr int kFewTensors = 256, kManyTensors = kMaxTerms + 64;  // 6 and 26 of the 32 KB of parameters

struct Comparison {
  int32_t N, D;
  int64_t elements;    // of one tensor
  int32_t lookaheads;  // K
  bool dense;          // all tensors are contiguous
  double* partials;    // [layers, lookahead groups, blocks, 1 + kLookaheads]
};

}  // namespace fastcache::cuda

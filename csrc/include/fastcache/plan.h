// What one residual_update call has to do, as plain numbers and pointers: no framework header here,
// so that kernels can be read, tested and moved without PyTorch. Strides are in bytes.
// Functions are always inlined: a copy that the linker shares between sources compiled for
// different instruction sets could crash.
#pragma once

#include <cstdint>

#define FASTCACHE_INLINE inline __attribute__((always_inline))

namespace fastcache {

enum class Type : int8_t { kFloat32, kFloat16, kBFloat16, kFloat8, kFloat64, kInt32, kOther };

enum class Norm : int8_t { kNone, kLayer, kRms, kIdentity };

constexpr int kMaxTerms = 1024;
constexpr int kGroup = 4;  // rows that are computed together

// Floats from one scratch row to the next: whole vectors of any width, and never a power of two,
// which would put all rows of a block into the same cache sets.
FASTCACHE_INLINE int64_t pitch_of(int64_t D) { return (D + 15) / 16 * 16 + 16; }

// A tensor [B, N, D] with unit stride in D.
struct Rows {
  char* data = nullptr;
  int64_t batch = 0;
  int64_t row = 0;
  Type type = Type::kFloat32;

  FASTCACHE_INLINE char* at(int64_t b, int64_t n) const { return data + b * batch + n * row; }
  FASTCACHE_INLINE explicit operator bool() const { return data != nullptr; }
};

// Gates, shifts, scales: one row of D values serves `span` consecutive tokens of a sample.
struct Vector {
  const char* data = nullptr;
  int64_t batch = 0;
  int64_t row = 0;
  int64_t span = 1;
  Type type = Type::kFloat32;

  FASTCACHE_INLINE const char* at(int64_t b, int64_t n) const {
    return data + b * batch + (row ? n / span * row : 0);
  }
  FASTCACHE_INLINE explicit operator bool() const { return data != nullptr; }
};

// weight * gate * (row_scale * feature)
struct Term {
  Rows feature;
  const char* gate = nullptr;  // nullptr: a gate of one; the layout is Plan::gates
  Rows row_scale;              // [B, N] float32, only data, batch and row are used
  float weight = 1.0f;
};

// Fresh rows that go into the slot (the feature of term `position`) before the sum.
struct Store {
  Rows slot;
  Rows slot_scale;  // [B, N] float32
  Rows fresh;
  const int32_t* source = nullptr;  // [B, N] contiguous, row of `fresh` or -1; nullptr: token n takes row n
};

struct Plan {
  int64_t B = 0, N = 0, D = 0;
  Rows x;
  const Term* terms = nullptr;
  int64_t term_count = 0;
  Vector gates;
  Store store;

  Rows updated;  // x', or no data if nobody wants it
  Norm norm = Norm::kNone;
  Rows modulated;
  const int32_t* target = nullptr;  // [B, N] contiguous, row of `modulated` or -1; nullptr: row n
  Vector shift, scale, norm_weight, norm_bias;
  float eps = 0.0f;

  const Term* newest = nullptr;  // the term whose error is summed
  Rows reference;
  double* error_sums = nullptr;  // [B * N, 3] per row; summed in order by the launcher

  int64_t blocks_per_sample = 0;  // a block is the work unit: up to kGroup tokens of one sample
};

}  // namespace fastcache

// The rows of residual_update on a CPU, compiled once per instruction set (see isa_*.cpp).
//
// Moves, per element: x in, one read of each feature, x' out, h out; (J + 2) passes for a sum of J
// features, 4 for one term with norm. Memory bandwidth limits it. A work unit is a block of tokens
// of one sample; its fp32 sums stay in the first two cache levels for all J features.
#pragma once

#include "fastcache/plan.h"
#include "vec.h"
#include "residual_update_norm.h"
#include "residual_update_sum.h"

namespace {

using fastcache::Plan;
using fastcache::Term;
using fastcache::Type;

// Converts one row into the slot: a copy with one rounding, or float8 with its row scale.
template <class F>
void store_row(const Plan& plan, int64_t b, int64_t n, int64_t k) {
  const F* fresh = reinterpret_cast<const F*>(plan.store.fresh.at(b, k));
  char* slot = plan.store.slot.at(b, n);
  switch (plan.store.slot.type) {
    case Type::kFloat32: copy_row(fresh, reinterpret_cast<float*>(slot), plan.D); break;
    case Type::kFloat16: copy_row(fresh, reinterpret_cast<Float16*>(slot), plan.D); break;
    case Type::kBFloat16: copy_row(fresh, reinterpret_cast<BFloat16*>(slot), plan.D); break;
    default: {
      float* scale = reinterpret_cast<float*>(plan.store.slot_scale.at(b, n));
      *scale = compress_row(fresh, reinterpret_cast<Float8*>(slot), plan.D);
    }
  }
}

void store_rows(const Plan& plan, int64_t b, int64_t first, int64_t last) {
  for (int64_t n = first; n < last; ++n) {
    const int64_t k = plan.store.source ? plan.store.source[b * plan.N + n] : n;
    if (k < 0) continue;
    switch (plan.store.fresh.type) {
      case Type::kFloat32: store_row<float>(plan, b, n, k); break;
      case Type::kFloat16: store_row<Float16>(plan, b, n, k); break;
      default: store_row<BFloat16>(plan, b, n, k); break;
    }
  }
}

template <class F, class R>
void error_row(const Plan& plan, int64_t b, int64_t n) {
  const F* feature = reinterpret_cast<const F*>(plan.newest->feature.at(b, n));
  const R* reference = reinterpret_cast<const R*>(plan.reference.at(b, n));
  const Vec scale = broadcast(row_scale(*plan.newest, b, n));
  WideSum difference, size, reference_size;
  for (int64_t c = 0; c < plan.D; c += kLanes) {
    const int count = plan.D - c < kLanes ? int(plan.D - c) : kLanes;
    const bool whole = count == kLanes;
    const Vec f = whole ? mul(load(feature + c), scale) : keep_first(mul(load_part(feature + c, count), scale), count);
    const Vec r = whole ? load(reference + c) : load_part(reference + c, count);
    difference.add(magnitude(sub(f, r)));
    size.add(magnitude(f));
    reference_size.add(magnitude(r));
  }
  double* sums = plan.error_sums + (b * plan.N + n) * 3;
  sums[0] = difference.total();
  sums[1] = size.total();
  sums[2] = reference_size.total();
}

template <class F>
void error_row_of(const Plan& plan, int64_t b, int64_t n) {
  switch (plan.reference.type) {
    case Type::kFloat32: error_row<F, float>(plan, b, n); break;
    case Type::kFloat16: error_row<F, Float16>(plan, b, n); break;
    default: error_row<F, BFloat16>(plan, b, n); break;
  }
}

void error_rows(const Plan& plan, int64_t b, int64_t first, int64_t last) {
  for (int64_t n = first; n < last; ++n) {
    switch (plan.newest->feature.type) {
      case Type::kFloat32: error_row_of<float>(plan, b, n); break;
      case Type::kFloat16: error_row_of<Float16>(plan, b, n); break;
      case Type::kBFloat16: error_row_of<BFloat16>(plan, b, n); break;
      default: error_row_of<Float8>(plan, b, n); break;
    }
  }
}

template <class X>
void blocks(const Plan& plan, int64_t begin, int64_t end, float* scratch) {
  const int64_t pitch = fastcache::pitch_of(plan.D);
  float* sums = scratch;
  Modulation modulation{scratch + plan.block_rows * pitch, scratch + (plan.block_rows + 1) * pitch};
  const bool packed_only = plan.target && !plan.updated;
  for (int64_t block = begin; block < end; ++block) {
    const int64_t b = block / plan.blocks_per_sample;
    const int64_t first = block % plan.blocks_per_sample * plan.block_rows;
    const int64_t last = first + plan.block_rows < plan.N ? first + plan.block_rows : plan.N;
    if (plan.store.slot) store_rows(plan, b, first, last);
    if (plan.reference) error_rows(plan, b, first, last);
    if (!plan.updated && plan.norm == fastcache::Norm::kNone) continue;
    if (!packed_only) {
      sum_terms<X>(plan, b, first, last, sums, pitch);
    }
    for (int64_t n = first; n < last; ++n) {
      const int64_t row = plan.target ? plan.target[b * plan.N + n] : n;
      if (packed_only) {
        if (row < 0) continue;
        sum_terms<X>(plan, b, n, n + 1, sums + (n - first) * pitch, pitch);
      }
      finish_row<X>(plan, b, n, row, sums + (n - first) * pitch, modulation);
    }
  }
}

void residual_update_rows(const Plan& plan, int64_t begin, int64_t end, float* scratch) {
  switch (plan.x.type) {
    case Type::kFloat32: blocks<float>(plan, begin, end, scratch); break;
    case Type::kFloat16: blocks<Float16>(plan, begin, end, scratch); break;
    default: blocks<BFloat16>(plan, begin, end, scratch); break;
  }
}

}  // namespace

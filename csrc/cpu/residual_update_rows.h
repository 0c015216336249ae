// The rows of residual_update on a CPU, compiled once per instruction set (see isa_*.cpp).
//
// Moves, per element: x in, each feature in once, x' out, h out: (J + 2) passes for a sum of J
// features, 4 for one term with norm, 2 for a norm alone. A work unit is a block of four tokens of
// one sample: residual_update_sum.h adds its terms, residual_update_norm.h makes h of it.
// Memory bandwidth limits sums. With a norm, arithmetic counts too: bf16 in and out takes about 30
// vector instructions per 32 elements, with which a Zen 4 core moves 16 (norm alone) to 22 GB/s.
#pragma once

#include "fastcache/plan.h"
#include "vec.h"

namespace {

using fastcache::kGroup;
using fastcache::Norm;
using fastcache::Plan;
using fastcache::Term;
using fastcache::Type;
using fastcache::Vector;

}  // namespace

#include "residual_update_norm.h"
#include "residual_update_sum.h"

namespace {

// Converts one row into the slot: a copy with one rounding, or float8 with its row scale.
template <class F>
void store_row(const Plan& plan, int64_t b, int64_t n, int64_t k) {
  const F* fresh = reinterpret_cast<const F*>(plan.store.fresh.at(b, k));
  char* slot = plan.store.slot.at(b, n);
  switch (plan.store.slot.type) {
    case Type::kFloat32:
      copy_row(fresh, reinterpret_cast<float*>(slot), plan.D);
      break;
    case Type::kFloat16:
      copy_row(fresh, reinterpret_cast<Float16*>(slot), plan.D);
      break;
    case Type::kBFloat16:
      copy_row(fresh, reinterpret_cast<BFloat16*>(slot), plan.D);
      break;
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
      case Type::kFloat32:
        store_row<float>(plan, b, n, k);
        break;
      case Type::kFloat16:
        store_row<Float16>(plan, b, n, k);
        break;
      default:
        store_row<BFloat16>(plan, b, n, k);
        break;
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
    const Vec f =
        whole ? mul(load(feature + c), scale) : keep_first(mul(load_part(feature + c, count), scale), count);
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
    case Type::kFloat32:
      error_row<F, float>(plan, b, n);
      break;
    case Type::kFloat16:
      error_row<F, Float16>(plan, b, n);
      break;
    default:
      error_row<F, BFloat16>(plan, b, n);
      break;
  }
}

void error_rows(const Plan& plan, int64_t b, int64_t first, int64_t last) {
  for (int64_t n = first; n < last; ++n) {
    switch (plan.newest->feature.type) {
      case Type::kFloat32:
        error_row_of<float>(plan, b, n);
        break;
      case Type::kFloat16:
        error_row_of<Float16>(plan, b, n);
        break;
      case Type::kBFloat16:
        error_row_of<BFloat16>(plan, b, n);
        break;
      default:
        error_row_of<Float8>(plan, b, n);
        break;
    }
  }
}

// Tokens [n, n + rows) of sample b, which share a gate row.
template <class X>
void group_of_rows(const Plan& plan, int64_t b, int64_t n, int rows, float* scratch, Modulation& modulation) {
  Group group;
  group.b = b;
  group.n = n;
  group.rows = rows;
  group.sums = scratch;
  group.pitch = fastcache::pitch_of(plan.D);
  for (int r = 0; r < rows; ++r) {
    char* spare = reinterpret_cast<char*>(scratch + (kGroup + r) * group.pitch);
    group.rounded[r] = plan.updated ? plan.updated.at(b, n + r) : spare;
    group.total[r] = 0.0f;
  }
  if (plan.term_count > 0) {
    sum_terms<X>(plan, group);
  } else {
    for (int r = 0; r < rows; ++r) {
      const X* x = reinterpret_cast<const X*>(plan.x.at(b, n + r));
      if (plan.updated) __builtin_memcpy(group.rounded[r], x, plan.D * sizeof(X));
      group.rounded[r] = plan.x.at(b, n + r);
      if (plan.norm == Norm::kLayer)
        group.total[r] = row_total(x, plan.x.at(b, n + r + kGroup < plan.N ? n + r + kGroup : n), plan.D);
    }
  }
  if (plan.norm != Norm::kNone) norm_rows<X>(plan, b, n, rows, group.rounded, group.total, modulation);
}

template <class X>
void blocks(const Plan& plan, int64_t begin, int64_t end, float* scratch) {
  const int64_t pitch = fastcache::pitch_of(plan.D);
  Modulation modulation{scratch + 2 * kGroup * pitch, scratch + (2 * kGroup + 1) * pitch};
  const bool packed_only = plan.target && !plan.updated;
  const bool stream = plan.updated || plan.norm != Norm::kNone;
  for (int64_t block = begin; block < end; ++block) {
    const int64_t b = block / plan.blocks_per_sample;
    const int64_t first = block % plan.blocks_per_sample * kGroup;
    const int64_t last = first + kGroup < plan.N ? first + kGroup : plan.N;
    if (plan.store.slot) store_rows(plan, b, first, last);
    if (plan.reference) error_rows(plan, b, first, last);
    for (int64_t n = first; n < last && stream;) {
      const bool shared = !plan.gates.row || plan.gates.span - n % plan.gates.span >= kGroup;
      const int rows = last - n == kGroup && shared && !packed_only ? kGroup : 1;
      if (!packed_only || plan.target[b * plan.N + n] >= 0)
        group_of_rows<X>(plan, b, n, rows, scratch, modulation);
      n += rows;
    }
  }
}

void residual_update_rows(const Plan& plan, int64_t begin, int64_t end, float* scratch) {
  switch (plan.x.type) {
    case Type::kFloat32:
      blocks<float>(plan, begin, end, scratch);
      break;
    case Type::kFloat16:
      blocks<Float16>(plan, begin, end, scratch);
      break;
    default:
      blocks<BFloat16>(plan, begin, end, scratch);
      break;
  }
}

}  // namespace

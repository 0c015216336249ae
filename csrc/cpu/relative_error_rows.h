// The blocks of relative_error on a CPU, compiled once per instruction set (see isa_*.cpp).
//
// Reads every element of the newest feature of a layer and of its K earlier ones once: 1 + K streams
// of e bytes an element, where one comparison after the other reads 2 * K + 1. Memory limits it.
// A work unit is a block of 16 rows of one layer; its sums are float64 from the first element on
// and are added up by the launcher in the order of the blocks, whatever thread computed them.
#pragma once

#include "fastcache/token_plan.h"
#include "vec.h"

namespace {

using fastcache::ErrorPlan;
using fastcache::Type;

constexpr int kLookaheads = 4;  // compared in one pass over the newest feature

inline Vec sum_of_four(const Vec* values) {
  return add(add(magnitude(values[0]), magnitude(values[1])),
             add(magnitude(values[2]), magnitude(values[3])));
}

// sums[0]: sum|newest|; sums[1 + k]: sum|earlier - newest| of K look-aheads from `lookahead` on.
template <class X, int K>
inline void error_rows_of(const ErrorPlan& plan, int64_t layer, int64_t lookahead, int64_t first,
                          int64_t last, double* sums) {
  WideSum size, errors[K];
  for (int64_t row = first; row < last; ++row) {
    const int64_t b = row / plan.N, n = row % plan.N;
    const X* newest = reinterpret_cast<const X*>(plan.newest[layer].at(b, n));
    const X* earlier[K];
    for (int k = 0; k < K; ++k)
      earlier[k] = reinterpret_cast<const X*>(plan.earlier[(lookahead + k) * plan.layers + layer].at(b, n));
    int64_t c = 0;
    for (; sizeof(X) == 2 && c + 4 * kLanes <= plan.D; c += 4 * kLanes) {
      Vec own[4];
      load_pair(newest + c, own[0], own[1]);
      load_pair(newest + c + 2 * kLanes, own[2], own[3]);
      size.add(sum_of_four(own));
      for (int k = 0; k < K; ++k) {
        Vec other[4];
        load_pair(earlier[k] + c, other[0], other[1]);
        load_pair(earlier[k] + c + 2 * kLanes, other[2], other[3]);
        for (int i = 0; i < 4; ++i) other[i] = sub(other[i], own[i]);
        errors[k].add(sum_of_four(other));
      }
    }
    for (; c + kLanes <= plan.D; c += kLanes) {
      const Vec own = load(newest + c);
      size.add(magnitude(own));
      for (int k = 0; k < K; ++k) errors[k].add(magnitude(sub(load(earlier[k] + c), own)));
    }
    if (c < plan.D) {
      const int rest = int(plan.D - c);
      const Vec own = load_part(newest + c, rest);
      size.add(magnitude(own));
      for (int k = 0; k < K; ++k) errors[k].add(magnitude(sub(load_part(earlier[k] + c, rest), own)));
    }
  }
  sums[0] = size.total();
  for (int k = 0; k < K; ++k) sums[1 + lookahead + k] = errors[k].total();
}

template <class X>
void error_blocks_of(const ErrorPlan& plan, int64_t begin, int64_t end) {
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t layer = unit / plan.blocks_per_layer,
                  first = unit % plan.blocks_per_layer * fastcache::kErrorRows;
    const int64_t last =
        first + fastcache::kErrorRows < plan.rows ? first + fastcache::kErrorRows : plan.rows;
    double* sums = plan.sums + unit * (1 + plan.lookaheads);
    for (int64_t k = 0; k < plan.lookaheads; k += kLookaheads) {
      switch (plan.lookaheads - k) {
        case 1:
          error_rows_of<X, 1>(plan, layer, k, first, last, sums);
          break;
        case 2:
          error_rows_of<X, 2>(plan, layer, k, first, last, sums);
          break;
        case 3:
          error_rows_of<X, 3>(plan, layer, k, first, last, sums);
          break;
        default:
          error_rows_of<X, kLookaheads>(plan, layer, k, first, last, sums);
          break;
      }
    }
  }
}

void error_blocks(const ErrorPlan& plan, int64_t begin, int64_t end) {
  switch (plan.newest[0].type) {
    case Type::kFloat32:
      error_blocks_of<float>(plan, begin, end);
      break;
    case Type::kFloat16:
      error_blocks_of<Float16>(plan, begin, end);
      break;
    default:
      error_blocks_of<BFloat16>(plan, begin, end);
      break;
  }
}

}  // namespace

// The rows of row_score and value_norm on a CPU, compiled once per instruction set (see isa_*.cpp).
//
// Reads every element of x (and of the reference) once, writes 4 bytes a token. Memory limits it,
// once a row's horizontal sum is small beside the row: four vectors of float32 partial sums cover
// the latency of an addition, and their lanes are summed in float64. A norm's square root, and the
// cosine's quotient, are float64 and rounded once. A work unit is a tile of 64 tokens, which value_norm
// goes through in the order of memory; of a packed projection it reads a part of every page, where the
// processor's own prefetch starts too late: the token after the next is asked for ahead (half the time
// on cold bf16). Lost: the same for whole rows, at any distance.
#pragma once

#include "fastcache/token_plan.h"
#include "vec.h"

namespace {

using fastcache::ScorePlan;
using fastcache::Type;

inline double wide_sum(Vec a) {
  WideSum lanes;
  lanes.add(a);
  return lanes.total();
}

// Sum of products of two rows; the same row twice: its squares.
template <class X, class Y>
inline double dot(const X* x, const Y* y, int64_t D) {
  Vec sums[4] = {broadcast(0.0f), broadcast(0.0f), broadcast(0.0f), broadcast(0.0f)};
  int64_t c = 0;
  for (; c + 4 * kLanes <= D; c += 4 * kLanes) {
    for (int i = 0; i < 4; i += 2) {
      Vec a[2], b[2];
      load_pair(x + c + i * kLanes, a[0], a[1]);
      load_pair(y + c + i * kLanes, b[0], b[1]);
      sums[i] = fma(a[0], b[0], sums[i]);
      sums[i + 1] = fma(a[1], b[1], sums[i + 1]);
    }
  }
  for (; c + kLanes <= D; c += kLanes) sums[0] = fma(load(x + c), load(y + c), sums[0]);
  if (c < D) sums[1] = fma(load_part(x + c, int(D - c)), load_part(y + c, int(D - c)), sums[1]);
  return wide_sum(add(add(sums[0], sums[2]), add(sums[1], sums[3])));
}

// Norms and product of two rows in one pass.
template <class X, class Y>
inline float distance(const X* x, const Y* y, int64_t D) {
  Vec products[2] = {broadcast(0.0f), broadcast(0.0f)}, mine[2] = {products[0], products[0]},
      others[2] = {products[0], products[0]};
  int64_t c = 0;
  for (; c + 2 * kLanes <= D; c += 2 * kLanes) {
    Vec a[2], b[2];
    load_pair(x + c, a[0], a[1]);
    load_pair(y + c, b[0], b[1]);
    for (int i = 0; i < 2; ++i) {
      products[i] = fma(a[i], b[i], products[i]);
      mine[i] = fma(a[i], a[i], mine[i]);
      others[i] = fma(b[i], b[i], others[i]);
    }
  }
  for (; c < D; c += kLanes) {
    const int count = D - c < kLanes ? int(D - c) : kLanes;
    const Vec a = load_part(x + c, count), b = load_part(y + c, count);
    products[0] = fma(a, b, products[0]);
    mine[0] = fma(a, a, mine[0]);
    others[0] = fma(b, b, others[0]);
  }
  double norms[2] = {__builtin_sqrt(wide_sum(mine[0]) + wide_sum(mine[1])),
                     __builtin_sqrt(wide_sum(others[0]) + wide_sum(others[1]))};
  for (double& norm : norms) norm = norm < 1e-8 ? 1e-8 : norm;  // a NaN stays
  return float(1.0 - (wide_sum(products[0]) + wide_sum(products[1])) / (norms[0] * norms[1]));
}

template <class X>
float row_score_of(const ScorePlan& plan, int64_t b, int64_t n) {
  const X* x = reinterpret_cast<const X*>(plan.x.at(b, n));
  if (!plan.reference) return float(__builtin_sqrt(dot(x, x, plan.D)));
  const char* y = plan.reference.at(b, n);
  switch (plan.reference.type) {
    case Type::kFloat32:
      return distance(x, reinterpret_cast<const float*>(y), plan.D);
    case Type::kFloat16:
      return distance(x, reinterpret_cast<const Float16*>(y), plan.D);
    default:
      return distance(x, reinterpret_cast<const BFloat16*>(y), plan.D);
  }
}

// The heads of a token, then the next token, if they are neighbours in memory (a packed projection);
// else the tokens of a head, then the next head. Every token adds its heads in the same order.
template <class X>
void value_norms(const ScorePlan& plan, int64_t b, int64_t first, int64_t count, float* out) {
  double sums[fastcache::kScoreTile] = {};
  const auto add_head = [&](int64_t h, int64_t n) {
    const X* v = reinterpret_cast<const X*>(plan.x.at(b, first + n) + h * plan.head);
    sums[n] += 1.0 - __builtin_sqrt(dot(v, v, plan.D));
  };
  if (plan.head < plan.x.row) {
    for (int64_t n = 0; n < count; ++n) {
      const char* ahead = plan.x.at(b, n + 2 < count ? first + n + 2 : first);
      for (int64_t h = 0; h < plan.heads; ++h) {
        for (int64_t byte = 0; byte < plan.D * int64_t(sizeof(X)); byte += 64)
          __builtin_prefetch(ahead + h * plan.head + byte);
        add_head(h, n);
      }
    }
  } else {
    for (int64_t h = 0; h < plan.heads; ++h) {
      for (int64_t n = 0; n < count; ++n) add_head(h, n);
    }
  }
  for (int64_t n = 0; n < count; ++n) out[n] = float(sums[n]);
}

template <class X>
void score_tiles(const ScorePlan& plan, int64_t begin, int64_t end) {
  const int64_t tiles = (plan.N + fastcache::kScoreTile - 1) / fastcache::kScoreTile;
  for (int64_t tile = begin; tile < end; ++tile) {
    const int64_t b = tile / tiles, first = tile % tiles * fastcache::kScoreTile;
    const int64_t count = plan.N - first < fastcache::kScoreTile ? plan.N - first : fastcache::kScoreTile;
    float* out = plan.out + b * plan.N + first;
    if (plan.by_heads) {
      value_norms<X>(plan, b, first, count, out);
    } else {
      for (int64_t n = 0; n < count; ++n) out[n] = row_score_of<X>(plan, b, first + n);
    }
  }
}

void row_scores(const ScorePlan& plan, int64_t begin, int64_t end) {
  switch (plan.x.type) {
    case Type::kFloat32:
      score_tiles<float>(plan, begin, end);
      break;
    case Type::kFloat16:
      score_tiles<Float16>(plan, begin, end);
      break;
    default:
      score_tiles<BFloat16>(plan, begin, end);
      break;
  }
}

}  // namespace

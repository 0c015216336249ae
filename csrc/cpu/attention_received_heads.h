// The heads of attention_received on a CPU, compiled once per instruction set (see isa_*.cpp).
//
// Arithmetic limits it: one multiply-add per query, key and channel and about 12 vector instructions
// per weight, so the N x M map is made of tiles that live in registers and is summed on the spot. A
// block of 256 keys is transposed to float32 once and stays in the second-level cache (72 KB at 72
// channels) while all queries pass: four of them against four vectors of keys at a time. Weights are
// 2^(q k^T - lse) with log2(e) folded into the queries. Columns are summed over 256 queries in
// float32, then in float64. Without lse a first pass over the same tiles finds it, with a running
// largest logit. A head of one sample is the work unit.
#pragma once

#include "fastcache/token_plan.h"
#include "vec.h"

namespace {

using fastcache::AttentionPlan;
using fastcache::kAttentionKeys;

constexpr int kQueries = 4;                        // of a tile
constexpr int kKeyVectors = kLanes >= 16 ? 4 : 2;  // of a tile: all sums in registers
constexpr int kTileKeys = kKeyVectors * kLanes;
constexpr int64_t kFloatQueries = 256;  // summed in float32 before float64

// 2^x to a float32's precision, 2^-126 below that; NaN stays NaN.
inline Vec exp2_of(Vec x) {
  x = larger_or_nan(broadcast(-126.0f), x);
  const Vec whole = nearest(x), part = sub(x, whole);
  constexpr float factors[] = {1.5403530e-4f, 1.3333558e-3f, 9.6181291e-3f, 5.5504109e-2f,
                               2.4022651e-1f, 6.9314718e-1f, 1.0f};  // ln(2)^k / k!
  Vec power = broadcast(1.5252734e-5f);
  for (int k = 0; k < 7; ++k) power = fma(power, part, broadcast(factors[k]));
  return times_power_of_two(power, whole);
}

inline void widen_row(const char* row, fastcache::Type type, float factor, int64_t d, float* out) {
  switch (type) {
    case fastcache::Type::kFloat32:
      for (int64_t c = 0; c < d; ++c) out[c] = reinterpret_cast<const float*>(row)[c] * factor;
      break;
    case fastcache::Type::kFloat16:
      for (int64_t c = 0; c < d; c += kLanes)
        store_some(out + c,
                   mul(load_some(reinterpret_cast<const Float16*>(row) + c, d - c), broadcast(factor)),
                   d - c);
      break;
    default:
      for (int64_t c = 0; c < d; c += kLanes)
        store_some(out + c,
                   mul(load_some(reinterpret_cast<const BFloat16*>(row) + c, d - c), broadcast(factor)),
                   d - c);
  }
}

// One head's block of keys [first, first + count), transposed; columns beyond count are zero.
inline void transpose_keys(const AttentionPlan& p, const char* k, int64_t first, int64_t count, float* row,
                           float* keys) {
  for (int64_t j = 0; j < kAttentionKeys; ++j) {
    if (j < count) widen_row(k + (first + j) * p.k.row, p.k.type, 1.0f, p.d, row);
    for (int64_t c = 0; c < p.d; ++c) keys[c * kAttentionKeys + j] = j < count ? row[c] : 0.0f;
  }
}

// Logits of four queries against one tile of keys.
inline void logits_of(const float* queries, const float* keys, int64_t d,
                      Vec (&logits)[kQueries][kKeyVectors]) {
  for (auto& row : logits) {
    for (Vec& logit : row) logit = broadcast(0.0f);
  }
  for (int64_t c = 0; c < d; ++c) {
    Vec key[kKeyVectors];
    for (int v = 0; v < kKeyVectors; ++v) key[v] = load(keys + c * kAttentionKeys + v * kLanes);
    for (int r = 0; r < kQueries; ++r) {
      const Vec query = broadcast(queries[r * d + c]);
      for (int v = 0; v < kKeyVectors; ++v) logits[r][v] = fma(query, key[v], logits[r][v]);
    }
  }
}

// f(query, key of the tile, its logits) over all queries and one block of keys.
template <class F>
inline void for_tiles(const AttentionPlan& p, const char* q, int64_t count, float* queries, const float* keys,
                      const F& f) {
  for (int64_t i = 0; i < p.N; i += kQueries) {
    const int rows = p.N - i < kQueries ? int(p.N - i) : kQueries;
    for (int r = 0; r < kQueries; ++r)
      widen_row(q + (i + (r < rows ? r : 0)) * p.q.row, p.q.type, p.factor, p.d, queries + r * p.d);
    for (int64_t j = 0; j < count; j += kTileKeys) {
      Vec logits[kQueries][kKeyVectors];
      logits_of(queries, keys + j, p.d, logits);
      f(i, rows, j, logits);
    }
  }
}

// largest[i] and sums[i] = sum of 2^(logit - largest[i]) over all keys; then largest holds log2 of the
// softmax's divisor.
inline void find_lse(const AttentionPlan& p, const char* q, const char* k, float* row, float* queries,
                     float* keys, float* largest, float* sums) {
  for (int64_t i = 0; i < p.N; ++i) largest[i] = -3.0e38f, sums[i] = 0.0f;
  for (int64_t first = 0; first < p.M; first += kAttentionKeys) {
    const int64_t count = p.M - first < kAttentionKeys ? p.M - first : kAttentionKeys;
    transpose_keys(p, k, first, count, row, keys);
    for_tiles(
        p, q, count, queries, keys, [&](int64_t i, int rows, int64_t j, Vec(&logits)[kQueries][kKeyVectors]) {
          for (int r = 0; r < rows; ++r) {
            alignas(64) float values[kTileKeys];
            const int wanted = count - j < kTileKeys ? int(count - j) : kTileKeys;
            for (int v = 0; v < kKeyVectors; ++v) store(values + v * kLanes, logits[r][v]);
            float most = largest[i + r];
            for (int n = 0; n < wanted; ++n)
              most = values[n] > most || values[n] != values[n] ? values[n] : most;
            float sum = 0.0f;
            for (int v = 0; v < kKeyVectors; ++v) {
              const int kept = wanted - v * kLanes;
              if (kept > 0)
                sum += ::sum(
                    keep_first(exp2_of(sub(logits[r][v], broadcast(most))), kept < kLanes ? kept : kLanes));
            }
            sums[i + r] = sums[i + r] * __builtin_exp2f(largest[i + r] - most) + sum;
            largest[i + r] = most;
          }
        });
  }
  for (int64_t i = 0; i < p.N; ++i) largest[i] += __builtin_log2f(sums[i]);
}

void received_heads(const AttentionPlan& p, int64_t begin, int64_t end, float* scratch) {
  float* keys = scratch;
  float* queries = keys + p.d * kAttentionKeys;
  float* row = queries + kQueries * p.d;
  float* columns = row + p.d;
  float* lse = columns + kAttentionKeys;
  float* sums = lse + p.N;
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t b = unit / p.H, h = unit % p.H;
    const char* q = p.q.data + b * p.q.batch + h * p.q_head;
    const char* k = p.k.data + b * p.k.batch + h * p.k_head;
    if (p.lse) {
      for (int64_t i = 0; i < p.N; ++i)
        lse[i] = p.lse[b * p.lse_batch + h * p.lse_head + i * p.lse_row] * 1.44269504f;
    } else {
      find_lse(p, q, k, row, queries, keys, lse, sums);
    }
    for (int64_t first = 0; first < p.M; first += kAttentionKeys) {
      const int64_t count = p.M - first < kAttentionKeys ? p.M - first : kAttentionKeys;
      transpose_keys(p, k, first, count, row, keys);
      double wide[kAttentionKeys] = {};
      for (int64_t j = 0; j < kAttentionKeys; ++j) columns[j] = 0.0f;
      const auto flush = [&] {
        for (int64_t j = 0; j < count; ++j) wide[j] += columns[j], columns[j] = 0.0f;
      };
      for_tiles(p, q, count, queries, keys,
                [&](int64_t i, int rows, int64_t j, Vec(&logits)[kQueries][kKeyVectors]) {
                  if (j == 0 && i > 0 && i % kFloatQueries == 0) flush();
                  for (int v = 0; v < kKeyVectors; ++v) {
                    Vec column = load(columns + j + v * kLanes);
                    for (int r = 0; r < rows; ++r)
                      column = add(column, exp2_of(sub(logits[r][v], broadcast(lse[i + r]))));
                    store(columns + j + v * kLanes, column);
                  }
                });
      flush();
      for (int64_t j = 0; j < count; ++j) p.partial[unit * p.M + first + j] = wide[j];
    }
  }
}

}  // namespace

// x' = x + sum_j weights[j] * gates[j] * scales[j] * features[j], one launch for all terms, and the
// refresh of one slot on the way.
//
// Reads x once and every feature once, writes x' once: (J + 2) * e bytes an element (e: bytes of a
// value), one e more for each fresh row stored; gates are hits in L1 or L2. Limited by memory. At
// 4.3 TB/s (copy bandwidth assumed for an H200) 56 bf16 terms of [2, 256, 1152] are 68 MB: 16 us;
// not measured yet.
// A thread owns V columns of R rows, so that a gate is loaded once for R rows and R loads of 16
// bytes are in flight per term; those of the next term are issued before this one is added: 8 in
// flight, checked in SASS. That takes 128 registers, two blocks of 256 threads a multiprocessor (nvcc
// 13, no spills on sm_80, 90, 100). Features are read once: evict first, so that x' stays in L2 for
// the next kernel. Rows beyond the last are clamped, not branched over: they read the last row again
// and write nothing.
// Lost: addresses of all optional arguments computed ahead of the loop, which is what the compiler
// does by itself (174 registers); hence Tile::renewed.
#pragma once

#include "fastcache/cuda/terms.cuh"

namespace fastcache::cuda {

constexpr int kSumThreads = 256;

template <int R, int V>
struct SumTile {
  static constexpr int kPieces = R, kWidth = V;
  static constexpr bool kSharesColumns = true;
  int32_t b, first, column_, N;

  FASTCACHE_DEVICE int32_t token(int k) const { return first + k < N ? first + k : N - 1; }
  FASTCACHE_DEVICE int64_t column() const { return column_; }
  FASTCACHE_DEVICE int64_t step(int) const { return 0; }
  FASTCACHE_DEVICE bool inside(int) const { return true; }
  FASTCACHE_DEVICE bool owned(int k) const { return first + k < N; }
  FASTCACHE_DEVICE SumTile renewed() const { return {opaque(b), opaque(first), opaque(column_), N}; }
};

// All terms in order. If `same`, features have the dtype of x, and the loads of the next term are issued
// before the sum of this one; else their dtype is looked up at run time.
template <Type X, bool same, class Tile, int capacity>
FASTCACHE_DEVICE void add_terms(const Parameters<capacity>& p, const Tile& whole, Values<Tile>& total) {
  Values<Tile> value = {};
  const auto widened = [&](int k, int i) { return value[k][i]; };
  int32_t j = 0, f = 0;
#pragma unroll 1
  for (int32_t end = p.position;; end = p.term_count) {  // terms before the slot's, it, terms after it
    Tile tile = whole.renewed();
    RawTile<X, Tile> next;
    if (same && j < end) next = load_tile<X, Use::kOnce>(p.features[f], tile);
#pragma unroll 1
    for (; j < end; ++j, ++f) {
      tile = whole.renewed();
      if constexpr (same) {
        const RawTile<X, Tile> now = next;
        if (j + 1 < end) next = load_tile<X, Use::kOnce>(p.features[f + 1], tile);
        add_term(p, tile, j, true, [&](int k, int i) { return now.pieces[k][i]; }, total);
      } else {
        load_values<Use::kOnce>(p.features[f], p.feature_type, tile, value);
        add_term(p, tile, j, true, widened, total);
      }
    }
    if (j == p.term_count) break;
    tile = whole.renewed();
    refresh_values(p, tile, value);
    add_term(p, tile, j++, false, widened, total);
  }
}

// Grid: (thread blocks that cover the tiles of a sample, samples). Needs D % V == 0.
template <Type X, bool same, int V, int R, int capacity>
__global__ void __launch_bounds__(kSumThreads, 2) sum_kernel(const __grid_constant__ Parameters<capacity> p) {
  using Tile = SumTile<R, V>;
  const uint32_t runs = p.D / V;
  const uint32_t index = blockIdx.x * kSumThreads + threadIdx.x;
  const uint32_t group = index / runs;
  if (group >= (static_cast<uint32_t>(p.N) + R - 1) / R) return;
  for (int32_t b = blockIdx.y; b < p.B; b += gridDim.y) {
    const Tile tile{b, static_cast<int32_t>(group * R), static_cast<int32_t>((index - group * runs) * V),
                    p.N};
    Values<Tile> total;
    widen_tile(load_tile<X, Use::kShared>(p.x, tile), total);
    add_terms<X, same>(p, tile, total);
    if (!p.updated) continue;
    const TokenRows updated{p.updated, int64_t(p.N) * p.D, p.D};
#pragma unroll
    for (int k = 0; k < R; ++k) {
      if (tile.owned(k)) store<X, V>(p.updated, offset_of(updated, tile, k), narrowed<X>(total[k]));
    }
  }
}

}  // namespace fastcache::cuda

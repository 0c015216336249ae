// The sum over whole rows, then everything that needs a whole row, from registers: norm, modulation,
// packed rows, error sums, and the float8 store with its row scale.
//
// Reads x, the features and the vectors once, writes x' and h once: 4 * e bytes an element for one
// term (e: bytes of a value), 2 * e for h alone. Limited by memory: 4.3 TB/s (copy bandwidth assumed
// for an H200) would be 18 us for [2, 4096, 1152] in bf16 with x'; not measured yet. Registers
// (nvcc 13; sm_80, 90, 100): 131, 138, 137 for D = 1152 and 99, 115, 120 for 3072 in bf16; none spills.
// THREADS threads own a row, VECTORS runs of V columns each; covers that fit D exactly leave no lane
// idle (csrc/cuda/config.h has the table). Rows of 32 threads need no barrier, so four share a block.
// x' is rounded before the statistics are taken, which are those of what the next step reads; the
// variance takes a second pass over registers, which costs no bytes and is exact for any mean.
#pragma once

#include "fastcache/cuda/terms.cuh"

namespace fastcache::cuda {

template <int THREADS>
constexpr int kRowsPerBlock = THREADS == 32 ? 4 : 1;
template <int THREADS>
constexpr int kResident = THREADS <= 128   ? 3
                          : THREADS == 256 ? 2
                                           : 1;  // blocks on a multiprocessor: 168, 128, 64 registers

template <int THREADS, int VECTORS, int V>
struct RowTile {
  static constexpr int kPieces = VECTORS, kWidth = V;
  static constexpr bool kSharesColumns = false;
  int32_t b, n, lane, D;

  FASTCACHE_DEVICE int32_t token(int) const { return n; }
  FASTCACHE_DEVICE int64_t column() const { return lane * V; }
  FASTCACHE_DEVICE int64_t step(int k) const { return k * THREADS * V; }
  FASTCACHE_DEVICE bool inside(int k) const { return (k * THREADS + lane) * V < D; }
  FASTCACHE_DEVICE bool owned(int k) const { return inside(k); }
  FASTCACHE_DEVICE RowTile renewed() const { return {opaque(b), opaque(n), opaque(lane), D}; }
};

struct Add {
  FASTCACHE_DEVICE float operator()(float a, float b) const { return a + b; }
};

struct Largest {  // NaN if one is NaN
  FASTCACHE_DEVICE float operator()(float a, float b) const { return b > a || b != b ? b : a; }
};

// The reduction of one value per thread over the threads of a row; every thread gets the same bits.
// `shared` belongs to this call alone, so one barrier is enough.
template <int THREADS, class Combine>
FASTCACHE_DEVICE float reduce_row(float value, float* shared, const Combine& combine) {
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2)
    value = combine(value, __shfl_xor_sync(0xffffffffu, value, distance));
  if constexpr (THREADS > 32) {
    if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = value;
    __syncthreads();
    value = shared[0];
#pragma unroll
    for (int warp = 1; warp < THREADS / 32; ++warp) value = combine(value, shared[warp]);
  }
  return value;
}

// Row of h that the token writes, or -1.
FASTCACHE_DEVICE int32_t target_of(const Common& p, int32_t b, int32_t n) {
  if (p.norm == Norm::kNone) return -1;
  if (!p.target.data) return n;
  const int32_t row = p.target.data[b * p.target.batch + n * p.target.row];
  if (row >= -1 && row < p.target_count) return row;
  report(p, kBadSlot);
  return -1;
}

// Stores the fresh row of a float8 slot with its scale, and returns what the slot then holds.
template <int THREADS, class Tile>
FASTCACHE_DEVICE void refresh_float8(const Common& p, const Tile& tile, float* shared, Values<Tile>& value) {
  constexpr int V = Tile::kWidth;
  const Refresh& r = p.refresh;
  float* held = r.scale + tile.b * r.scale_batch + tile.n * r.scale_row;
  const int32_t source = source_of(p, tile, 0);
  float factor;
  if (source >= 0) {
    const TokenRows fresh{static_cast<char*>(r.fresh.data), r.fresh.batch, 0};
    visit_wide(r.fresh_type, [&](auto tag) {
      TokenRows taken = fresh;
      taken.data = static_cast<char*>(taken.data) + source * r.fresh.row * kSizeOf<tag.value>;
      widen_tile(load_tile<tag.value, Use::kOnce>(taken, tile), value);
    });
    float largest = 0.0f;
    for_each<Tile>(value, [&](float& v, int, int) { largest = Largest()(largest, fabsf(v)); });
    largest = reduce_row<THREADS>(largest, shared, Largest());
    factor = largest > 0.0f ? largest / 448.0f : 1.0f;
#pragma unroll
    for (int k = 0; k < Tile::kPieces; ++k) {
      if (!tile.inside(k)) continue;
      for (int i = 0; i < V; ++i) value[k][i] = value[k][i] / factor;
      const Raw<Type::kFloat8, V> encoded = narrowed<Type::kFloat8>(value[k]);
      store<Type::kFloat8, V>(r.slot.data, offset_of(r.slot, tile, k), encoded);
      for (int i = 0; i < V; ++i) value[k][i] = encoded[i];
    }
    if (tile.lane == 0) *held = factor;
  } else {
    factor = *held;
    widen_tile(load_tile<Type::kFloat8, Use::kOwn>(r.slot, tile), value);
  }
  for_each<Tile>(value, [&](float& v, int, int) { v *= factor; });
}

// Error sums of the newest feature's row.
template <int THREADS, class Tile>
FASTCACHE_DEVICE void sum_errors(const Common& p, const Tile& tile, float row_scale,
                                 const Values<Tile>& value, float (*shared)[THREADS / 32]) {
  Values<Tile> reference;
  load_values<Use::kOnce>(p.reference, p.reference_type, tile, reference);
  float sums[3] = {};
  for_each<Tile>(reference, [&](float& r, int k, int i) {
    if (!tile.inside(k)) return;
    const float feature = row_scale * value[k][i];
    sums[0] += fabsf(feature - r);
    sums[1] += fabsf(feature);
    sums[2] += fabsf(r);
  });
  for (int i = 0; i < 3; ++i) {
    sums[i] = reduce_row<THREADS>(sums[i], shared[i], Add());
    if (tile.lane == 0) p.row_errors[(tile.b * int64_t(p.N) + tile.n) * 3 + i] = sums[i];
  }
}

// Grid: thread blocks that cover B * N rows. Needs D % V == 0 and D <= THREADS * VECTORS * V.
template <Type X, int THREADS, int VECTORS, int V, int capacity>
__global__ void __launch_bounds__(THREADS* kRowsPerBlock<THREADS>, kResident<THREADS>)
    row_kernel(const __grid_constant__ Parameters<capacity> p) {
  using Tile = RowTile<THREADS, VECTORS, V>;
  __shared__ float shared[6][THREADS / 32];
  const uint32_t row = blockIdx.x * kRowsPerBlock<THREADS> + threadIdx.x / THREADS;
  if (row >= static_cast<uint32_t>(p.B) * static_cast<uint32_t>(p.N)) return;
  const uint32_t b = row / p.N;
  const Tile tile{static_cast<int32_t>(b), static_cast<int32_t>(row - b * p.N),
                  static_cast<int32_t>(threadIdx.x % THREADS), p.D};
  const int32_t target = target_of(p, tile.b, tile.n);
  if (target < 0 && !p.updated && !p.refresh.slot.data && !p.reference.data)
    return;  // a row that nobody wants

  Values<Tile> total;
  widen_tile(load_tile<X, Use::kShared>(p.x, tile), total);
  const int32_t last = p.refresh.slot.data ? p.position : p.term_count - 1;  // the newest feature
#pragma unroll 1
  for (int32_t j = 0, f = 0; j < p.term_count; ++j) {
    const Tile here = tile.renewed();
    const bool stored = j == p.position;
    Values<Tile> value = {};
    if (!stored) {
      load_values<Use::kOnce>(p.features[f++], p.feature_type, here, value);
    } else if (p.refresh.slot_type == Type::kFloat8) {
      refresh_float8<THREADS>(p, here, shared[0], value);
    } else {
      refresh_values(p, here, value);
    }
    if (j == last && p.reference.data)
      sum_errors<THREADS>(p, here, stored ? 1.0f : row_scale_of(p, here, j, 0), value, shared + 1);
    add_term(p, here, j, !stored, [&](int k, int i) { return value[k][i]; }, total);
  }

  Raw<X, V> rounded[VECTORS];
  const TokenRows updated{p.updated, int64_t(p.N) * p.D, p.D};
#pragma unroll
  for (int k = 0; k < VECTORS; ++k) {
    rounded[k] = narrowed<X>(total[k]);
    if (p.updated && tile.inside(k)) store<X, V>(p.updated, offset_of(updated, tile, k), rounded[k]);
    for (int i = 0; i < V; ++i) total[k][i] = rounded[k][i];
  }
  if (target < 0) return;

  Values<Tile>& h = total;
  if (p.norm == Norm::kLayer) {
    float sum = 0.0f;
    for_each<Tile>(h, [&](float& v, int k, int) { sum += tile.inside(k) ? v : 0.0f; });
    const float mean = reduce_row<THREADS>(sum, shared[4], Add()) / p.D;
    for_each<Tile>(h, [&](float& v, int, int) { v -= mean; });
  }
  if (p.norm == Norm::kLayer || p.norm == Norm::kRms) {
    float squares = 0.0f;
    for_each<Tile>(h, [&](float& v, int k, int) { squares += tile.inside(k) ? v * v : 0.0f; });
    const float inverse = rsqrtf(reduce_row<THREADS>(squares, shared[5], Add()) / p.D + p.eps);
    for_each<Tile>(h, [&](float& v, int, int) { v *= inverse; });
  }
#pragma unroll 1
  for (int v = 0; v < kVectors; ++v) {
    const VectorRows& vector = p.vectors[v];
    if (!vector.data) continue;
    const Tile here = tile.renewed();
    visit_wide(vector.type, [&](auto tag) {
      const auto own = load_tile<tag.value, Use::kShared>(vector, here);
      if (v == kNormBias || v == kShift) {
        for_each<Tile>(h, [&](float& value, int k, int i) { value += own.pieces[k][i]; });
      } else {
        const float one = v == kScale ? 1.0f : 0.0f;
        for_each<Tile>(h, [&](float& value, int k, int i) { value *= one + own.pieces[k][i]; });
      }
    });
  }
  const TokenRows modulated{p.modulated, int64_t(p.target_count) * p.D, 0};
#pragma unroll
  for (int k = 0; k < VECTORS; ++k) {
    if (tile.inside(k))
      store<X, V>(p.modulated, offset_of(modulated, tile, k) + target * int64_t(p.D), narrowed<X>(h[k]));
  }
}

}  // namespace fastcache::cuda

// The sum of terms over one tile: what the sum kernel and the row kernel share.
//
// A tile is what a thread owns: kPieces runs of kWidth consecutive columns. It says where they are:
//   b                   its sample
//   token(k)            the token of piece k
//   column() + step(k)  its first column; step is known at compile time
//   inside(k)           may be read
//   owned(k)            may be written: no other thread does
//   renewed()           the same tile, of which the compiler knows nothing: without it, the addresses of
//                       every dtype and every optional argument are computed ahead of the loop over
//                       terms and fill the registers
//   kSharesColumns      pieces are rows of one column run (else: column runs of one row)
// Values of a tile are float[kPieces][kWidth]; loads of a tile are issued together.
#pragma once

#include "fastcache/cuda/parameters.h"
#include "fastcache/cuda/values.cuh"

namespace fastcache::cuda {

template <class Tile>
using Values = float[Tile::kPieces][Tile::kWidth];

template <Type type, class Tile>
struct RawTile {
  Raw<type, Tile::kWidth> pieces[Tile::kPieces];
};

template <class Tile>
FASTCACHE_DEVICE int64_t offset_of(const TokenRows& rows, const Tile& tile, int k) {
  return tile.b * rows.batch + tile.token(k) * rows.row + tile.column() + tile.step(k);
}

template <class Tile>
FASTCACHE_DEVICE int64_t offset_of(const VectorRows& rows, const Tile& tile, int k) {
  return tile.b * rows.batch + (rows.row ? tile.token(k) / rows.span * rows.row : 0) + tile.column() +
         tile.step(k);
}

template <Type type, Use use, class Tile, class Layout>
FASTCACHE_DEVICE RawTile<type, Tile> load_tile(const Layout& rows, const Tile& tile, int64_t start = 0) {
  RawTile<type, Tile> out;
#pragma unroll
  for (int k = 0; k < Tile::kPieces; ++k) {
    if (tile.inside(k))
      out.pieces[k] = load<type, Tile::kWidth, use>(rows.data, start + offset_of(rows, tile, k));
  }
  return out;
}

template <Type type, class Tile>
FASTCACHE_DEVICE void widen_tile(const RawTile<type, Tile>& raw, Values<Tile>& out) {
#pragma unroll
  for (int k = 0; k < Tile::kPieces; ++k) {
#pragma unroll
    for (int i = 0; i < Tile::kWidth; ++i) out[k][i] = raw.pieces[k][i];
  }
}

// f(value, k, i) for every value of a tile.
template <class Tile, class F>
FASTCACHE_DEVICE void for_each(Values<Tile>& values, const F& f) {
#pragma unroll
  for (int k = 0; k < Tile::kPieces; ++k) {
#pragma unroll
    for (int i = 0; i < Tile::kWidth; ++i) f(values[k][i], k, i);
  }
}

template <Use use, class Tile>
FASTCACHE_DEVICE void load_values(const TokenRows& rows, Type type, const Tile& tile, Values<Tile>& out) {
  visit(type, [&](auto tag) { widen_tile<tag.value>(load_tile<tag.value, use>(rows, tile), out); });
}

FASTCACHE_DEVICE void report(const Common& p, int32_t bit) { atomicOr(p.error_flag, bit); }

template <class Tile>
FASTCACHE_DEVICE float row_scale_of(const Common& p, const Tile& tile, int32_t j, int k) {
  return p.scales ? p.scales[j * p.scales_term + tile.b * p.scales_batch + tile.token(k) * p.scales_row]
                  : 1.0f;
}

// total += weight * gate * (row scale * value) of term j. Value: V(k, i) is value i of piece k. Row
// scales are factors and not a step of their own, so that a raw tile is widened only as it is added.
template <class Tile, class V>
FASTCACHE_DEVICE void add_term(const Common& p, const Tile& tile, int32_t j, bool scaled, const V& value,
                               Values<Tile>& total) {
  const float weight = p.weights ? p.weights[j * p.weight_stride] : 1.0f;
  float row_scale[Tile::kPieces];
#pragma unroll
  for (int k = 0; k < Tile::kPieces; ++k)
    row_scale[k] = k > 0 && !Tile::kSharesColumns ? row_scale[0]
                   : scaled                       ? row_scale_of(p, tile, j, k)
                                                  : 1.0f;
  int32_t row = p.gates.data ? 0 : -1;
  if (p.gate_index) {
    row = p.gate_index[j * p.gate_index_stride];
    if (row < -1 || row >= p.gate_count) {  // never a wild read, and never mistaken for a result
      report(p, kBadGate);
      for_each<Tile>(total, [](float& sum, int, int) { sum = bits_as_float(0x7fc00000); });
      row = -1;
    }
  }
  const int64_t start = row * p.gate_pack;
  if (Tile::kSharesColumns && (row < 0 || p.gates.row == 0)) {
    float factor[Tile::kWidth];
#pragma unroll
    for (int i = 0; i < Tile::kWidth; ++i) factor[i] = weight;
    if (row >= 0) {
      visit_wide(p.gates.type, [&](auto tag) {
        const auto gate =
            load<tag.value, Tile::kWidth, Use::kShared>(p.gates.data, start + offset_of(p.gates, tile, 0));
#pragma unroll
        for (int i = 0; i < Tile::kWidth; ++i) factor[i] = weight * gate[i];
      });
    }
    for_each<Tile>(total,
                   [&](float& sum, int k, int i) { sum = fmaf(factor[i], row_scale[k] * value(k, i), sum); });
  } else if (row < 0) {
    for_each<Tile>(total,
                   [&](float& sum, int k, int i) { sum = fmaf(weight, row_scale[k] * value(k, i), sum); });
  } else {
    visit_wide(p.gates.type, [&](auto tag) {
#pragma unroll
      for (int k = 0; k < Tile::kPieces; ++k) {
        if (!tile.inside(k)) continue;
        const Tile here = tile.renewed();
        const auto gate =
            load<tag.value, Tile::kWidth, Use::kShared>(p.gates.data, start + offset_of(p.gates, here, k));
#pragma unroll
        for (int i = 0; i < Tile::kWidth; ++i)
          total[k][i] = fmaf(weight * gate[i], row_scale[k] * value(k, i), total[k][i]);
      }
    });
  }
}

// Row of `fresh` that piece k takes, or -1.
template <class Tile>
FASTCACHE_DEVICE int32_t source_of(const Common& p, const Tile& tile, int k) {
  const SlotMap& map = p.refresh.map;
  if (!map.data) return p.refresh.fresh.data ? tile.token(k) : -1;
  const int32_t source = map.data[tile.b * map.batch + tile.token(k) * map.row];
  if (source >= -1 && source < p.refresh.fresh_count) return source;
  report(p, kBadSlot);
  return -1;
}

// Stores the fresh rows of a slot that is no float8, and returns what the slot then holds.
template <class Tile>
FASTCACHE_DEVICE void refresh_values(const Common& p, const Tile& tile, Values<Tile>& out) {
  constexpr int K = Tile::kPieces, V = Tile::kWidth;
  const Refresh& r = p.refresh;
  int32_t source[K];
#pragma unroll
  for (int k = 0; k < K; ++k) source[k] = k > 0 && !Tile::kSharesColumns ? source[0] : source_of(p, tile, k);
  if (r.fresh_type == r.slot_type) {  // one load from either place, and bits are copied as they are
    visit_wide(r.slot_type, [&](auto tag) {
      constexpr Type type = tag.value;
      RawTile<type, Tile> raw;
#pragma unroll
      for (int k = 0; k < K; ++k) {
        if (!tile.inside(k)) continue;
        const bool taken = source[k] >= 0;
        const int64_t from =
            taken ? tile.b * r.fresh.batch + source[k] * r.fresh.row + tile.column() + tile.step(k)
                  : offset_of(r.slot, tile, k);
        raw.pieces[k] = load<type, V, Use::kOwn>(taken ? r.fresh.data : r.slot.data, from);
      }
#pragma unroll
      for (int k = 0; k < K; ++k) {
        if (source[k] >= 0 && tile.owned(k))
          store<type, V>(r.slot.data, offset_of(r.slot, tile, k), raw.pieces[k]);
      }
      widen_tile(raw, out);
    });
    return;
  }
  visit_wide(r.fresh_type, [&](auto tag) {
#pragma unroll
    for (int k = 0; k < K; ++k) {
      if (source[k] < 0 || !tile.inside(k)) continue;
      const auto raw = load<tag.value, V, Use::kOnce>(
          r.fresh.data, tile.b * r.fresh.batch + source[k] * r.fresh.row + tile.column() + tile.step(k));
#pragma unroll
      for (int i = 0; i < V; ++i) out[k][i] = raw[i];
    }
  });
  visit_wide(r.slot_type, [&](auto tag) {
    constexpr Type type = tag.value;
#pragma unroll
    for (int k = 0; k < K; ++k) {
      if (!tile.inside(k)) continue;
      const int64_t place = offset_of(r.slot, tile, k);
      const Raw<type, V> held =
          source[k] >= 0 ? narrowed<type>(out[k]) : load<type, V, Use::kOwn>(r.slot.data, place);
      if (source[k] >= 0 && tile.owned(k)) store<type, V>(r.slot.data, place, held);
#pragma unroll
      for (int i = 0; i < V; ++i) out[k][i] = held[i];
    }
  });
}

}  // namespace fastcache::cuda

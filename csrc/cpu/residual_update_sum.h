// x + sum of terms for a group of rows: into fp32 sums, and from the last term straight to x'.
//
// Reads every feature once; the sums stay in the first cache level. One term at a time over four
// rows, which share one gate vector, while the same rows of the next term are prefetched into the
// second level. Rows wider than kTile are cut into column tiles, each taken through all terms.
// Bare loops on one quiet Zen 4 core, 56 bf16 terms of [2, 256, 1152]; reading alone, in this order
// and with the same prefetch, gives 25 GB/s there, and the whole operator 22 to 25:
//   this design                                                23 to 31 GB/s
//   column tiles of 4 x 64 with the sums in registers          25 to 29, but needs 32 registers
//   one row, four terms a pass, blocks of 16 rows              24
//   four rows, two terms a pass, blocks of 4 to 16 rows        17 to 20
//   four rows, one term, blocks of 8 rows (sums leave L1)      13
//   no prefetch, or prefetching into L1                        10 to 17
// Prefetching x and the first feature of the next rows: 1.5 times the speed for one term. Tiles of
// half the width for fp32 features, so that they and the sums fit into L1: 1.2 times for 56 terms.
#pragma once

namespace {

constexpr int64_t kTile = 1280;  // columns: 4 rows of sums and of a 16-bit feature take 30 KB

// Columns per tile: tiles of about equal width, half as wide for 32-bit features, in whole lines.
inline int64_t tile_width(const Plan& plan) {
  const int64_t most = plan.terms[0].feature.type == Type::kFloat32 ? kTile / 2 : kTile;
  const int64_t tiles = (plan.D + most - 1) / most;
  return ((plan.D + tiles - 1) / tiles + 63) / 64 * 64;
}

inline float row_scale(const Term& term, int64_t b, int64_t n) {
  return term.row_scale ? *reinterpret_cast<const float*>(term.row_scale.at(b, n)) : 1.0f;
}

// Rows [n, n + rows) of sample b, and where their results go.
struct Group {
  int64_t b, n;
  int rows;
  int64_t begin, end;  // columns
  float* sums;         // fp32, `pitch` floats from row to row
  int64_t pitch;
  char* rounded[kGroup];  // rows of x' (or of scratch), in the type of x
  float total[kGroup];    // sum of each rounded row so far
};

// What is read next: the same rows of the next term, or the next rows.
struct Ahead {
  const char* feature = nullptr;
  int64_t row = 0;
  const char* gate = nullptr;
  const char* x = nullptr;
};

// Stages in which a term also does the work of its neighbours, to save passes over the sums.
enum Stage { kMiddle = 0, kFirst = 1, kLast = 2, kOnly = 3 };

// sums[r] += weight * gate * row_scale[r] * feature[r]. A first stage starts from x instead of the
// sums, a last stage rounds to x' instead of storing the sums; both need F to be the type of x.
template <class F, class G, int R, bool scaled, int stage>
void add_term(const Plan& plan, const Term& term, Group& group, const Ahead& ahead) {
  const F* feature[R];
  const F* start[R];
  F* rounded_row[R];
  float* sums[R];
  Vec scale[R], total[R];
  for (int r = 0; r < R; ++r) {
    feature[r] = reinterpret_cast<const F*>(term.feature.at(group.b, group.n + r));
    start[r] = reinterpret_cast<const F*>(plan.x.at(group.b, group.n + r));
    rounded_row[r] = reinterpret_cast<F*>(group.rounded[r]);
    sums[r] = group.sums + r * group.pitch;
    scale[r] = broadcast(scaled ? row_scale(term, group.b, group.n + r) : 1.0f);
    total[r] = broadcast(0.0f);
  }
  // Without a gate G is NoGate, which is never read.
  const G* gate = reinterpret_cast<const G*>(
      term.gate ? term.gate + (plan.gates.at(group.b, group.n) - plan.gates.data) : nullptr);
  const Vec weight = broadcast(term.weight);
  constexpr int kPair = 2 * kLanes;
  constexpr int kLine =
      64 / int(sizeof(F)) > kPair ? 64 / int(sizeof(F)) : kPair;  // a cache line of F, or a pair
  int64_t c = group.begin;
  while (c + kLine <= group.end) {
    for (int r = 0; r < R; ++r) {
      for (int byte = 0; byte < kLine * int(sizeof(F)); byte += 64) {
        __builtin_prefetch(ahead.feature + r * ahead.row + c * int64_t(sizeof(F)) + byte, 0, 2);
        if constexpr (stage & kFirst)
          __builtin_prefetch(ahead.x + r * plan.x.row + c * int64_t(sizeof(F)) + byte, 0, 2);
      }
    }
    __builtin_prefetch(ahead.gate + c * int64_t(sizeof(G)), 0, 2);
    for (int pair = 0; pair < kLine; pair += kPair, c += kPair) {
      Vec low, high;
      load_pair(gate + c, low, high);
      low = mul(weight, low);
      high = mul(weight, high);
      for (int r = 0; r < R; ++r) {
        Vec a, b, sum_a, sum_b;
        load_pair(feature[r] + c, a, b);
        if (scaled) a = mul(a, scale[r]), b = mul(b, scale[r]);
        if constexpr (stage & kFirst) {
          load_pair(start[r] + c, sum_a, sum_b);
        } else {
          load_pair(sums[r] + c, sum_a, sum_b);
        }
        a = fma(low, a, sum_a);
        b = fma(high, b, sum_b);
        if constexpr (stage & kLast) {
          store_pair(rounded_row[r] + c, a, b);
          total[r] = add(total[r], add(a, b));
        } else {
          store_pair(sums[r] + c, a, b);
        }
      }
    }
  }
  for (; c < group.end; c += kLanes) {
    const int rest = group.end - c < kLanes ? int(group.end - c) : kLanes;
    const Vec coefficient = mul(weight, load_part(gate + c, rest));
    for (int r = 0; r < R; ++r) {
      Vec value = load_part(feature[r] + c, rest);
      if (scaled) value = mul(value, scale[r]);
      value = fma(coefficient, value, (stage & kFirst) ? load_part(start[r] + c, rest) : load(sums[r] + c));
      if constexpr (stage & kLast) {
        value = keep_first(rounded(value, rounded_row[r]), rest);
        store_part(rounded_row[r] + c, value, rest);
        total[r] = add(total[r], value);
      } else {
        store(sums[r] + c, value);
      }
    }
  }
  for (int r = 0; r < R; ++r) {
    if constexpr (stage & kLast) group.total[r] += sum(total[r]);
  }
}

using AddTerm = void (*)(const Plan&, const Term&, Group&, const Ahead&);

template <class F>
constexpr bool kIsStream = true;  // x can have this type
template <>
constexpr bool kIsStream<Float8> = false;

template <class F, class G, int R>
AddTerm add_term_of(bool scaled, int stage) {
  if (scaled) return add_term<F, G, R, true, kMiddle>;
  if constexpr (kIsStream<F>) {
    if (stage == kFirst) return add_term<F, G, R, false, kFirst>;
    if (stage == kLast) return add_term<F, G, R, false, kLast>;
    if (stage == kOnly) return add_term<F, G, R, false, kOnly>;
  }
  return add_term<F, G, R, false, kMiddle>;
}

template <class F, int R>
AddTerm add_term_of(const Plan& plan, const Term& term, int stage) {
  const bool scaled = static_cast<bool>(term.row_scale);
  if (!term.gate) return add_term_of<F, NoGate, R>(scaled, stage);
  switch (plan.gates.type) {
    case Type::kFloat32:
      return add_term_of<F, float, R>(scaled, stage);
    case Type::kFloat16:
      return add_term_of<F, Float16, R>(scaled, stage);
    default:
      return add_term_of<F, BFloat16, R>(scaled, stage);
  }
}

template <int R>
AddTerm add_term_of(const Plan& plan, const Term& term, int stage) {
  switch (term.feature.type) {
    case Type::kFloat32:
      return add_term_of<float, R>(plan, term, stage);
    case Type::kFloat16:
      return add_term_of<Float16, R>(plan, term, stage);
    case Type::kBFloat16:
      return add_term_of<BFloat16, R>(plan, term, stage);
    default:
      return add_term_of<Float8, R>(plan, term, stage);
  }
}

inline Ahead ahead_of(const Plan& plan, const Term& term, int64_t b, int64_t n, const char* x) {
  const char* gate = term.gate ? term.gate + (plan.gates.at(b, n) - plan.gates.data) : nullptr;
  return {term.feature.at(b, n), term.feature.row, gate, x};
}

// Can the term start from x, or end in x', itself?
inline bool like_stream(const Plan& plan, const Term& term) {
  return term.feature.type == plan.x.type && !term.row_scale;
}

// x + all terms, rounded to group.rounded, with the row sums in group.total. At least one term.
template <class X>
void sum_terms(const Plan& plan, Group& group) {
  const int64_t count = plan.term_count;
  const bool from_x = like_stream(plan, plan.terms[0]);
  const bool to_x = like_stream(plan, plan.terms[count - 1]);
  const int64_t width = tile_width(plan);
  const int64_t following = group.n + group.rows < plan.N ? group.n + group.rows : group.n;
  for (group.begin = 0; group.begin < plan.D; group.begin += width) {
    group.end = group.begin + width < plan.D ? group.begin + width : plan.D;
    for (int r = 0; r < group.rows && !from_x; ++r) {
      const X* x = reinterpret_cast<const X*>(plan.x.at(group.b, group.n + r));
      widen_row(x + group.begin, group.sums + r * group.pitch + group.begin, group.end - group.begin);
    }
    for (int64_t j = 0; j < count; ++j) {
      const bool last = j + 1 == count;
      const int stage = (j == 0 && from_x ? kFirst : 0) | (last && to_x ? kLast : 0);
      const AddTerm add = group.rows == kGroup ? add_term_of<kGroup>(plan, plan.terms[j], stage)
                                               : add_term_of<1>(plan, plan.terms[j], stage);
      const char* x = plan.x.at(group.b, following);
      add(plan, plan.terms[j], group,
          last ? ahead_of(plan, plan.terms[0], group.b, following, x)
               : ahead_of(plan, plan.terms[j + 1], group.b, group.n, x));
    }
    for (int r = 0; r < group.rows && !to_x; ++r) {
      X* row = reinterpret_cast<X*>(group.rounded[r]);
      group.total[r] +=
          round_row(group.sums + r * group.pitch + group.begin, row + group.begin, group.end - group.begin);
    }
  }
}

}  // namespace

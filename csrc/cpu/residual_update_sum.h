// x + sum of terms, for one block of rows, into fp32 sums.
//
// Reads every feature once; the sums stay in the first cache level. One term at a time over four
// rows, which share one gate vector, while the same rows of the next term are prefetched into the
// second level. Rows wider than kTile are cut into column tiles, each taken through all terms.
// Measured on a Zen 4 core, 56 bf16 terms of [2, 256, 1152], which reads at 26 GB/s in this order:
//   this design                                                26 to 29 GB/s
//   column tiles of 4 x 64 with the sums in registers          25 to 29, but slow without AVX-512
//   one row, four terms a pass, blocks of 16 rows              24
//   four rows, two terms a pass, blocks of 4 to 16 rows        17 to 20
//   four rows, one term, blocks of 8 rows (sums leave L1)      13
//   any of them without prefetch, or prefetching into L1       10 to 17
#pragma once

namespace {

using fastcache::Plan;
using fastcache::Term;
using fastcache::Type;

constexpr int64_t kTile = 1280;  // columns: 4 rows of sums take 20 KB
constexpr int kGroup = 4;        // rows that share a gate vector load

inline float row_scale(const Term& term, int64_t b, int64_t n) {
  return term.row_scale ? *reinterpret_cast<const float*>(term.row_scale.at(b, n)) : 1.0f;
}

// What is read next, line by line: the same rows of the next term, or the next rows.
struct Ahead {
  const char* feature = nullptr;
  int64_t row = 0;
  const char* gate = nullptr;
};

// Where a group of rows is: sample, first token, columns [begin, end), and its sums.
struct Group {
  int64_t b, n, begin, end, pitch;
  float* sums;  // of column 0
};

// sums[r] (or x[r], if this is the first term) += weight * gate * row_scale[r] * feature[r]
template <class F, class G, int R, bool scaled, bool first>
void add_term(const Plan& plan, const Term& term, const Group& group, const Ahead& ahead) {
  const F* feature[R];
  const F* start[R];
  float* sums[R];
  Vec scale[R];
  for (int r = 0; r < R; ++r) {
    feature[r] = reinterpret_cast<const F*>(term.feature.at(group.b, group.n + r));
    start[r] = first ? reinterpret_cast<const F*>(plan.x.at(group.b, group.n + r)) : nullptr;
    sums[r] = group.sums + r * group.pitch;
    scale[r] = broadcast(scaled ? row_scale(term, group.b, group.n + r) : 1.0f);
  }
  // Without a gate G is NoGate, which is never read.
  const G* gate = reinterpret_cast<const G*>(term.gate ? term.gate + (plan.gates.at(group.b, group.n) - plan.gates.data) : nullptr);
  const Vec weight = broadcast(term.weight);
  constexpr int kLine = 64 / int(sizeof(F)) / kLanes;  // vectors in a cache line of F
  int64_t c = group.begin;
  while (c + kLine * kLanes <= group.end) {
    const int64_t bytes = c * int64_t(sizeof(F));
    for (int r = 0; r < R; ++r) __builtin_prefetch(ahead.feature + r * ahead.row + bytes, 0, 2);
    __builtin_prefetch(ahead.gate + c * int64_t(sizeof(G)), 0, 2);
    for (int line = 0; line < kLine; ++line, c += kLanes) {
      const Vec coefficient = mul(weight, load(gate + c));
      for (int r = 0; r < R; ++r) {
        Vec value = load(feature[r] + c);
        if (scaled) value = mul(value, scale[r]);
        store(sums[r] + c, fma(coefficient, value, first ? load(start[r] + c) : load(sums[r] + c)));
      }
    }
  }
  for (; c < group.end; c += kLanes) {
    const int rest = group.end - c < kLanes ? int(group.end - c) : kLanes;
    const Vec coefficient = mul(weight, load_part(gate + c, rest));
    for (int r = 0; r < R; ++r) {
      Vec value = load_part(feature[r] + c, rest);
      if (scaled) value = mul(value, scale[r]);
      store(sums[r] + c, fma(coefficient, value, first ? load_part(start[r] + c, rest) : load(sums[r] + c)));
    }
  }
}

using AddTerm = void (*)(const Plan&, const Term&, const Group&, const Ahead&);

template <class F, class G, int R>
AddTerm add_term_of(bool scaled, bool first) {
  if (scaled) return first ? add_term<F, G, R, true, true> : add_term<F, G, R, true, false>;
  return first ? add_term<F, G, R, false, true> : add_term<F, G, R, false, false>;
}

template <class F, int R>
AddTerm add_term_of(const Plan& plan, const Term& term, bool first) {
  const bool scaled = static_cast<bool>(term.row_scale);
  if (!term.gate) return add_term_of<F, NoGate, R>(scaled, first);
  switch (plan.gates.type) {
    case Type::kFloat32: return add_term_of<F, float, R>(scaled, first);
    case Type::kFloat16: return add_term_of<F, Float16, R>(scaled, first);
    default: return add_term_of<F, BFloat16, R>(scaled, first);
  }
}

template <int R>
AddTerm add_term_of(const Plan& plan, const Term& term, bool first) {
  switch (term.feature.type) {
    case Type::kFloat32: return add_term_of<float, R>(plan, term, first);
    case Type::kFloat16: return add_term_of<Float16, R>(plan, term, first);
    case Type::kBFloat16: return add_term_of<BFloat16, R>(plan, term, first);
    default: return add_term_of<Float8, R>(plan, term, first);
  }
}

inline Ahead ahead_of(const Plan& plan, const Term& term, int64_t b, int64_t n) {
  const char* gate = term.gate ? term.gate + (plan.gates.at(b, n) - plan.gates.data) : nullptr;
  return {term.feature.at(b, n), term.feature.row, gate};
}

// All terms for columns [begin, end) of rows [first, last) of sample b.
template <class X>
void sum_tile(const Plan& plan, int64_t b, int64_t first, int64_t last, int64_t begin, int64_t end, float* sums, int64_t pitch) {
  const bool start = plan.term_count > 0 && plan.terms[0].feature.type == plan.x.type;
  for (int64_t n = first; n < last && !start; ++n) {
    widen_row(reinterpret_cast<const X*>(plan.x.at(b, n)) + begin, sums + (n - first) * pitch + begin, end - begin);
  }
  for (int64_t j = 0; j < plan.term_count; ++j) {
    const Term& term = plan.terms[j];
    const bool from_x = start && j == 0;
    const bool done = j + 1 == plan.term_count;
    const AddTerm four = add_term_of<kGroup>(plan, term, from_x);
    const AddTerm one = add_term_of<1>(plan, term, from_x);
    for (int64_t n = first; n < last;) {
      const int64_t shared = plan.gates.row ? plan.gates.span - n % plan.gates.span : last - n;
      const int rows = shared >= kGroup && last - n >= kGroup ? kGroup : 1;
      const int64_t following = n + kGroup < plan.N ? n + kGroup : n;
      const Ahead ahead = done ? ahead_of(plan, plan.terms[0], b, following) : ahead_of(plan, plan.terms[j + 1], b, n);
      (rows == kGroup ? four : one)(plan, term, {b, n, begin, end, pitch, sums + (n - first) * pitch}, ahead);
      n += rows;
    }
  }
}

template <class X>
void sum_terms(const Plan& plan, int64_t b, int64_t first, int64_t last, float* sums, int64_t pitch) {
  const int64_t tiles = (plan.D + kTile - 1) / kTile;
  const int64_t width = ((plan.D + tiles - 1) / tiles + 63) / 64 * 64;
  for (int64_t begin = 0; begin < plan.D; begin += width) {
    sum_tile<X>(plan, b, first, last, begin, begin + width < plan.D ? begin + width : plan.D, sums, pitch);
  }
}

}  // namespace

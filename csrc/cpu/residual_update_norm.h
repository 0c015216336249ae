// What happens to finished rows: normalise the rounded x', modulate. Two passes over rows that stay
// in the first cache level (the row sum came with the rounding); the variance is two-pass. Rows are
// read back in the type of x, and four rows share each load of factor and offset.
// Lost: an fp32 copy of the row, one row at a time (1.2 times the time with a term, 1.6 times for a
// norm alone, bf16). Not used: vcvtneps2bf16, which would save instructions but flushes subnormals;
// non-temporal stores, because the next operator reads x' and h at once.
#pragma once

namespace {

template <class T>
inline void widen_row(const T* from, float* to, int64_t D) {
  int64_t c = 0;
  for (; c + kLanes <= D; c += kLanes) store(to + c, load(from + c));
  if (c < D) store(to + c, load_part(from + c, int(D - c)));  // the rest of the vector: zeros
}

inline void widen_vector(const Vector& vector, int64_t b, int64_t n, float* to, int64_t D) {
  const char* from = vector.at(b, n);
  switch (vector.type) {
    case Type::kFloat32:
      widen_row(reinterpret_cast<const float*>(from), to, D);
      break;
    case Type::kFloat16:
      widen_row(reinterpret_cast<const Float16*>(from), to, D);
      break;
    default:
      widen_row(reinterpret_cast<const BFloat16*>(from), to, D);
      break;
  }
}

template <class A, class B>
constexpr bool kSame = false;
template <class A>
constexpr bool kSame<A, A> = true;

// A conversion makes signalling NaNs quiet, as rounding expects; a copy is exact.
template <class F, class T>
inline Vec converted(Vec value, const T* to) {
  if constexpr (kSame<F, T>) return value;
  return rounded(quiet(value), to);
}

template <class F, class T>
inline void copy_row(const F* from, T* to, int64_t D) {
  int64_t c = 0;
  for (; c + kLanes <= D; c += kLanes) store(to + c, converted<F>(load(from + c), to));
  if (c < D) store_part(to + c, converted<F>(load_part(from + c, int(D - c)), to), int(D - c));
}

// Returns the row scale: largest magnitude / 448, or 1 for a row of zeros (or with a NaN).
template <class F>
inline float compress_row(const F* from, Float8* to, int64_t D) {
  Vec top = broadcast(0.0f);
  int64_t c = 0;
  for (; c + kLanes <= D; c += kLanes) top = max_magnitude(top, magnitude(load(from + c)));
  if (c < D) top = max_magnitude(top, magnitude(load_part(from + c, int(D - c))));
  const float largest = largest_magnitude(top);
  const float scale = largest > 0.0f ? largest / 448.0f : 1.0f;
  for (c = 0; c < D; c += kLanes) {
    const int count = D - c < kLanes ? int(D - c) : kLanes;
    float values[kLanes];
    store(values, div(count == kLanes ? load(from + c) : load_part(from + c, count), broadcast(scale)));
    uint8_t bytes[kLanes];
    for (int i = 0; i < kLanes; ++i) bytes[i] = to_float8(values[i]);
    for (int i = 0; i < count; ++i) to[c + i].bits = bytes[i];
  }
  return scale;
}

// h = norm * factor + offset, in fp32; kept from row to row while the rows share their vectors.
struct Modulation {
  float* factor;
  float* offset;
  const char* shift = nullptr;
  const char* scale = nullptr;
  bool ready = false;

  void prepare(const Plan& plan, int64_t b, int64_t n) {
    const char* new_shift = plan.shift ? plan.shift.at(b, n) : nullptr;
    const char* new_scale = plan.scale ? plan.scale.at(b, n) : nullptr;
    if (ready && new_shift == shift && new_scale == scale) return;
    ready = true;
    shift = new_shift;
    scale = new_scale;
    fill(plan, b, n);
  }

 private:
  // norm_weight * (1 + scale) and norm_bias * (1 + scale) + shift
  void fill(const Plan& plan, int64_t b, int64_t n) {
    const int64_t D = plan.D;
    if (plan.scale) widen_vector(plan.scale, b, n, factor, D);
    if (plan.shift) widen_vector(plan.shift, b, n, offset, D);
    alignas(64) float weights[kLanes], biases[kLanes];
    for (int64_t c = 0; c < D; c += kLanes) {
      const int count = D - c < kLanes ? int(D - c) : kLanes;
      Vec f = plan.scale ? add(load(factor + c), broadcast(1.0f)) : broadcast(1.0f);
      Vec o = plan.shift ? load(offset + c) : broadcast(-0.0f);
      if (plan.norm_bias) {
        widen_part(plan.norm_bias, c, biases, count);
        o = fma(load(biases), f, o);
      }
      if (plan.norm_weight) {
        widen_part(plan.norm_weight, c, weights, count);
        f = mul(load(weights), f);
      }
      store(factor + c, f);
      store(offset + c, o);
    }
  }

  static void widen_part(const Vector& vector, int64_t c, float* to, int count) {
    switch (vector.type) {
      case Type::kFloat32:
        widen_row(reinterpret_cast<const float*>(vector.data) + c, to, count);
        break;
      case Type::kFloat16:
        widen_row(reinterpret_cast<const Float16*>(vector.data) + c, to, count);
        break;
      default:
        widen_row(reinterpret_cast<const BFloat16*>(vector.data) + c, to, count);
        break;
    }
  }
};

// Rounds sums to X; returns the sum of the rounded values.
template <class X>
inline float round_row(const float* sums, X* row, int64_t D) {
  Vec total = broadcast(0.0f);
  int64_t c = 0;
  for (; c + 2 * kLanes <= D; c += 2 * kLanes) {
    Vec a = load(sums + c), b = load(sums + c + kLanes);
    store_pair(row + c, a, b);
    total = add(total, add(a, b));
  }
  for (; c < D; c += kLanes) {
    const int rest = D - c < kLanes ? int(D - c) : kLanes;
    const Vec a = keep_first(rounded(load(sums + c), row), rest);
    store_part(row + c, a, rest);
    total = add(total, a);
  }
  return sum(total);
}

// `ahead` is the row that is read next but three, for the second cache level.
template <class X>
inline float row_total(const X* row, const char* ahead, int64_t D) {
  Vec total = broadcast(0.0f);
  int64_t c = 0;
  for (; c + 2 * kLanes <= D; c += 2 * kLanes) {
    for (int byte = 0; byte < 2 * kLanes * int(sizeof(X)); byte += 64)
      __builtin_prefetch(ahead + c * int64_t(sizeof(X)) + byte, 0, 2);
    Vec a, b;
    load_pair(row + c, a, b);
    total = add(total, add(a, b));
  }
  for (; c < D; c += kLanes) total = add(total, load_part(row + c, D - c < kLanes ? int(D - c) : kLanes));
  return sum(total);
}

template <class X>
inline float sum_of_squares(const X* row, float mean, int64_t D) {
  const Vec centre = broadcast(mean);
  Vec even = broadcast(0.0f), odd = broadcast(0.0f);
  int64_t c = 0;
  for (; c + 2 * kLanes <= D; c += 2 * kLanes) {
    Vec a, b;
    load_pair(row + c, a, b);
    a = sub(a, centre);
    b = sub(b, centre);
    even = fma(a, a, even);
    odd = fma(b, b, odd);
  }
  for (; c < D; c += kLanes) {
    const int rest = D - c < kLanes ? int(D - c) : kLanes;
    const Vec a = keep_first(sub(load_part(row + c, rest), centre), rest);
    even = fma(a, a, even);
  }
  return sum(add(even, odd));
}

// h = (row - mean) * inverse * factor + offset, for R rows that share factor and offset.
template <class X, int R>
inline void modulate_rows(const X* const* rows, const float* means, const float* inverses,
                          const Modulation& modulation, X* const* h, int64_t D) {
  Vec mean[R], inverse[R];
  for (int r = 0; r < R; ++r) mean[r] = broadcast(means[r]), inverse[r] = broadcast(inverses[r]);
  int64_t c = 0;
  for (; c + 2 * kLanes <= D; c += 2 * kLanes) {
    const Vec factor_a = load(modulation.factor + c), factor_b = load(modulation.factor + c + kLanes);
    const Vec offset_a = load(modulation.offset + c), offset_b = load(modulation.offset + c + kLanes);
    for (int r = 0; r < R; ++r) {
      Vec a, b;
      load_pair(rows[r] + c, a, b);
      a = fma(mul(sub(a, mean[r]), inverse[r]), factor_a, offset_a);
      b = fma(mul(sub(b, mean[r]), inverse[r]), factor_b, offset_b);
      store_pair(h[r] + c, a, b);
    }
  }
  for (; c < D; c += kLanes) {
    const int rest = D - c < kLanes ? int(D - c) : kLanes;
    for (int r = 0; r < R; ++r) {
      const Vec value = mul(sub(load_part(rows[r] + c, rest), mean[r]), inverse[r]);
      store_part(h[r] + c,
                 rounded(fma(value, load(modulation.factor + c), load(modulation.offset + c)), h[r]), rest);
    }
  }
}

// Normalises and modulates finished rows [n, n + count) of x' (type X); totals are their sums.
template <class X>
void norm_rows(const Plan& plan, int64_t b, int64_t n, int count, char* const* finished, const float* totals,
               Modulation& modulation) {
  const X* rows[kGroup];
  X* h[kGroup];
  float mean[kGroup], inverse[kGroup];
  int wanted = 0;
  bool shared = true;  // do all wanted rows share their modulation?
  for (int r = 0; r < count; ++r) {
    const int64_t target = plan.target ? plan.target[b * plan.N + n + r] : n + r;
    if (target < 0) continue;
    const X* row = reinterpret_cast<const X*>(finished[r]);
    const int w = wanted++;
    rows[w] = row;
    h[w] = reinterpret_cast<X*>(plan.modulated.at(b, target));
    mean[w] = plan.norm == Norm::kLayer ? totals[r] / float(plan.D) : 0.0f;
    inverse[w] =
        plan.norm == Norm::kIdentity
            ? 1.0f
            : 1.0f / __builtin_sqrtf(sum_of_squares(row, mean[w], plan.D) / float(plan.D) + plan.eps);
    shared = shared && plan.shift.at(b, n + r) == plan.shift.at(b, n) &&
             plan.scale.at(b, n + r) == plan.scale.at(b, n);
    if (!shared || count < kGroup) {
      modulation.prepare(plan, b, n + r);
      modulate_rows<X, 1>(&rows[w], &mean[w], &inverse[w], modulation, &h[w], plan.D);
      --wanted;
    }
  }
  if (wanted == 0) return;
  modulation.prepare(plan, b, n);
  if (wanted == kGroup) {
    modulate_rows<X, kGroup>(rows, mean, inverse, modulation, h, plan.D);
    return;
  }
  for (int w = 0; w < wanted; ++w)
    modulate_rows<X, 1>(rows + w, mean + w, inverse + w, modulation, h + w, plan.D);
}

}  // namespace

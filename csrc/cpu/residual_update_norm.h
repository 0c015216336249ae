// What happens to one finished row of sums: round it to x', normalise the rounded row, modulate.
// Three passes over a row that stays in the first cache level; two-pass variance.
#pragma once

namespace {

using fastcache::Norm;
using fastcache::Plan;
using fastcache::Type;
using fastcache::Vector;

template <class T>
inline void widen_row(const T* from, float* to, int64_t D) {
  int64_t c = 0;
  for (; c + kLanes <= D; c += kLanes) store(to + c, load(from + c));
  if (c < D) store(to + c, load_part(from + c, int(D - c)));  // the rest of the vector: zeros
}

inline void widen_vector(const Vector& vector, int64_t b, int64_t n, float* to, int64_t D) {
  const char* from = vector.at(b, n);
  switch (vector.type) {
    case Type::kFloat32: widen_row(reinterpret_cast<const float*>(from), to, D); break;
    case Type::kFloat16: widen_row(reinterpret_cast<const Float16*>(from), to, D); break;
    default: widen_row(reinterpret_cast<const BFloat16*>(from), to, D); break;
  }
}

template <class F, class T>
inline void copy_row(const F* from, T* to, int64_t D) {
  int64_t c = 0;
  for (; c + kLanes <= D; c += kLanes) store(to + c, rounded(load(from + c), to));
  if (c < D) store_part(to + c, rounded(load_part(from + c, int(D - c)), to), int(D - c));
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
      case Type::kFloat32: widen_row(reinterpret_cast<const float*>(vector.data) + c, to, count); break;
      case Type::kFloat16: widen_row(reinterpret_cast<const Float16*>(vector.data) + c, to, count); break;
      default: widen_row(reinterpret_cast<const BFloat16*>(vector.data) + c, to, count); break;
    }
  }
};

// Rounds the sums to X and writes x'.
template <class X>
inline void write_row(const float* sums, X* updated, int64_t D) {
  int64_t c = 0;
  for (; c + kLanes <= D; c += kLanes) store(updated + c, rounded(load(sums + c), updated));
  if (c < D) store_part(updated + c, rounded(load(sums + c), updated), int(D - c));
}

// The same for a row that is normalised: x' is written if it is wanted, the rounded values are left
// in `sums`, and their sum is returned.
template <class X>
inline float round_row(float* sums, X* updated, int64_t D) {
  const X* type = nullptr;
  Vec even = broadcast(0.0f), odd = broadcast(0.0f);
  int64_t c = 0;
  for (; c + 2 * kLanes <= D; c += 2 * kLanes) {
    const Vec a = rounded(load(sums + c), type);
    const Vec b = rounded(load(sums + c + kLanes), type);
    store(sums + c, a);
    store(sums + c + kLanes, b);
    if (updated) {
      store(updated + c, a);
      store(updated + c + kLanes, b);
    }
    even = add(even, a);
    odd = add(odd, b);
  }
  for (; c < D; c += kLanes) {
    const int count = D - c < kLanes ? int(D - c) : kLanes;
    const Vec a = keep_first(rounded(load(sums + c), type), count);
    store(sums + c, a);
    if (updated) store_part(updated + c, a, count);
    even = add(even, a);
  }
  return sum(add(even, odd));
}

inline float sum_of_squares(const float* row, float mean, int64_t D) {
  const Vec centre = broadcast(mean);
  Vec even = broadcast(0.0f), odd = broadcast(0.0f);
  int64_t c = 0;
  for (; c + 2 * kLanes <= D; c += 2 * kLanes) {
    const Vec a = sub(load(row + c), centre);
    const Vec b = sub(load(row + c + kLanes), centre);
    even = fma(a, a, even);
    odd = fma(b, b, odd);
  }
  for (; c < D; c += kLanes) {
    const Vec a = keep_first(sub(load(row + c), centre), D - c < kLanes ? int(D - c) : kLanes);
    even = fma(a, a, even);
  }
  return sum(add(even, odd));
}

template <class X>
inline void modulate_row(const float* row, float mean, float factor, const Modulation& m, X* h, int64_t D) {
  const Vec centre = broadcast(mean), inverse = broadcast(factor);
  int64_t c = 0;
  for (; c + kLanes <= D; c += kLanes) {
    const Vec value = mul(sub(load(row + c), centre), inverse);
    store(h + c, rounded(fma(value, load(m.factor + c), load(m.offset + c)), h));
  }
  if (c < D) {
    const Vec value = mul(sub(load(row + c), centre), inverse);
    store_part(h + c, rounded(fma(value, load(m.factor + c), load(m.offset + c)), h), int(D - c));
  }
}

template <class X>
void finish_row(const Plan& plan, int64_t b, int64_t n, int64_t target, float* sums, Modulation& modulation) {
  X* updated = plan.updated ? reinterpret_cast<X*>(plan.updated.at(b, n)) : nullptr;
  if (plan.norm == Norm::kNone || target < 0) {
    if (updated) write_row(sums, updated, plan.D);
    return;
  }
  const float total = round_row(sums, updated, plan.D);
  modulation.prepare(plan, b, n);
  float mean = 0.0f, factor = 1.0f;
  if (plan.norm == Norm::kLayer) mean = total / float(plan.D);
  if (plan.norm != Norm::kIdentity) {
    factor = 1.0f / __builtin_sqrtf(sum_of_squares(sums, mean, plan.D) / float(plan.D) + plan.eps);
  }
  modulate_row(sums, mean, factor, modulation, reinterpret_cast<X*>(plan.modulated.at(b, target)), plan.D);
}

}  // namespace

// Any processor: 4 lanes of the compiler's vector type (SSE2, NEON, ...), conversions per lane.
#pragma once

namespace {

constexpr int kLanes = 4;
typedef float Vec __attribute__((vector_size(16)));
typedef uint32_t Bits __attribute__((vector_size(16)));
typedef int32_t Mask __attribute__((vector_size(16)));

inline Vec broadcast(float value) { return Vec{value, value, value, value}; }
inline Vec add(Vec a, Vec b) { return a + b; }
inline Vec sub(Vec a, Vec b) { return a - b; }
inline Vec mul(Vec a, Vec b) { return a * b; }
inline Vec div(Vec a, Vec b) { return a / b; }
inline Vec fma(Vec a, Vec b, Vec c) { return a * b + c; }
inline Vec magnitude(Vec a) { return Vec(Bits(a) & 0x7fffffffu); }
// Maximum of non-negative values in which a NaN wins.
inline Vec max_magnitude(Vec a, Vec b) {
  const Mask greater = Mask(a) > Mask(b);
  return Vec((Mask(a) & greater) | (Mask(b) & ~greater));
}
inline Vec keep_first(Vec a, int count) { return Vec(Mask(a) & (Mask{0, 1, 2, 3} < count)); }
inline float sum(Vec a) { return (a[0] + a[2]) + (a[1] + a[3]); }
inline float largest_magnitude(Vec a) {
  const Vec half = max_magnitude(a, Vec{a[2], a[3], a[2], a[3]});
  return max_magnitude(half, Vec{half[1], half[1], half[1], half[1]})[0];
}

inline float widen(BFloat16 value) { return bits_to_float(uint32_t(value.bits) << 16); }

// Exponent and fraction moved to their float32 places, then scaled; integer arithmetic for
// subnormals, so that a flush-denormals mode of the processor cannot change the value.
inline float widen_small(uint32_t magnitude, int fraction_bits, int bias) {
  const uint32_t exponent = magnitude >> fraction_bits;
  if (exponent != 0) return bits_to_float((magnitude << (23 - fraction_bits)) + (uint32_t(127 - bias) << 23));
  return float(int32_t(magnitude)) * bits_to_float(uint32_t(127 + 1 - bias - fraction_bits) << 23);
}

inline float widen(Float16 value) {
  const uint32_t magnitude = value.bits & 0x7fffu;
  const uint32_t sign = uint32_t(value.bits & 0x8000u) << 16;
  const uint32_t special = 0x7f800000u | ((magnitude & 0x3ffu) << 13) | ((magnitude & 0x3ffu) ? 0x400000u : 0u);
  return bits_to_float((magnitude >= 0x7c00u ? special : float_to_bits(widen_small(magnitude, 10, 15))) | sign);
}

inline float widen(Float8 value) {
  const uint32_t magnitude = value.bits & 0x7fu;
  const uint32_t sign = uint32_t(value.bits & 0x80u) << 24;
  return bits_to_float((magnitude == 0x7fu ? 0x7fc00000u : float_to_bits(widen_small(magnitude, 3, 7))) | sign);
}

inline uint16_t to_float16(float value) {
  const uint32_t bits = float_to_bits(value);
  const uint32_t magnitude = bits & 0x7fffffffu;
  const uint32_t sign = (bits >> 16) & 0x8000u;
  if (magnitude > 0x7f800000u) return uint16_t(sign | 0x7e00u | ((magnitude >> 13) & 0x3ffu));
  if (magnitude >= 0x47800000u) return uint16_t(sign | 0x7c00u);
  if (magnitude < 0x38800000u) {  // subnormal: the addition rounds to nearest even
    return uint16_t(sign | (float_to_bits(bits_to_float(magnitude) + 0.5f) - float_to_bits(0.5f)));
  }
  return uint16_t(sign | ((magnitude + 0xc8000fffu + ((magnitude >> 13) & 1u)) >> 13));
}

inline Vec load(const float* p) {
  Vec a;
  __builtin_memcpy(&a, p, sizeof(a));
  return a;
}

template <class T>
inline Vec load(const T* p) { return Vec{widen(p[0]), widen(p[1]), widen(p[2]), widen(p[3])}; }

template <class T>
inline Vec load_part(const T* p, int count) {
  T buffer[kLanes] = {};
  for (int i = 0; i < count; ++i) buffer[i] = p[i];
  return load(buffer);
}

inline Vec rounded(Vec a, const float*) { return a; }
inline Vec rounded(Vec a, const Float16*) {
  Vec out;
  for (int i = 0; i < kLanes; ++i) out[i] = widen(Float16{to_float16(a[i])});
  return out;
}
inline Vec rounded(Vec a, const BFloat16*) {
  const Bits bits = Bits(a);
  const Bits cut = (bits + ((bits >> 16) & 1u) + 0x7fffu) & 0xffff0000u;
  const Bits number = Bits(a == a);
  return Vec((cut & number) | (~number & 0x7fc00000u));
}

// The value must already be rounded to the type that is stored.
inline void store(float* p, Vec a) { __builtin_memcpy(p, &a, sizeof(a)); }
inline void store(Float16* p, Vec a) {
  for (int i = 0; i < kLanes; ++i) p[i].bits = to_float16(a[i]);
}
inline void store(BFloat16* p, Vec a) {
  const Bits bits = Bits(a) >> 16;
  for (int i = 0; i < kLanes; ++i) p[i].bits = uint16_t(bits[i]);
}

template <class T>
inline void store_part(T* p, Vec a, int count) {
  T buffer[kLanes];
  store(buffer, a);
  for (int i = 0; i < count; ++i) p[i] = buffer[i];
}

// A sum in float64, for the error sums.
struct WideSum {
  double lanes[kLanes] = {};

  void add(Vec a) {
    for (int i = 0; i < kLanes; ++i) lanes[i] += double(a[i]);
  }
  double total() const { return (lanes[0] + lanes[1]) + (lanes[2] + lanes[3]); }
};

}  // namespace

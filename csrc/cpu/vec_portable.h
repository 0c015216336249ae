// Any processor: 4 lanes of the compiler's vector type (SSE2, NEON, ...), conversions by integer arithmetic.
// Written for little-endian processors.
#pragma once

#if defined(__clang__)
#define FASTCACHE_SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define FASTCACHE_SHUFFLE(a, b, ...) __builtin_shuffle(a, b, Words{__VA_ARGS__})
#endif

#if defined(__SSE2__)
#include <emmintrin.h>  // for the one step that compilers do badly: 32-bit lanes to 16-bit words
#endif

namespace {

constexpr int kLanes = 4;
typedef float Vec __attribute__((vector_size(16)));
typedef uint32_t Bits __attribute__((vector_size(16)));
typedef int32_t Mask __attribute__((vector_size(16)));
typedef uint16_t Words __attribute__((vector_size(16)));
typedef uint64_t Pair __attribute__((vector_size(16)));
typedef int16_t HalfWords __attribute__((vector_size(8)));

inline Vec broadcast(float value) { return Vec{value, value, value, value}; }
inline Vec from_integers(const int32_t* p) {
  Mask whole;
  __builtin_memcpy(&whole, p, sizeof(whole));
  return __builtin_convertvector(whole, Vec);
}
inline Vec add(Vec a, Vec b) { return a + b; }
inline Vec sub(Vec a, Vec b) { return a - b; }
inline Vec mul(Vec a, Vec b) { return a * b; }
inline Vec div(Vec a, Vec b) { return a / b; }
inline Vec fma(Vec a, Vec b, Vec c) { return a * b + c; }
inline Vec quiet(Vec a) { return a; }
inline Vec magnitude(Vec a) { return Vec(Bits(a) & 0x7fffffffu); }
// Maximum of non-negative values in which a NaN wins.
inline Vec max_magnitude(Vec a, Vec b) {
  const Mask greater = Mask(a) > Mask(b);
  return Vec((Mask(a) & greater) | (Mask(b) & ~greater));
}
inline Vec larger_or_nan(Vec a, Vec b) {  // b if one is NaN
  const Mask larger = a > b;
  return Vec((Mask(a) & larger) | (Mask(b) & ~larger));
}
inline Vec nearest(Vec a) {  // of magnitudes below 2^22
  const Vec shift = broadcast(12582912.0f);
  return (a + shift) - shift;
}
// whole in -126 .. 127
inline Vec times_power_of_two(Vec a, Vec whole) {
  return a * Vec((__builtin_convertvector(whole, Mask) + 127) << 23);
}
inline Vec keep_first(Vec a, int count) { return Vec(Mask(a) & (Mask{0, 1, 2, 3} < count)); }
inline float sum(Vec a) { return (a[0] + a[2]) + (a[1] + a[3]); }
inline float largest_magnitude(Vec a) {
  const Vec half = max_magnitude(a, Vec{a[2], a[3], a[2], a[3]});
  return max_magnitude(half, Vec{half[1], half[1], half[1], half[1]})[0];
}

inline Bits pick(Bits mask, Bits yes, Bits no) { return (yes & mask) | (no & ~mask); }

inline Words words(const void* p) {  // four of them, then zeros
  uint64_t raw;
  __builtin_memcpy(&raw, p, sizeof(raw));
  return Words(Pair{raw, 0});
}

// A small float with its magnitude in the low bits: exponent and fraction move to their places in a
// float32. Subnormals by integer conversion, so that flushing denormals cannot change the value.
inline Bits widen_small(Bits magnitude, int fraction_bits, int bias) {
  const Bits normal = (magnitude << (23 - fraction_bits)) + (uint32_t(127 - bias) << 23);
  const Vec unit = broadcast(bits_to_float(uint32_t(128 - bias - fraction_bits) << 23));
  const Bits subnormal = Bits(__builtin_convertvector(Mask(magnitude), Vec) * unit);
  return pick(Bits(magnitude < (1u << fraction_bits)), subnormal, normal);
}

inline Vec load(const float* p) {
  Vec a;
  __builtin_memcpy(&a, p, sizeof(a));
  return a;
}

inline Vec load(const BFloat16* p) {
  return Vec(FASTCACHE_SHUFFLE(Words{}, words(p), 0, 8, 1, 9, 2, 10, 3, 11));
}

inline Vec load(const Float16* p) {
  const Bits raw = Bits(FASTCACHE_SHUFFLE(words(p), Words{}, 0, 8, 1, 9, 2, 10, 3, 11));
  const Bits magnitude = raw & 0x7fffu;
  const Bits fraction = (magnitude & 0x3ffu) << 13;
  const Bits special = fraction | 0x7f800000u | (Bits(fraction != 0) & 0x400000u);
  return Vec(pick(Bits(magnitude >= 0x7c00u), special, widen_small(magnitude, 10, 15)) | (raw & 0x8000u)
                                                                                             << 16);
}

inline Vec load(const Float8* p) {
  const Bits raw = {p[0].bits, p[1].bits, p[2].bits, p[3].bits};
  const Bits magnitude = raw & 0x7fu;
  return Vec(pick(Bits(magnitude == 0x7fu), Bits{} + 0x7fc00000u, widen_small(magnitude, 3, 7)) |
             (raw & 0x80u) << 24);
}

// float32 to float16 bits; in the subnormal range the addition rounds to nearest even.
inline Bits to_float16(Vec a) {
  const Bits magnitude = Bits(a) & 0x7fffffffu;
  const Vec half = broadcast(0.5f);
  const Bits normal = (magnitude + 0xc8000fffu + ((magnitude >> 13) & 1u)) >> 13;
  const Bits subnormal = Bits(Vec(magnitude) + half) - Bits(half);
  Bits out = pick(Bits(magnitude < 0x38800000u), subnormal, normal);
  out = pick(Bits(magnitude >= 0x47800000u), Bits{} + 0x7c00u, out);
  out = pick(Bits(magnitude > 0x7f800000u), 0x7e00u | ((magnitude >> 13) & 0x3ffu), out);
  return out | ((Bits(a) >> 16) & 0x8000u);
}

template <class T>
inline Vec load_part(const T* p, int count) {
  T buffer[kLanes] = {};
  for (int i = 0; i < count; ++i) buffer[i] = p[i];
  return load(buffer);
}

inline Vec rounded(Vec a, const float*) { return a; }
// Lanes that fit into 16 bits, with their sign.
inline void store_words(void* p, Mask lanes) {
#if defined(__SSE2__)
  const __m128i packed = _mm_packs_epi32(__m128i(lanes), __m128i(lanes));
  _mm_storel_epi64(static_cast<__m128i*>(p), packed);
#else
  const HalfWords raw = __builtin_convertvector(lanes, HalfWords);
  __builtin_memcpy(p, &raw, sizeof(raw));
#endif
}
inline void store(Float16* p, Vec a) { store_words(p, Mask(to_float16(a) << 16) >> 16); }
inline void store(BFloat16* p, Vec a) { store_words(p, Mask(a) >> 16); }
inline Vec rounded(Vec a, const Float16*) {
  Float16 half[kLanes];
  store(half, a);
  return load(half);
}
inline Vec rounded(Vec a, const BFloat16*) {
  const Bits bits = Bits(a);
  const Bits cut = (bits + ((bits >> 16) & 1u) + 0x7fffu) & 0xffff0000u;
  const Bits number = Bits(a == a);
  return Vec((cut & number) | (~number & 0x7fc00000u));
}

// The value must already be rounded to the type that is stored.
inline void store(float* p, Vec a) { __builtin_memcpy(p, &a, sizeof(a)); }
template <class T>
inline void store_part(T* p, Vec a, int count) {
  T buffer[kLanes];
  store(buffer, a);
  for (int i = 0; i < count; ++i) p[i] = buffer[i];
}

// A sum in float64: of errors, of a norm.
struct WideSum {
  double lanes[kLanes] = {};

  void add(Vec a) {
    for (int i = 0; i < kLanes; ++i) lanes[i] += double(a[i]);
  }
  void add_square(Vec a) {
    for (int i = 0; i < kLanes; ++i) lanes[i] += double(a[i]) * double(a[i]);
  }
  double total() const { return (lanes[0] + lanes[1]) + (lanes[2] + lanes[3]); }
};

}  // namespace

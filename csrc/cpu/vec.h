// One vector of floats for the instruction set this file is compiled for: load with widening,
// store with one rounding, and the few operations the kernels need. Included by each ISA's source
// inside its own anonymous namespace, and free of std templates: an inline function shared between
// sources built with different -march could be merged by the linker into one that crashes.
//
// Conversions: bfloat16 and float8_e4m3fn by integer arithmetic (round to nearest even, NaN stays
// NaN), float16 by F16C. AVX512_BF16 is not used: vcvtneps2bf16 flushes subnormals.
#pragma once

#include <cstdint>

#if defined(__AVX512F__) || defined(__AVX2__)
#include <immintrin.h>
#endif

namespace {

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};
struct Float8 {
  uint8_t bits;
};
struct NoGate {};  // a gate of one that takes no memory

inline float bits_to_float(uint32_t bits) {
  float value;
  __builtin_memcpy(&value, &bits, 4);
  return value;
}

inline uint32_t float_to_bits(float value) {
  uint32_t bits;
  __builtin_memcpy(&bits, &value, 4);
  return bits;
}

// The conversion of PyTorch, without branches: finite values of 464 and above become NaN.
inline uint8_t to_float8(float value) {
  const uint32_t bits = float_to_bits(value);
  const uint32_t magnitude = bits & 0x7fffffffu;
  const uint32_t subnormal =
      float_to_bits(bits_to_float(magnitude) + bits_to_float(141u << 23)) - (141u << 23);
  const uint32_t normal = (magnitude + (uint32_t(7 - 127) << 23) + 0x7ffffu + ((magnitude >> 20) & 1u)) >> 20;
  const uint32_t finite = magnitude < (121u << 23) ? subnormal : normal;
  return uint8_t((magnitude >= (1087u << 20) ? 0x7fu : finite) | ((bits >> 24) & 0x80u));
}

}  // namespace

#if defined(__AVX512F__)
#include "vec_avx512.h"
#elif defined(__AVX2__)
#include "vec_avx2.h"
#else
#include "vec_portable.h"
#endif

namespace {

template <class T>
inline void load_pair(const T* p, Vec& a, Vec& b) {
  a = load(p);
  b = load(p + kLanes);
}

// Rounds and stores two vectors; returns them rounded.
template <class T>
inline void store_pair(T* p, Vec& a, Vec& b) {
  a = rounded(a, p);
  b = rounded(b, p);
  store(p, a);
  store(p + kLanes, b);
}

// A row's end: as many values as are left, at most a vector.
template <class T>
inline Vec load_some(const T* p, int64_t left) {
  return left >= kLanes ? load(p) : load_part(p, int(left));
}
template <class T>
inline void store_some(T* p, Vec a, int64_t left) {
  if (left >= kLanes)
    store(p, a);
  else
    store_part(p, a, int(left));
}

inline Vec load(const NoGate*) { return broadcast(1.0f); }
inline Vec load_part(const NoGate*, int) { return broadcast(1.0f); }
inline void load_pair(const NoGate*, Vec& a, Vec& b) { a = b = broadcast(1.0f); }

}  // namespace

// AVX2 + FMA + F16C (x86-64-v3): 8 lanes, tails through a small buffer.
#pragma once

namespace {

constexpr int kLanes = 8;
using Vec = __m256;

inline Vec broadcast(float value) { return _mm256_set1_ps(value); }
inline Vec from_integers(const int32_t* p) {
  return _mm256_cvtepi32_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
inline Vec add(Vec a, Vec b) { return _mm256_add_ps(a, b); }
inline Vec sub(Vec a, Vec b) { return _mm256_sub_ps(a, b); }
inline Vec mul(Vec a, Vec b) { return _mm256_mul_ps(a, b); }
inline Vec div(Vec a, Vec b) { return _mm256_div_ps(a, b); }
inline Vec fma(Vec a, Vec b, Vec c) { return _mm256_fmadd_ps(a, b, c); }
inline Vec quiet(Vec a) { return a; }
inline Vec magnitude(Vec a) { return _mm256_and_ps(a, _mm256_castsi256_ps(_mm256_set1_epi32(0x7fffffff))); }
// Maximum of non-negative values in which a NaN wins.
inline Vec max_magnitude(Vec a, Vec b) {
  return _mm256_castsi256_ps(_mm256_max_epi32(_mm256_castps_si256(a), _mm256_castps_si256(b)));
}
inline Vec larger_or_nan(Vec a, Vec b) { return _mm256_max_ps(a, b); }  // b if one is NaN
inline Vec nearest(Vec a) { return _mm256_round_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
// whole in -126 .. 127
inline Vec times_power_of_two(Vec a, Vec whole) {
  return _mm256_mul_ps(a, _mm256_castsi256_ps(_mm256_slli_epi32(
                              _mm256_add_epi32(_mm256_cvtps_epi32(whole), _mm256_set1_epi32(127)), 23)));
}
inline Vec keep_first(Vec a, int count) {
  const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  return _mm256_and_ps(a, _mm256_castsi256_ps(_mm256_cmpgt_epi32(_mm256_set1_epi32(count), lane)));
}

inline float sum(Vec a) {
  __m128 half = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
  half = _mm_add_ps(half, _mm_movehl_ps(half, half));
  return _mm_cvtss_f32(_mm_add_ss(half, _mm_shuffle_ps(half, half, 1)));
}

inline float largest_magnitude(Vec a) {
  __m128i half = _mm_max_epi32(_mm_castps_si128(_mm256_castps256_ps128(a)),
                               _mm_castps_si128(_mm256_extractf128_ps(a, 1)));
  half = _mm_max_epi32(half, _mm_shuffle_epi32(half, 0x4e));
  half = _mm_max_epi32(half, _mm_shuffle_epi32(half, 0xb1));
  return bits_to_float(uint32_t(_mm_cvtsi128_si32(half)));
}

// e4m3 bits moved into a float16 have an exponent that is 8 too small; 0x7f is the only NaN.
inline Vec widen_float8(__m128i bits) {
  const __m128i wide = _mm_cvtepu8_epi16(bits);
  const __m128i value = _mm_and_si128(wide, _mm_set1_epi16(0x7f));
  const __m128i sign = _mm_slli_epi16(_mm_and_si128(wide, _mm_set1_epi16(0x80)), 8);
  const __m128i nan = _mm_cmpeq_epi16(value, _mm_set1_epi16(0x7f));
  const __m128i half =
      _mm_or_si128(_mm_blendv_epi8(_mm_slli_epi16(value, 7), _mm_set1_epi16(0x7e00), nan), sign);
  return _mm256_mul_ps(_mm256_cvtph_ps(half), _mm256_set1_ps(256.0f));
}

inline Vec load(const float* p) { return _mm256_loadu_ps(p); }
inline Vec load(const BFloat16* p) {
  const __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  return _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
}
inline Vec load(const Float16* p) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
inline Vec load(const Float8* p) {
  return widen_float8(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
}

template <class T>
inline Vec load_part(const T* p, int count) {
  T buffer[kLanes] = {};
  for (int i = 0; i < count; ++i) buffer[i] = p[i];
  return load(buffer);
}

inline Vec rounded(Vec a, const float*) { return a; }
inline Vec rounded(Vec a, const Float16*) {
  return _mm256_cvtph_ps(_mm256_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
inline Vec rounded(Vec a, const BFloat16*) {
  const __m256i bits = _mm256_castps_si256(a);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i up = _mm256_add_epi32(_mm256_add_epi32(bits, odd), _mm256_set1_epi32(0x7fff));
  const __m256i cut = _mm256_and_si256(up, _mm256_set1_epi32(int(0xffff0000u)));
  const Vec nan = _mm256_cmp_ps(a, a, _CMP_UNORD_Q);
  return _mm256_blendv_ps(_mm256_castsi256_ps(cut), _mm256_castsi256_ps(_mm256_set1_epi32(0x7fc00000)), nan);
}

// The value must already be rounded to the type that is stored.
inline void store(float* p, Vec a) { _mm256_storeu_ps(p, a); }
inline void store(BFloat16* p, Vec a) {
  const __m256i bits = _mm256_srli_epi32(_mm256_castps_si256(a), 16);
  const __m128i packed = _mm_packus_epi32(_mm256_castsi256_si128(bits), _mm256_extracti128_si256(bits, 1));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), packed);
}
inline void store(Float16* p, Vec a) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p),
                   _mm256_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}

template <class T>
inline void store_part(T* p, Vec a, int count) {
  T buffer[kLanes];
  store(buffer, a);
  for (int i = 0; i < count; ++i) p[i] = buffer[i];
}

// A sum in float64: of errors, of a norm.
struct WideSum {
  __m256d low = _mm256_setzero_pd(), high = _mm256_setzero_pd();

  void add(Vec a) {
    low = _mm256_add_pd(low, _mm256_cvtps_pd(_mm256_castps256_ps128(a)));
    high = _mm256_add_pd(high, _mm256_cvtps_pd(_mm256_extractf128_ps(a, 1)));
  }
  void add_square(Vec a) {
    const __m256d first = _mm256_cvtps_pd(_mm256_castps256_ps128(a)),
                  second = _mm256_cvtps_pd(_mm256_extractf128_ps(a, 1));
    low = _mm256_fmadd_pd(first, first, low);
    high = _mm256_fmadd_pd(second, second, high);
  }
  double total() const {
    double lanes[4];
    _mm256_storeu_pd(lanes, _mm256_add_pd(low, high));
    return (lanes[0] + lanes[1]) + (lanes[2] + lanes[3]);
  }
};

}  // namespace

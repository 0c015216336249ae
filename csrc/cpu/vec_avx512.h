// AVX-512 (x86-64-v4): 16 lanes, tails by mask.
#pragma once

namespace {

constexpr int kLanes = 16;
using Vec = __m512;

inline __mmask16 first(int count) { return __mmask16((1u << count) - 1u); }

inline Vec broadcast(float value) { return _mm512_set1_ps(value); }
inline Vec from_integers(const int32_t* p) { return _mm512_cvtepi32_ps(_mm512_loadu_si512(p)); }
inline Vec add(Vec a, Vec b) { return _mm512_add_ps(a, b); }
inline Vec sub(Vec a, Vec b) { return _mm512_sub_ps(a, b); }
inline Vec mul(Vec a, Vec b) { return _mm512_mul_ps(a, b); }
inline Vec div(Vec a, Vec b) { return _mm512_div_ps(a, b); }
inline Vec fma(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a, b, c); }
// A signalling NaN made quiet, for values that come to rounding without arithmetic.
inline Vec quiet(Vec a) {
  const __m512i bits = _mm512_castps_si512(a);
  return _mm512_castsi512_ps(
      _mm512_mask_or_epi32(bits, _mm512_cmp_ps_mask(a, a, _CMP_UNORD_Q), bits, _mm512_set1_epi32(0x400000)));
}
inline Vec magnitude(Vec a) {
  return _mm512_castsi512_ps(_mm512_and_si512(_mm512_castps_si512(a), _mm512_set1_epi32(0x7fffffff)));
}
// Maximum of non-negative values in which a NaN wins.
inline Vec max_magnitude(Vec a, Vec b) {
  return _mm512_castsi512_ps(_mm512_max_epi32(_mm512_castps_si512(a), _mm512_castps_si512(b)));
}
inline Vec larger_or_nan(Vec a, Vec b) { return _mm512_max_ps(a, b); }  // b if one is NaN
inline Vec nearest(Vec a) { return _mm512_roundscale_ps(a, 0); }
inline Vec times_power_of_two(Vec a, Vec whole) { return _mm512_scalef_ps(a, whole); }
inline Vec keep_first(Vec a, int count) { return _mm512_maskz_mov_ps(first(count), a); }
inline float sum(Vec a) { return _mm512_reduce_add_ps(a); }
inline float largest_magnitude(Vec a) {
  return bits_to_float(uint32_t(_mm512_reduce_max_epi32(_mm512_castps_si512(a))));
}

// Words to the upper halves of the lanes, zeros below: one shuffle, no shift.
inline Vec widen_bfloat16(__m512i words, __m512i from) {
  return _mm512_castsi512_ps(_mm512_maskz_permutexvar_epi16(0xaaaaaaaau, from, words));
}
inline __m512i lower_words() {
  return _mm512_set_epi32(15 << 16, 14 << 16, 13 << 16, 12 << 16, 11 << 16, 10 << 16, 9 << 16, 8 << 16,
                          7 << 16, 6 << 16, 5 << 16, 4 << 16, 3 << 16, 2 << 16, 1 << 16, 0);
}
inline __m512i upper_words() { return _mm512_add_epi32(lower_words(), _mm512_set1_epi32(16 << 16)); }
inline Vec widen_bfloat16(__m256i bits) {
  return widen_bfloat16(_mm512_castsi256_si512(bits), lower_words());
}

// e4m3 bits moved into a float16 have an exponent that is 8 too small; 0x7f is the only NaN.
inline Vec widen_float8(__m128i bits) {
  const __m256i wide = _mm256_cvtepu8_epi16(bits);
  const __m256i value = _mm256_and_si256(wide, _mm256_set1_epi16(0x7f));
  const __m256i sign = _mm256_slli_epi16(_mm256_and_si256(wide, _mm256_set1_epi16(0x80)), 8);
  const __mmask16 nan = _mm256_cmpeq_epi16_mask(value, _mm256_set1_epi16(0x7f));
  const __m256i half = _mm256_or_si256(
      _mm256_mask_mov_epi16(_mm256_slli_epi16(value, 7), nan, _mm256_set1_epi16(0x7e00)), sign);
  return _mm512_mul_ps(_mm512_cvtph_ps(half), _mm512_set1_ps(256.0f));
}

inline Vec load(const float* p) { return _mm512_loadu_ps(p); }
inline Vec load(const BFloat16* p) {
  return widen_bfloat16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
inline Vec load(const Float16* p) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
inline Vec load(const Float8* p) {
  return widen_float8(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}

inline void load_pair(const BFloat16* p, Vec& a, Vec& b) {
  const __m512i words = _mm512_loadu_si512(p);
  a = widen_bfloat16(words, lower_words());
  b = widen_bfloat16(words, upper_words());
}

inline Vec load_part(const float* p, int count) { return _mm512_maskz_loadu_ps(first(count), p); }
inline Vec load_part(const BFloat16* p, int count) {
  return widen_bfloat16(_mm256_maskz_loadu_epi16(first(count), p));
}
inline Vec load_part(const Float16* p, int count) {
  return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(first(count), p));
}
inline Vec load_part(const Float8* p, int count) {
  return widen_float8(_mm_maskz_loadu_epi8(first(count), p));
}

inline Vec rounded(Vec a, const float*) { return a; }
inline Vec rounded(Vec a, const Float16*) {
  return _mm512_cvtph_ps(_mm512_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
// The upper halves are the result; the lower halves keep what the rounding left. A quiet NaN stays
// as it is (arithmetic has made every NaN quiet before it comes here).
inline __m512i rounded_bits(Vec a) {
  const __m512i bits = _mm512_castps_si512(a);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __mmask16 number = _mm512_cmp_ps_mask(a, a, _CMP_ORD_Q);
  return _mm512_mask_add_epi32(bits, number, bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
}
inline Vec cut(__m512i bits) {
  return _mm512_castsi512_ps(_mm512_and_si512(bits, _mm512_set1_epi32(int(0xffff0000u))));
}
inline Vec rounded(Vec a, const BFloat16*) { return cut(rounded_bits(a)); }

// The value must already be rounded to the type that is stored.
inline __m256i narrow_bfloat16(Vec a) {
  return _mm512_cvtepi32_epi16(_mm512_srli_epi32(_mm512_castps_si512(a), 16));
}
inline __m256i narrow_float16(Vec a) {
  return _mm512_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}

inline void store(float* p, Vec a) { _mm512_storeu_ps(p, a); }
inline void store(BFloat16* p, Vec a) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), narrow_bfloat16(a));
}
inline void store(Float16* p, Vec a) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), narrow_float16(a));
}

inline void store_part(float* p, Vec a, int count) { _mm512_mask_storeu_ps(p, first(count), a); }
inline void store_part(BFloat16* p, Vec a, int count) {
  _mm256_mask_storeu_epi16(p, first(count), narrow_bfloat16(a));
}
inline void store_part(Float16* p, Vec a, int count) {
  _mm256_mask_storeu_epi16(p, first(count), narrow_float16(a));
}

// Rounds and stores two vectors; returns them rounded.
inline void store_pair(BFloat16* p, Vec& a, Vec& b) {
  const __m512i low = rounded_bits(a), high = rounded_bits(b);
  const __m512i odd_words = _mm512_set_epi16(63, 61, 59, 57, 55, 53, 51, 49, 47, 45, 43, 41, 39, 37, 35, 33,
                                             31, 29, 27, 25, 23, 21, 19, 17, 15, 13, 11, 9, 7, 5, 3, 1);
  _mm512_storeu_si512(p, _mm512_permutex2var_epi16(low, odd_words, high));
  a = cut(low);
  b = cut(high);
}

// A sum in float64: of errors, of a norm.
struct WideSum {
  __m512d low = _mm512_setzero_pd(), high = _mm512_setzero_pd();

  void add(Vec a) {
    low = _mm512_add_pd(low, _mm512_cvtps_pd(_mm512_castps512_ps256(a)));
    high = _mm512_add_pd(high, _mm512_cvtps_pd(_mm512_extractf32x8_ps(a, 1)));
  }
  void add_square(Vec a) {
    const __m512d first = _mm512_cvtps_pd(_mm512_castps512_ps256(a)),
                  second = _mm512_cvtps_pd(_mm512_extractf32x8_ps(a, 1));
    low = _mm512_fmadd_pd(first, first, low);
    high = _mm512_fmadd_pd(second, second, high);
  }
  double total() const { return _mm512_reduce_add_pd(_mm512_add_pd(low, high)); }
};

}  // namespace

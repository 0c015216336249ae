// The rows of select_tokens_ on a CPU, compiled once per instruction set (see isa_*.cpp).
//
// Moves, per token: 4 bytes of score and 4 of age in, 4 of age and 4 of slots out: it all stays in
// the first two cache levels, so instructions limit it, not memory. A work unit is a row. A sort
// would take log N passes; here a row takes
//   1  score -> sortable key: unsigned integers in the order of the scores (in the slots' memory)
//   2  a histogram of all keys over 2048 equal bins between the smallest and the largest key, which
//      finds the bin of the last chosen key, then histograms of that bin alone (2 or 3 in all)
//   3  key against threshold: slots, ages and index, 16 tokens at a time with AVX-512
// The arithmetic is the definition's to the last bit: products are rounded before they are added.
// Lost: digits of the key as bins, because most scores share their leading digit.
#pragma once

#include "fastcache/token_plan.h"
#include "vec.h"

namespace {

using fastcache::SelectPlan;

constexpr int kBinBits = 11, kBins = 1 << kBinBits,
              kFewBinBits = 8;  // few: for rows shorter than clearing 2048 bins
constexpr uint32_t kNanKey = 0xffffffffu;

// A product that is rounded: the compiler may not contract it with an addition.
inline Vec product(Vec a, Vec b) {
  Vec out = mul(a, b);
#if defined(__SSE2__)
  asm("" : "+x"(out));
#elif defined(__aarch64__)
  asm("" : "+w"(out));
#else
  volatile Vec held = out;
  out = held;
#endif
  return out;
}

// NaN above all, -0 equal to +0.
inline uint32_t key_of(float value) {
  const uint32_t bits = float_to_bits(value + 0.0f);
  if (value != value) return kNanKey;
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

inline float value_of(uint32_t key) {
  return bits_to_float(key == kNanKey ? 0x7fc00000u : key & 0x80000000u ? key & 0x7fffffffu : ~key);
}

// max(||score||, 1e-12) in float64, rounded once; NaN stays NaN.
inline float norm_of(const float* score, int64_t N) {
  WideSum squares;
  int64_t n = 0;
  for (; n + kLanes <= N; n += kLanes) squares.add_square(load(score + n));
  if (n < N) squares.add_square(load_part(score + n, int(N - n)));
  const double norm = __builtin_sqrt(squares.total());
  return float(norm < 1e-12 ? 1e-12 : norm);
}

// Rows of unit stride; `keys` may be the memory of the slots.
inline void write_keys(const SelectPlan& plan, const float* score, const int32_t* age, uint32_t* keys) {
  const Vec norm = broadcast(plan.normalize ? norm_of(score, plan.N) : 1.0f),
            weight = broadcast(plan.age_weight);
  for (int64_t n = 0; n < plan.N; n += kLanes) {
    const int count = plan.N - n < kLanes ? int(plan.N - n) : kLanes;
    Vec total = count == kLanes ? load(score + n) : load_part(score + n, count);
    if (plan.normalize) total = div(total, norm);
    if (plan.aged) {
      int32_t ages[kLanes] = {};
      __builtin_memcpy(ages, age + n, count * sizeof(int32_t));
      total = add(total, product(weight, from_integers(ages)));
    }
    float values[kLanes];
    store(values, total);
    for (int i = 0; i < count; ++i) keys[n + i] = key_of(values[i]);
  }
}

// The best token of every cell gains bonus times its own score; the first of equal ones is the best.
inline void add_cell_bonus(const SelectPlan& plan, uint32_t* keys) {
  const int64_t cell = plan.cell, width = plan.width;
  for (int64_t top = 0; top < plan.N / width; top += cell) {
    for (int64_t left = 0; left < width; left += cell) {
      int64_t best = top * width + left;
      for (int64_t i = 0; i < cell; ++i) {
        for (int64_t j = 0; j < cell; ++j) {
          const int64_t token = (top + i) * width + left + j;
          if (keys[token] > keys[best]) best = token;
        }
      }
      float values[kLanes];
      const Vec own = broadcast(value_of(keys[best]));
      store(values, add(own, product(broadcast(plan.bonus), own)));
      keys[best] = key_of(values[0]);
    }
  }
}

struct Threshold {
  uint32_t key;     // larger keys are chosen
  int64_t of_ties;  // so many of the keys equal to it, by lowest index
};

// Keys of [first, first + span] among N, packed into `kept`, which may be `keys`; returns how many.
inline int64_t keys_between(const uint32_t* keys, int64_t N, uint32_t first, uint32_t span, uint32_t* kept) {
  int64_t n = 0, count = 0;
#if defined(__AVX512F__)
  for (; n + 16 <= N; n += 16) {
    const __m512i key = _mm512_loadu_si512(keys + n);
    const unsigned inside = _mm512_cmple_epu32_mask(_mm512_sub_epi32(key, _mm512_set1_epi32(int(first))),
                                                    _mm512_set1_epi32(int(span)));
    const unsigned found = unsigned(__builtin_popcount(inside));
    _mm512_mask_storeu_epi32(kept + count, __mmask16((1u << found) - 1),
                             _mm512_maskz_compress_epi32(__mmask16(inside), key));
    count += found;
  }
#endif
  for (; n < N; ++n) {
    const uint32_t key = keys[n];
    kept[count] = key;
    count += key - first <= span;
  }
  return count;
}

// The `wanted` largest of N keys, 1 <= wanted <= N. spare: N keys.
inline Threshold threshold_of(const uint32_t* keys, int64_t N, int64_t wanted, uint32_t* spare) {
  uint32_t low = kNanKey, high = 0;
  for (int64_t n = 0; n < N; ++n) low = keys[n] < low ? keys[n] : low, high = keys[n] > high ? keys[n] : high;
  uint32_t bins[2][kBins];  // two, so that equal keys in a row do not wait for each other
  while (low < high) {
    const int bits = N < 1024 ? kFewBinBits : kBinBits, length = 32 - __builtin_clz(high - low);
    const int shift = length > bits ? length - bits : 0;
    uint32_t bin = (high - low) >> shift;
    for (auto& half : bins) __builtin_memset(half, 0, (bin + 1) * sizeof(uint32_t));
    const int64_t pairs = N & ~int64_t(1);
    for (int64_t n = 0; n < pairs; n += 2)
      ++bins[0][(keys[n] - low) >> shift], ++bins[1][(keys[n + 1] - low) >> shift];
    if (pairs < N) ++bins[0][(keys[pairs] - low) >> shift];
    for (int64_t inside; (inside = int64_t(bins[0][bin]) + bins[1][bin]) < wanted; --bin) wanted -= inside;
    low += bin << shift;
    const uint32_t span = (1u << shift) - 1;
    if (span == 0) break;
    N = keys_between(keys, N, low, span, spare);
    keys = spare;
    high = high - low < span ? high : low + span;
  }
  return {low, wanted};
}

// slots (in the place of the keys), ages and index of one row, of which `count` tokens are chosen.
inline void write_choice(uint32_t* keys, int32_t* age, int32_t* index, int64_t N, int64_t count,
                         Threshold threshold) {
  int64_t n = 0, chosen = 0, ties = threshold.of_ties;
  int32_t* slots = reinterpret_cast<int32_t*>(keys);
#if defined(__AVX512F__)
  const __m512i lanes = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
  const __m512i limit = _mm512_set1_epi32(int(threshold.key));
  for (; n + 16 <= N; n += 16) {
    const __m512i key = _mm512_loadu_si512(keys + n);
    unsigned equal = _mm512_cmpeq_epi32_mask(key, limit);
    if (__builtin_popcount(equal) > ties) equal = _pdep_u32((1u << ties) - 1, equal);
    ties -= __builtin_popcount(equal);
    const unsigned mask = equal | _mm512_cmpgt_epu32_mask(key, limit),
                   found = unsigned(__builtin_popcount(mask));
    const __m512i tokens = _mm512_add_epi32(lanes, _mm512_set1_epi32(int(n))),
                  rows = _mm512_add_epi32(lanes, _mm512_set1_epi32(int(chosen)));
    _mm512_mask_storeu_epi32(index + chosen, __mmask16((1u << found) - 1),
                             _mm512_maskz_compress_epi32(__mmask16(mask), tokens));
    _mm512_storeu_si512(slots + n, _mm512_mask_expand_epi32(_mm512_set1_epi32(-1), __mmask16(mask), rows));
    const __m512i older = _mm512_add_epi32(_mm512_loadu_si512(age + n), _mm512_set1_epi32(1));
    _mm512_storeu_si512(age + n, _mm512_maskz_mov_epi32(__mmask16(~mask), older));
    chosen += found;
  }
#endif
  for (; n < N && chosen < count;
       ++n) {  // without branches: the place after the last chosen one is still free
    const int32_t tie = int32_t(keys[n] == threshold.key) & int32_t(ties > 0),
                  taken = int32_t(keys[n] > threshold.key) | tie;
    ties -= tie;
    index[chosen] = int32_t(n);
    slots[n] = ((int32_t(chosen) + 1) & -taken) - 1;
    age[n] = (age[n] + 1) & (taken - 1);
    chosen += taken;
  }
  for (; n < N; ++n) slots[n] = -1, ++age[n];
}

// Rows [begin, end). scratch: 3 * N words.
void select_rows(const SelectPlan& plan, int64_t begin, int64_t end, uint32_t* scratch) {
  const int64_t N = plan.N;
  float* dense_score = reinterpret_cast<float*>(scratch + N);
  int32_t* dense_age = reinterpret_cast<int32_t*>(scratch + 2 * N);
  for (int64_t r = begin; r < end; ++r) {
    const float* score = plan.score + r * plan.score_row;
    int32_t* const own_age = plan.age + r * plan.age_row;
    int32_t* age = own_age;
    if (plan.score_token != 1) {
      for (int64_t n = 0; n < N; ++n) dense_score[n] = score[n * plan.score_token];
      score = dense_score;
    }
    if (plan.age_token != 1) {
      for (int64_t n = 0; n < N; ++n) dense_age[n] = own_age[n * plan.age_token];
      age = dense_age;
    }
    uint32_t* keys = reinterpret_cast<uint32_t*>(plan.slots + r * N);
    int32_t* index = plan.index + r * plan.capacity;
    const int64_t wanted = plan.counts[r * plan.counts_stride];
    Threshold threshold{kNanKey, 0};  // of nothing
    if (wanted > 0) {
      write_keys(plan, score, age, keys);
      if (plan.cell > 0) add_cell_bonus(plan, keys);
      threshold = threshold_of(keys, N, wanted, scratch);
    } else {
      __builtin_memset(keys, 0, N * sizeof(uint32_t));
    }
    write_choice(keys, age, index, N, wanted, threshold);
    for (int64_t k = wanted; k < plan.capacity; ++k) index[k] = -1;
    if (age != own_age) {
      for (int64_t n = 0; n < N; ++n) own_age[n * plan.age_token] = age[n];
    }
  }
}

}  // namespace

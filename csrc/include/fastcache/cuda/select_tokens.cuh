// The counts[r] best tokens of every row: slots, index and ages in one launch, one thread block a row.
//
// Reads 4 bytes of score and 4 of age a token, writes 4 of slots and 4 of age: 56 rows of 4096 tokens
// are 3.7 MB. Limited by latency: by the barriers between its passes, not by memory. What a sort
// does in log N passes takes here
//   1  score -> sortable key (unsigned integers in the order of the scores)
//   2  histograms over 2 * THREADS equal bins between the smallest and the largest key, then over the
//      bin of the last chosen key: three passes of 11 bits at most, two as a rule
//   3  key against threshold: each warp owns a run of consecutive tokens and counts, then writes its
//      own, so that the index is ascending without a barrier for every 32 tokens
// Keys stay in shared memory up to KEYS tokens; beyond, in the memory of the slots, which is in L2 and
// is overwritten last. Bins start at the smallest key, because scores share their leading digits, and
// a digit that all share would send every atomic to one address. 256 threads for short rows.
// The arithmetic is the definition's to the last bit: products are rounded before they are added, the
// norm is a float64 sum in a fixed order. Counts out of range are clamped and reported.
#pragma once

#include "fastcache/cuda/target.cuh"
#include "fastcache/cuda/tokens.h"
#include "fastcache/cuda/values.cuh"

namespace fastcache::cuda {

template <int THREADS>
struct SelectShared {
  static constexpr int kWarps = THREADS / 32, kBins = 2 * THREADS;
  uint32_t bins[kBins];
  double squares[kWarps];
  uint32_t low[kWarps], high[kWarps], totals[kWarps], greater[kWarps], equal[kWarps];
  uint32_t bin, wanted;
};

constexpr uint32_t kNanKey = 0xffffffffu, kEveryLane = 0xffffffffu;

// NaN above all, -0 equal to +0.
FASTCACHE_DEVICE uint32_t key_of(float value) {
  const uint32_t bits = __float_as_uint(value);
  if (value != value) return kNanKey;
  if (bits << 1 == 0) return 0x80000000u;
  return bits >> 31 ? ~bits : bits | 0x80000000u;
}

FASTCACHE_DEVICE float value_of(uint32_t key) {
  return bits_as_float(key == kNanKey ? 0x7fc00000u : key >> 31 ? key & 0x7fffffffu : ~key);
}

// The reduction over the thread block, in one order; every thread gets the same bits. `shared` belongs to
// this call alone.
template <int THREADS, class T, class Combine>
FASTCACHE_DEVICE T reduce_block(T value, T* shared, const Combine& combine) {
  for (int distance = 16; distance > 0; distance /= 2)
    value = combine(value, __shfl_xor_sync(kEveryLane, value, distance));
  if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = value;
  __syncthreads();
  value = shared[0];
  for (int warp = 1; warp < THREADS / 32; ++warp) value = combine(value, shared[warp]);
  return value;
}

// Sum of `totals` of the warps before this one.
FASTCACHE_DEVICE uint32_t sum_before(const uint32_t* totals) {
  const uint32_t warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  uint32_t sum = lane < warp ? totals[lane] : 0;
  for (int distance = 16; distance > 0; distance /= 2) sum += __shfl_xor_sync(kEveryLane, sum, distance);
  return sum;
}

// Sum of `value` over the threads before this one.
FASTCACHE_DEVICE uint32_t scan_block(uint32_t value, uint32_t* totals) {
  const uint32_t lane = threadIdx.x % 32;
  uint32_t sum = value;
  for (uint32_t distance = 1; distance < 32; distance *= 2) {
    const uint32_t other = __shfl_up_sync(kEveryLane, sum, distance);
    if (lane >= distance) sum += other;
  }
  if (lane == 31) totals[threadIdx.x / 32] = sum;
  __syncthreads();
  return sum_before(totals) + sum - value;
}

// max(||score||, 1e-12), rounded once from float64; NaN stays NaN.
template <int THREADS>
FASTCACHE_DEVICE float norm_of(const Selection& p, const float* score, double* shared) {
  double squares = 0.0;
  for (int32_t n = threadIdx.x; n < p.N; n += THREADS) {
    const double value = score[n * p.score_token];
    squares += value * value;
  }
  const double norm = sqrt(reduce_block<THREADS>(squares, shared, [](double a, double b) { return a + b; }));
  return static_cast<float>(norm < 1e-12 ? 1e-12 : norm);
}

// The best token of every cell gains bonus times its own score; the first of equal ones is the best.
template <int THREADS>
FASTCACHE_DEVICE void add_cell_bonus(const Selection& p, uint32_t* keys) {
  const int32_t columns = p.width / p.cell, cells = p.N / p.width / p.cell * columns;
  for (int32_t c = threadIdx.x; c < cells; c += THREADS) {
    const int32_t first = c / columns * p.cell * p.width + c % columns * p.cell;
    int32_t best = first;
    for (int32_t i = 0; i < p.cell; ++i) {
      for (int32_t token = first + i * p.width; token < first + i * p.width + p.cell; ++token) {
        if (keys[token] > keys[best]) best = token;
      }
    }
    const float own = value_of(keys[best]);
    keys[best] = key_of(__fadd_rn(own, __fmul_rn(p.bonus, own)));
  }
}

// Larger keys are chosen, and `ties` of those equal to it, by lowest index.
struct Threshold {
  uint32_t key, ties;
};

template <int THREADS>
FASTCACHE_DEVICE Threshold threshold_of(const Selection& p, const uint32_t* keys, uint32_t wanted,
                                        SelectShared<THREADS>& shared) {
  constexpr int kBins = SelectShared<THREADS>::kBins;
  uint32_t low = kNanKey, high = 0;
  for (int32_t n = threadIdx.x; n < p.N; n += THREADS)
    low = keys[n] < low ? keys[n] : low, high = keys[n] > high ? keys[n] : high;
  low = reduce_block<THREADS>(low, shared.low, [](uint32_t a, uint32_t b) { return a < b ? a : b; });
  high = reduce_block<THREADS>(high, shared.high, [](uint32_t a, uint32_t b) { return a > b ? a : b; });
  uint32_t span = high - low;
  while (span > 0) {
    int shift = 0;
    while (span >> shift >= kBins) ++shift;
    for (int i = threadIdx.x; i < kBins; i += THREADS) shared.bins[i] = 0;
    __syncthreads();
    for (int32_t n = threadIdx.x; n < p.N; n += THREADS) {
      const uint32_t offset = keys[n] - low;
      if (offset <= span) atomicAdd(&shared.bins[offset >> shift], 1u);
    }
    __syncthreads();
    const uint32_t top = kBins - 1 - 2 * threadIdx.x, upper = shared.bins[top], lower = shared.bins[top - 1];
    const uint32_t before = scan_block(upper + lower, shared.totals);
    if (before < wanted && wanted <= before + upper + lower) {  // one thread
      const bool is_upper = wanted <= before + upper;
      shared.bin = is_upper ? top : top - 1;
      shared.wanted = wanted - before - (is_upper ? 0 : upper);
    }
    __syncthreads();
    const uint32_t start = shared.bin << shift, width = (1u << shift) - 1;
    span = span - start < width ? span - start : width;
    low += start;
    wanted = shared.wanted;
  }
  return {low, wanted};
}

// Slots, index and ages of a row. Reads a key before it writes the slot of its token: they may share memory.
template <int THREADS>
FASTCACHE_DEVICE void write_choice(const Selection& p, int64_t row, const uint32_t* keys, Threshold threshold,
                                   SelectShared<THREADS>& shared) {
  constexpr int32_t kWarps = THREADS / 32;
  const int32_t warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int32_t run = (p.N + THREADS - 1) / THREADS * 32, begin = warp * run,
                end = begin + run < p.N ? begin + run : p.N;
  uint32_t greater = 0, equal = 0;
  for (int32_t n = begin; n < end; n += 32) {
    const bool inside = n + lane < end;
    const uint32_t key = inside ? keys[n + lane] : 0;
    greater += __popc(__ballot_sync(kEveryLane, inside && key > threshold.key));
    equal += __popc(__ballot_sync(kEveryLane, inside && key == threshold.key));
  }
  static_assert(kWarps <= 32);
  if (lane == 0) shared.greater[warp] = greater, shared.equal[warp] = equal;
  __syncthreads();
  equal = sum_before(shared.equal);
  uint32_t chosen = sum_before(shared.greater) + (equal < threshold.ties ? equal : threshold.ties);
  const uint32_t lanes_before = (1u << lane) - 1;
  int32_t* slots = p.slots + row * p.N;
  int32_t* index = p.index + row * p.capacity;
  int32_t* age = p.age + row * p.age_row;
  for (int32_t n = begin; n < end; n += 32) {
    const bool inside = n + lane < end;
    const uint32_t key = inside ? keys[n + lane] : 0;
    const uint32_t ties = __ballot_sync(kEveryLane, inside && key == threshold.key);
    const bool tie = inside && key == threshold.key && equal + __popc(ties & lanes_before) < threshold.ties;
    const bool taken = tie || (inside && key > threshold.key);
    const uint32_t all = __ballot_sync(kEveryLane, taken);
    const int32_t place = chosen + __popc(all & lanes_before);
    equal += __popc(ties);
    chosen += __popc(all);
    if (!inside) continue;
    int32_t* own = age + (n + lane) * p.age_token;
    slots[n + lane] = taken ? place : -1;
    if (taken) index[place] = n + lane;
    *own = taken ? 0 : *own + 1;
  }
}

// Grid: rows. KEYS: tokens whose keys fit into shared memory, 0: they are kept in the slots.
template <int THREADS, int KEYS>
__global__ void __launch_bounds__(THREADS, 1) select_kernel(const __grid_constant__ Selection p) {
  __shared__ SelectShared<THREADS> shared;
  __shared__ uint32_t shared_keys[KEYS > 0 ? KEYS : 1];
  const int64_t row = blockIdx.x;
  uint32_t* keys = KEYS > 0 ? shared_keys : reinterpret_cast<uint32_t*>(p.slots + row * p.N);
  const int32_t asked = p.counts[row * p.counts_stride], most = p.N < p.capacity ? p.N : p.capacity;
  const int32_t count = asked < 0 ? 0 : asked > most ? most : asked;
  if (count != asked && threadIdx.x == 0) atomicOr(p.error_flag, kBadCount);

  Threshold threshold{kNanKey, 0};  // of nothing
  if (count > 0) {
    const float* score = p.score + row * p.score_row;
    const int32_t* age = p.age + row * p.age_row;
    const float norm = p.normalize ? norm_of<THREADS>(p, score, shared.squares) : 1.0f;
    for (int32_t n = threadIdx.x; n < p.N; n += THREADS) {
      float total = score[n * p.score_token];
      if (p.normalize) total = total / norm;
      if (p.aged) total = __fadd_rn(total, __fmul_rn(p.age_weight, static_cast<float>(age[n * p.age_token])));
      keys[n] = key_of(total);
    }
    __syncthreads();
    if (p.cell > 0) {
      add_cell_bonus<THREADS>(p, keys);
      __syncthreads();
    }
    threshold = threshold_of<THREADS>(p, keys, count, shared);
  } else {
    for (int32_t n = threadIdx.x; n < p.N; n += THREADS) keys[n] = 0;
    __syncthreads();
  }
  write_choice<THREADS>(p, row, keys, threshold, shared);
  for (int32_t k = count + threadIdx.x; k < p.capacity; k += THREADS) p.index[row * p.capacity + k] = -1;
}

}  // namespace fastcache::cuda

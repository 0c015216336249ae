// Measured launch configurations: a table that goes before the heuristic of config.h.
//
// Python fills it once per device, from a file (fastcache/backends/tuning.py) or from the tuner while
// it measures (benchmarks/tune.py). A launch looks its key up in an immutable snapshot: an empty table
// costs one load. An entry that a call cannot use (its tensors are not aligned) leaves it to the
// heuristic.
#pragma once

#include <compare>
#include <cstdint>

#include "config.h"
#include "launch.h"

namespace fastcache::cuda {

// Raised when kernels change so much that configurations measured before are worth nothing.
constexpr int32_t kTuningVersion = 1;

enum class Kernel : int32_t { kSum, kRow };

// Calls that share a configuration: so many features at most, so many rows (B * N) at most.
constexpr int32_t term_bucket(int64_t features) {
  return features <= 2 ? 0 : features <= 16 ? 1 : features <= kFewTerms ? 2 : 3;
}
constexpr int32_t row_bucket(int64_t rows) {
  int32_t bucket = 0;
  while ((int64_t{1} << (2 * bucket)) < rows) ++bucket;
  return bucket;
}

struct TuningKey {
  Kernel kernel;
  int32_t device;
  Type x;
  int32_t channels, terms, rows;
  auto operator<=>(const TuningKey&) const = default;
};

// The values of a SumConfig (width, rows, 0) or a RowConfig (threads, vectors, width).
struct TunedValues {
  int32_t first, second, third;
  bool operator==(const TunedValues&) const = default;
};

// The entry of the key, or nullptr. What it points to lives as long as the process.
const TunedValues* find_tuned(const TuningKey& key);

inline TuningKey key_of(const Call& call, Kernel kernel) {
  const Common& p = call.common;
  return {
      kernel, call.device, p.x_type, p.D, term_bucket(call.feature_count), row_bucket(int64_t(p.B) * p.N)};
}

inline SumConfig chosen_sum_config(const Call& call) {
  const SumConfig heuristic = sum_config(call.common, call.width, call.multiprocessors);
  const TunedValues* tuned = find_tuned(key_of(call, Kernel::kSum));
  if (!tuned || tuned->first > heuristic.width) return heuristic;
  return {tuned->first, tuned->second};
}

template <Type X, int capacity>
RowConfig chosen_row_config(const Call& call) {
  const TunedValues* tuned = find_tuned(key_of(call, Kernel::kRow));
  if (!tuned || tuned->third > call.width) return row_config<X, capacity>(call.common.D, call.width);
  return {tuned->first, tuned->second, tuned->third};
}

}  // namespace fastcache::cuda

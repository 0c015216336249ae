// Launch configurations: the legal set and the choice among it, apart from the kernels.
#pragma once

#include <cstdint>
#include <iterator>

#include "fastcache/cuda/parameters.h"

namespace fastcache::cuda {

// sum_kernel: columns and rows of a thread.
struct SumConfig {
  int width, rows;
};

constexpr int kSumRows[] = {1, 2, 4};  // of a thread that reads 16 bytes at once

// row_kernel: threads of a row, column runs of a thread, columns of a run.
struct RowConfig {
  int threads, vectors, width;
  constexpr int columns() const { return threads * vectors * width; }
};
constexpr bool operator==(RowConfig a, RowConfig b) {
  return a.threads == b.threads && a.vectors == b.vectors && a.width == b.width;
}

// In order of preference: the first that holds D in runs no wider than the call allows. Most hold the
// width of a known model exactly. The last takes every alignment.
constexpr RowConfig kRows16[] = {{32, 4, 8},  {32, 9, 4},  {32, 6, 8},  {128, 3, 8}, {128, 4, 8},
                                 {128, 5, 8}, {256, 3, 8}, {256, 4, 8}, {1024, 8, 1}};
constexpr RowConfig kRows32[] = {{32, 9, 4},  {128, 3, 4}, {128, 6, 4},
                                 {256, 5, 4}, {256, 8, 4}, {1024, 8, 1}};
// Above kFewTerms terms a launch takes long enough for two to serve all widths.
constexpr RowConfig kManyTermRows16[] = {{256, 4, 8}, {1024, 8, 1}};
constexpr RowConfig kManyTermRows32[] = {{256, 8, 4}, {1024, 8, 1}};
constexpr int kMostChannels = 8192;  // that fit into the registers of a thread block

template <Type X, int capacity>
struct RowConfigs {
  static constexpr bool kWide = X == Type::kFloat32, kFew = capacity == kFewTerms;
  static constexpr const RowConfig* values =
      kFew ? (kWide ? kRows32 : kRows16) : (kWide ? kManyTermRows32 : kManyTermRows16);
  static constexpr int count = kFew ? (kWide ? std::size(kRows32) : std::size(kRows16))
                                    : (kWide ? std::size(kManyTermRows32) : std::size(kManyTermRows16));
};

// Columns of x in 16 bytes.
constexpr int full_width(Type x) { return x == Type::kFloat32 ? 4 : 8; }

// `width` columns can be read at once in all tensors of the call. Four rows share a gate, unless that
// would leave fewer than two thread blocks for each multiprocessor.
inline SumConfig sum_config(const Common& p, int width, int multiprocessors) {
  const bool wide = width == full_width(p.x_type);
  if (!wide) return {1, 4};
  const int64_t threads = int64_t(p.B) * ((p.N + 3) / 4) * (p.D / width);
  return {width, threads / 256 >= 2 * multiprocessors ? 4 : 1};
}

template <Type X, int capacity>
RowConfig row_config(int32_t D, int width) {
  using Configs = RowConfigs<X, capacity>;
  int i = 0;
  while (i + 1 < Configs::count && (Configs::values[i].width > width || Configs::values[i].columns() < D))
    ++i;
  return Configs::values[i];
}

}  // namespace fastcache::cuda

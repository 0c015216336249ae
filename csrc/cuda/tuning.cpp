#include "tuning.h"

#include <algorithm>
#include <atomic>
#include <map>
#include <memory>
#include <mutex>
#include <vector>

#define FASTCACHE_EXPORT extern "C" __attribute__((visibility("default")))

namespace fastcache::cuda {

namespace {

using Table = std::map<TuningKey, TunedValues>;

std::mutex writing;
std::atomic<const Table*> current = nullptr;
std::vector<std::unique_ptr<const Table>> snapshots;  // kept: a launch of another thread may read one

void publish(Table table) {
  snapshots.push_back(std::make_unique<const Table>(std::move(table)));
  current.store(snapshots.back()->empty() ? nullptr : snapshots.back().get(), std::memory_order_release);
}

Table copied() {
  const Table* table = current.load(std::memory_order_relaxed);
  return table ? *table : Table();
}

template <Type X, int capacity>
void add_row_configs(int32_t channels, std::vector<TunedValues>& legal) {
  for (int i = 0; i < RowConfigs<X, capacity>::count; ++i) {
    const RowConfig config = RowConfigs<X, capacity>::values[i];
    if (channels % config.width == 0 && config.columns() >= channels)
      legal.push_back({config.threads, config.vectors, config.width});
  }
}

template <Type X>
void add_row_configs(int32_t channels, int32_t terms, std::vector<TunedValues>& legal) {
  terms <= term_bucket(kFewTerms) ? add_row_configs<X, kFewTerms>(channels, legal)
                                  : add_row_configs<X, kMaxTerms>(channels, legal);
}

// Every configuration that computes such a call, in no order of preference.
std::vector<TunedValues> legal_configs(Kernel kernel, Type x, int32_t channels, int32_t terms) {
  std::vector<TunedValues> legal;
  if (kernel == Kernel::kSum) {
    const int width = full_width(x);
    if (channels % width == 0) {
      for (const int rows : kSumRows) legal.push_back({width, rows, 0});
    }
    legal.push_back({1, 4, 0});
    return legal;
  }
  switch (x) {
    case Type::kFloat32:
      add_row_configs<Type::kFloat32>(channels, terms, legal);
      break;
    case Type::kFloat16:
      add_row_configs<Type::kFloat16>(channels, terms, legal);
      break;
    case Type::kBFloat16:
      add_row_configs<Type::kBFloat16>(channels, terms, legal);
      break;
    default:
      break;
  }
  return legal;
}

bool known(int32_t kernel, int32_t x, int32_t channels) {
  return (kernel == 0 || kernel == 1) && x >= 0 && x <= static_cast<int32_t>(Type::kBFloat16) && channels > 0;
}

}  // namespace

const TunedValues* find_tuned(const TuningKey& key) {
  const Table* table = current.load(std::memory_order_acquire);
  if (!table) return nullptr;
  const auto found = table->find(key);
  return found == table->end() ? nullptr : &found->second;
}

FASTCACHE_EXPORT int32_t fastcache_cuda_tuning_version() { return kTuningVersion; }

// Writes up to `most` legal configurations, three numbers each, into `out` and returns how many there are.
// kernel: 0 sum, 1 row; x: 0 float32, 1 float16, 2 bfloat16; terms: a bucket.
FASTCACHE_EXPORT int32_t fastcache_cuda_configs(int32_t kernel, int32_t x, int32_t channels, int32_t terms,
                                                int32_t* out, int32_t most) {
  if (!known(kernel, x, channels)) return 0;
  const std::vector<TunedValues> legal =
      legal_configs(static_cast<Kernel>(kernel), static_cast<Type>(x), channels, terms);
  for (int32_t i = 0; i < std::min<int32_t>(most, legal.size()); ++i) {
    out[3 * i] = legal[i].first, out[3 * i + 1] = legal[i].second, out[3 * i + 2] = legal[i].third;
  }
  return static_cast<int32_t>(legal.size());
}

// Makes such calls use a configuration from now on; 0 if it is not legal, and then nothing changes.
FASTCACHE_EXPORT int32_t fastcache_cuda_tune(int32_t kernel, int32_t device, int32_t x, int32_t channels,
                                             int32_t terms, int32_t rows, const int32_t* values) {
  if (!known(kernel, x, channels)) return 0;
  const TunedValues wanted{values[0], values[1], values[2]};
  const std::vector<TunedValues> legal =
      legal_configs(static_cast<Kernel>(kernel), static_cast<Type>(x), channels, terms);
  if (std::find(legal.begin(), legal.end(), wanted) == legal.end()) return 0;
  const std::scoped_lock lock(writing);
  Table table = copied();
  table[{static_cast<Kernel>(kernel), device, static_cast<Type>(x), channels, terms, rows}] = wanted;
  publish(std::move(table));
  return 1;
}

// Leaves every call to the heuristic.
FASTCACHE_EXPORT void fastcache_cuda_untune() {
  const std::scoped_lock lock(writing);
  publish({});
}

}  // namespace fastcache::cuda

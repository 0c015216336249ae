#include "capability.h"

#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

namespace fastcache {

namespace {

bool supported(const char* name) {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 =
      __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2");
  if (std::strcmp(name, "avx2") == 0) return avx2;
  if (std::strcmp(name, "avx512") == 0) {
    return avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512vl");
  }
#endif
  return std::strcmp(name, "default") == 0;
}

// Widest first; only what this library was built with.
const Kernels* const built[] = {
#if defined(FASTCACHE_HAS_AVX512)
    &kernels_avx512,
#endif
#if defined(FASTCACHE_HAS_AVX2)
    &kernels_avx2,
#endif
    &kernels_default,
};

struct Choice {
  const Kernels* kernels = nullptr;
  std::string error;

  Choice() {
    const char* wanted = std::getenv("FASTCACHE_CPU_CAPABILITY");
    std::string usable;
    for (const Kernels* candidate : built) {
      if (!supported(candidate->name)) continue;
      usable += (usable.empty() ? "" : ", ") + std::string(candidate->name);
      const bool named = wanted != nullptr && std::strcmp(wanted, candidate->name) == 0;
      if (kernels == nullptr && (named || wanted == nullptr || *wanted == '\0')) kernels = candidate;
    }
    if (kernels == nullptr) {
      error = "FASTCACHE_CPU_CAPABILITY: expected one of " + usable +
              " on this processor and in this build, got " + wanted;
    }
  }
};

const Choice& choice() {
  static const Choice once;
  return once;
}

}  // namespace

const Kernels& kernels() {
  const Choice& chosen = choice();
  if (chosen.kernels == nullptr) throw std::runtime_error(chosen.error);
  return *chosen.kernels;
}

}  // namespace fastcache

// The variant in use, or NULL if FASTCACHE_CPU_CAPABILITY asks for one that cannot run here; then
// fastcache_cpu_capability_error() says why, and so does every call of an operator.
extern "C" __attribute__((visibility("default"))) const char* fastcache_cpu_capability() {
  const fastcache::Choice& chosen = fastcache::choice();
  return chosen.kernels ? chosen.kernels->name : nullptr;
}

extern "C" __attribute__((visibility("default"))) const char* fastcache_cpu_capability_error() {
  return fastcache::choice().error.c_str();
}

// fastcache._C: what this build contains and what this processor can do, for `fastcache doctor`.
// Optional at run time; no operator goes through it.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <sstream>
#include <string>
#include <vector>

namespace {

std::vector<std::string> split(const std::string& text) {
  std::vector<std::string> parts;
  std::stringstream stream(text);
  for (std::string part; std::getline(stream, part, ',');) parts.push_back(part);
  return parts;
}

pybind11::dict build() {
  pybind11::dict facts;
  facts["version"] = FASTCACHE_VERSION;
  facts["compiler"] = FASTCACHE_COMPILER;
  facts["torch"] = FASTCACHE_TORCH;
  facts["schema_digest"] = FASTCACHE_SCHEMA_DIGEST;
  facts["cpu_capabilities"] = split(FASTCACHE_ISAS);
  facts["cuda"] = std::string(FASTCACHE_CUDA_ARCHS).size() > 0;
  facts["cuda_archs"] = split(FASTCACHE_CUDA_ARCHS);
  facts["cuda_compiler"] = FASTCACHE_CUDA_COMPILER;
  return facts;
}

std::vector<std::string> cpu_features() {
  std::vector<std::string> found;
#if defined(__x86_64__)
  __builtin_cpu_init();
#define FASTCACHE_FEATURE(name) \
  if (__builtin_cpu_supports(name)) found.push_back(name)
  FASTCACHE_FEATURE("avx");
  FASTCACHE_FEATURE("avx2");
  FASTCACHE_FEATURE("fma");
  FASTCACHE_FEATURE("bmi2");
  FASTCACHE_FEATURE("avx512f");
  FASTCACHE_FEATURE("avx512bw");
  FASTCACHE_FEATURE("avx512cd");
  FASTCACHE_FEATURE("avx512dq");
  FASTCACHE_FEATURE("avx512vl");
#undef FASTCACHE_FEATURE
#endif
  return found;
}

}  // namespace

PYBIND11_MODULE(_C, module) {
  module.doc() = "Facts about the compiled parts of FastCache.";
  module.def(
      "build", &build,
      "What was built: version, compiler, torch, schema digest, CPU capabilities, CUDA architectures.");
  module.def("cpu_features", &cpu_features, "Instruction sets of this processor that the kernels can use.");
}

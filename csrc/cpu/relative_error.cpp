// Launcher of relative_error on a CPU: blocks of rows of all layers are spread over PyTorch's threads,
// and their float64 sums are added in order, so results do not depend on the number of threads.
#include <vector>

#include "../token_checks.h"
#include "capability.h"

namespace fastcache {

namespace {

constexpr int64_t kElementsPerThread = 64 * 1024;  // below this a thread costs more than it saves

struct Launch {
  const ErrorPlan& plan;
  const Kernels& kernels;
};

void run_blocks(int64_t begin, int64_t end, void* context) {
  const Launch& launch = *static_cast<const Launch*>(context);
  launch.kernels.relative_error(launch.plan, begin, end);
}

void write_errors(const ErrorPlan& plan, float* errors) {
  for (int64_t l = 0; l < plan.layers; ++l) {
    std::vector<double> total(1 + plan.lookaheads);
    for (int64_t i = 0; i < plan.blocks_per_layer; ++i) {
      const double* sums = plan.sums + (l * plan.blocks_per_layer + i) * (1 + plan.lookaheads);
      for (int64_t k = 0; k <= plan.lookaheads; ++k) total[k] += sums[k];
    }
    for (int64_t k = 0; k < plan.lookaheads; ++k)
      errors[k * plan.layers + l] = static_cast<float>(total[1 + k] / total[0]);
  }
}

void relative_error(StableIValue* stack, uint64_t inputs, uint64_t outputs) {
  const ErrorArguments a(stack, inputs, outputs);
  const Kernels& chosen = kernels();
  a.check();
  Outputs results(a.like(), 1);
  std::vector<Rows> newest(a.layers), earlier(a.earlier_count);
  for (int64_t j = 0; j < a.layers; ++j) newest[j] = rows_of(a.newest[j]);
  for (int64_t j = 0; j < a.earlier_count; ++j) earlier[j] = rows_of(a.earlier[j]);
  ErrorPlan plan;
  plan.N = a.like().sizes[1], plan.D = a.like().sizes[2], plan.rows = a.like().sizes[0] * plan.N;
  plan.layers = a.layers, plan.lookaheads = a.earlier_count / a.layers;
  plan.newest = newest.data(), plan.earlier = earlier.data();
  plan.blocks_per_layer = plan.lookaheads ? (plan.rows + kErrorRows - 1) / kErrorRows : 0;
  std::vector<double> sums(plan.layers * plan.blocks_per_layer * (1 + plan.lookaheads));
  plan.sums = sums.data();
  const int64_t sizes[] = {plan.lookaheads, plan.layers};
  float* errors = static_cast<float*>(results.add(0, float32_dtype(), 2, sizes));
  const int64_t block = kErrorRows * plan.D * (1 + plan.lookaheads) + 1;
  Launch launch{plan, chosen};
  if (torch_parallel_for(0, plan.layers * plan.blocks_per_layer, (kElementsPerThread + block - 1) / block,
                         run_blocks, &launch) != 0) {
    fail("relative_error: an error in PyTorch's thread pool");
  }
  write_errors(plan, errors);
  results.release(stack);
}

}  // namespace

}  // namespace fastcache

STABLE_TORCH_LIBRARY_IMPL(fastcache, CPU, library) {
  library.impl("relative_error", &fastcache::relative_error);
}

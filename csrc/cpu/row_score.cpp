// Launchers of row_score and value_norm on a CPU. A token is scored by one thread and in one way, so
// results do not depend on the number of threads.
#include "../token_checks.h"
#include "capability.h"

namespace fastcache {

namespace {

constexpr int64_t kElementsPerThread = 64 * 1024;  // below this a thread costs more than it saves

struct Launch {
  const ScorePlan& plan;
  const Kernels& kernels;
};

void run_tiles(int64_t begin, int64_t end, void* context) {
  const Launch& launch = *static_cast<const Launch*>(context);
  launch.kernels.row_score(launch.plan, begin, end);
}

void run(const char* name, ScorePlan& plan, Outputs& outputs, const Kernels& kernels) {
  const int64_t sizes[] = {plan.B, plan.N};
  plan.out = static_cast<float*>(outputs.add(0, float32_dtype(), 2, sizes));
  const int64_t tiles = plan.B * ((plan.N + kScoreTile - 1) / kScoreTile),
                tile = kScoreTile * (plan.D * (plan.by_heads ? plan.heads : 1) + 1);
  Launch launch{plan, kernels};
  if (torch_parallel_for(0, tiles, (kElementsPerThread + tile - 1) / tile, run_tiles, &launch) != 0) {
    fail(std::string(name) + ": an error in PyTorch's thread pool");
  }
}

void row_score(StableIValue* stack, uint64_t inputs, uint64_t outputs) {
  const RowScoreArguments arguments(stack, inputs, outputs);
  const Kernels& chosen = kernels();
  arguments.check();
  const Tensor& x = arguments.x;
  Outputs results(x, 1);
  ScorePlan plan;
  plan.B = x.sizes[0], plan.N = x.sizes[1], plan.D = x.sizes[2];
  plan.x = rows_of(x), plan.reference = rows_of(arguments.reference);
  run("row_score", plan, results, chosen);
  results.release(stack);
}

void value_norm(StableIValue* stack, uint64_t inputs, uint64_t outputs) {
  const ValueNormArguments arguments(stack, inputs, outputs);
  const Kernels& chosen = kernels();
  arguments.check();
  const Tensor& v = arguments.v;
  Outputs results(v, 1);
  ScorePlan plan;
  plan.B = v.sizes[0], plan.N = v.sizes[2], plan.D = v.sizes[3];
  plan.x = {v.data, v.strides[0] * v.element, v.strides[2] * v.element, v.type};
  plan.by_heads = true, plan.heads = v.sizes[1], plan.head = v.strides[1] * v.element;
  run("value_norm", plan, results, chosen);
  results.release(stack);
}

}  // namespace

}  // namespace fastcache

STABLE_TORCH_LIBRARY_IMPL(fastcache, CPU, library) {
  library.impl("row_score", &fastcache::row_score);
  library.impl("value_norm", &fastcache::value_norm);
}

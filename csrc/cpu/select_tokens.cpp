// Launcher of select_tokens_ on a CPU. A row is chosen by one thread and in one way, so results do
// not depend on the number of threads.
#include <memory>
#include <new>

#include "../token_checks.h"
#include "capability.h"

namespace fastcache {

namespace {

constexpr int64_t kTokensPerThread = 8 * 1024;  // below this a thread costs more than it saves

SelectPlan plan_of(const SelectArguments& a, Outputs& outputs) {
  SelectPlan plan;
  const int64_t* sizes = a.score.sizes;
  plan.N = sizes[1], plan.capacity = a.capacity;
  plan.score = reinterpret_cast<const float*>(a.score.data);
  plan.score_row = a.score.strides[0], plan.score_token = a.score.strides[1];
  plan.age = reinterpret_cast<int32_t*>(a.age.data);
  plan.age_row = a.age.strides[0], plan.age_token = a.age.strides[1];
  plan.counts = reinterpret_cast<const int32_t*>(a.counts.data);
  plan.counts_stride = a.counts.strides[0];
  plan.age_weight = static_cast<float>(a.age_weight), plan.bonus = static_cast<float>(a.bonus);
  plan.aged = a.age_weight != 0.0, plan.normalize = a.normalize;
  plan.width = a.width, plan.cell = a.cell;
  const int64_t index_sizes[] = {sizes[0], a.capacity};
  plan.slots = static_cast<int32_t*>(outputs.add(0, int32_dtype(), 2, sizes));
  plan.index = static_cast<int32_t*>(outputs.add(1, int32_dtype(), 2, index_sizes));
  return plan;
}

struct Launch {
  const SelectPlan& plan;
  const Kernels& kernels;
};

void run_rows(int64_t begin, int64_t end, void* context) {
  const Launch& launch = *static_cast<const Launch*>(context);
  const std::unique_ptr<uint32_t[]> scratch(new uint32_t[3 * launch.plan.N]);
  launch.kernels.select_tokens(launch.plan, begin, end, scratch.get());
}

void select_tokens(StableIValue* stack, uint64_t inputs, uint64_t outputs) {
  const SelectArguments arguments(stack, inputs, outputs);
  const Kernels& chosen = kernels();
  arguments.check();
  arguments.check_counts();
  Outputs results(arguments.score, 2);
  const SelectPlan plan = plan_of(arguments, results);
  Launch launch{plan, chosen};
  const int64_t grain = plan.N > 0 ? (kTokensPerThread + plan.N - 1) / plan.N : kTokensPerThread;
  if (torch_parallel_for(0, arguments.score.sizes[0], grain, run_rows, &launch) != 0) {
    fail("select_tokens_: out of memory, or an error in PyTorch's thread pool");
  }
  results.release(stack);
}

}  // namespace

}  // namespace fastcache

STABLE_TORCH_LIBRARY_IMPL(fastcache, CPU, library) {
  library.impl("select_tokens_", &fastcache::select_tokens);
}

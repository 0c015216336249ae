// Launcher of attention_received on a CPU. A head of one sample is computed by one thread, and heads
// are added in order, so results do not depend on the number of threads.
#include <memory>
#include <vector>

#include "../token_checks.h"
#include "capability.h"

namespace fastcache {

namespace {

struct Launch {
  const AttentionPlan& plan;
  const Kernels& kernels;
};

void run_heads(int64_t begin, int64_t end, void* context) {
  const Launch& launch = *static_cast<const Launch*>(context);
  const std::unique_ptr<float[]> scratch(new float[attention_scratch_floats(launch.plan)]);
  launch.kernels.attention_received(launch.plan, begin, end, scratch.get());
}

Rows head_rows(const Tensor& t) {
  return {t.data, t.strides[0] * t.element, t.strides[2] * t.element, t.type};
}

void attention_received(StableIValue* stack, uint64_t inputs, uint64_t outputs) {
  const AttentionArguments a(stack, inputs, outputs);
  const Kernels& chosen = kernels();
  a.check();
  Outputs results(a.q, 1);
  AttentionPlan plan;
  plan.B = a.q.sizes[0], plan.H = a.q.sizes[1], plan.N = a.q.sizes[2], plan.d = a.q.sizes[3],
  plan.M = a.k.sizes[2];
  plan.q = head_rows(a.q), plan.k = head_rows(a.k);
  plan.q_head = a.q.strides[1] * a.q.element, plan.k_head = a.k.strides[1] * a.k.element;
  if (a.lse) {
    plan.lse = reinterpret_cast<const float*>(a.lse.data);
    plan.lse_batch = a.lse.strides[0], plan.lse_head = a.lse.strides[1], plan.lse_row = a.lse.strides[2];
  }
  plan.factor =
      static_cast<float>((a.scale ? *a.scale : 1.0 / __builtin_sqrt(double(plan.d))) * 1.4426950408889634);
  const int64_t sizes[] = {plan.B, plan.M};
  float* received = static_cast<float*>(results.add(0, float32_dtype(), 2, sizes));
  std::vector<double> partial(plan.B * plan.H * plan.M);
  plan.partial = partial.data();
  Launch launch{plan, chosen};
  if (!partial.empty() && torch_parallel_for(0, plan.B * plan.H, 1, run_heads, &launch) != 0) {
    fail("attention_received: out of memory, or an error in PyTorch's thread pool");
  }
  for (int64_t b = 0; b < plan.B; ++b) {
    for (int64_t j = 0; j < plan.M; ++j) {
      double total = 0.0;
      for (int64_t h = 0; h < plan.H; ++h) total += partial[(b * plan.H + h) * plan.M + j];
      received[b * plan.M + j] = static_cast<float>(total / double(plan.H > 0 ? plan.H : 1));
    }
  }
  results.release(stack);
}

}  // namespace

}  // namespace fastcache

STABLE_TORCH_LIBRARY_IMPL(fastcache, CPU, library) {
  library.impl("attention_received", &fastcache::attention_received);
}

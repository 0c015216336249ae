// The kernels of one instruction set, and the choice among them.
#pragma once

#include <cstdint>

#include "fastcache/token_plan.h"

namespace fastcache {

struct Kernels {
  const char* name;
  // Work units [begin, end) of the plan; scratch holds scratch_floats(plan) floats.
  void (*residual_update)(const Plan& plan, int64_t begin, int64_t end, float* scratch);
  // Rows [begin, end); scratch holds 3 * N words.
  void (*select_tokens)(const SelectPlan& plan, int64_t begin, int64_t end, uint32_t* scratch);
  // Tiles [begin, end) of kScoreTile tokens of one sample: row_score, and value_norm.
  void (*row_score)(const ScorePlan& plan, int64_t begin, int64_t end);
  // Work units [begin, end) of the plan.
  void (*relative_error)(const ErrorPlan& plan, int64_t begin, int64_t end);
  // Heads [begin, end) of all samples; scratch holds attention_scratch_floats(plan) floats.
  void (*attention_received)(const AttentionPlan& plan, int64_t begin, int64_t end, float* scratch);
};

extern const Kernels kernels_avx512, kernels_avx2, kernels_default;

// The widest set that this processor has, or the one FASTCACHE_CPU_CAPABILITY names; throws if
// that is unknown or not supported here.
const Kernels& kernels();

// Sums and rounded rows of a group, and the factor and offset of the modulation.
FASTCACHE_INLINE int64_t scratch_floats(const Plan& plan) { return (2 * kGroup + 2) * pitch_of(plan.D); }

// Transposed keys, a tile's queries, one row, column sums, and a log-sum-exp with its sum per query.
FASTCACHE_INLINE int64_t attention_scratch_floats(const AttentionPlan& plan) {
  return plan.d * (kAttentionKeys + 5) + kAttentionKeys + 2 * plan.N;
}

}  // namespace fastcache

// Launcher of residual_update and residual_update_scatter_ on a CPU: checked arguments become a
// Plan, outputs are allocated, and the work units are spread over PyTorch's threads. A work unit
// is computed by one thread and in one way, so results do not depend on the number of threads.
#include <new>
#include <vector>

#include "../arguments.h"
#include "../overlap.h"
#include "capability.h"

namespace fastcache {

namespace {

constexpr int64_t kElementsPerThread = 64 * 1024;  // below this a thread costs more than it saves
constexpr int64_t kLocalFloats = 12 * 1024;        // scratch up to 48 KB is on the stack

template <class T>
struct Buffer {  // a few on the stack, more on the heap
  static constexpr int64_t kInline = 16;
  explicit Buffer(int64_t count)
      : many(count > kInline ? new T[count] : nullptr), data(many ? many.get() : few) {}
  T few[kInline];
  std::unique_ptr<T[]> many;
  T* data;
};

const int32_t& at(const Tensor& map, int64_t b, int64_t n) {
  return reinterpret_cast<const int32_t*>(map.data)[b * map.strides[0] + n * map.strides[1]];
}

// A contiguous copy of a slot map, with its values checked.
std::vector<int32_t> checked_map(const char* name, const Tensor& map, int64_t count) {
  const int64_t B = map.sizes[0], N = map.sizes[1];
  std::vector<int32_t> out(B * N);
  int32_t low = 0, high = -1;
  for (int64_t b = 0; b < B; ++b) {
    for (int64_t n = 0; n < N; ++n) {
      const int32_t value = at(map, b, n);
      out[b * N + n] = value;
      low = value < low ? value : low;
      high = value > high ? value : high;
    }
  }
  if (low < -1 || high >= count) {
    fail(std::string(name) + ": expected slots in -1.." + std::to_string(count - 1) + ", got " +
         std::to_string(low) + ".." + std::to_string(high));
  }
  return out;
}

// Makes each packed row the target of one token (the last that names it) and zeroes rows of none.
void own_targets(std::vector<int32_t>& target, const Plan& plan, int64_t row_count) {
  std::vector<int32_t> owner(row_count);
  for (int64_t b = 0; b < plan.B; ++b) {
    int32_t* row = target.data() + b * plan.N;
    for (int32_t& token : owner) token = -1;
    for (int64_t n = 0; n < plan.N; ++n) {
      if (row[n] < 0) continue;
      if (owner[row[n]] >= 0) row[owner[row[n]]] = -1;
      owner[row[n]] = static_cast<int32_t>(n);
    }
    for (int64_t k = 0; k < row_count; ++k) {
      if (owner[k] < 0) __builtin_memset(plan.modulated.at(b, k), 0, plan.modulated.row);
    }
  }
}

void fill_term(const Arguments& a, Term& term, const Tensor& feature, int64_t j) {
  term.feature = rows_of(feature);
  if (a.weights) term.weight = reinterpret_cast<const float*>(a.weights.data)[j * a.weights.strides[0]];
  if (a.scales) {
    term.row_scale = {a.scales.data + j * a.scales.strides[0] * 4, a.scales.strides[1] * 4,
                      a.scales.strides[2] * 4, Type::kFloat32};
  }
  if (!a.gates) return;
  term.gate = a.gates.data;
  if (a.gate_index) {
    const int32_t row = reinterpret_cast<const int32_t*>(a.gate_index.data)[j * a.gate_index.strides[0]];
    if (row < -1 || row >= a.gates.sizes[0]) {
      fail("gate_index: expected rows in -1.." + std::to_string(a.gates.sizes[0] - 1) + ", got " +
           std::to_string(row) + " for term " + std::to_string(j));
    }
    term.gate = row < 0 ? nullptr : a.gates.data + row * a.gates.strides[0] * a.gates.element;
  }
}

void fill_terms(const Arguments& a, Plan& plan, Term* terms) {
  const int64_t position = !a.scatter ? -1 : a.position < 0 ? a.feature_count : a.position;
  for (int64_t j = 0, f = 0; j < plan.term_count; ++j) {
    fill_term(a, terms[j], j == position ? a.slot : a.features[f++], j);
  }
  plan.terms = terms;
  plan.newest = plan.term_count ? terms + plan.term_count - 1 : nullptr;
  if (a.scatter) {
    terms[position].row_scale = rows_of(a.slot_scale);
    plan.newest = terms + position;
  }
}

struct Launch {
  const Plan* plan;
  const Kernels* kernels;
};

void run_blocks(int64_t begin, int64_t end, void* context) {
  const Launch& launch = *static_cast<const Launch*>(context);
  const int64_t floats = scratch_floats(*launch.plan);
  if (floats <= kLocalFloats) {
    alignas(64) float scratch[kLocalFloats];
    launch.kernels->residual_update(*launch.plan, begin, end, scratch);
  } else {
    float* scratch = static_cast<float*>(::operator new(floats * sizeof(float), std::align_val_t(64)));
    launch.kernels->residual_update(*launch.plan, begin, end, scratch);
    ::operator delete(scratch, std::align_val_t(64));
  }
}

void run(Plan& plan, const Kernels& kernels) {
  if (plan.B == 0 || plan.N == 0 || plan.D == 0) return;
  plan.blocks_per_sample = (plan.N + kGroup - 1) / kGroup;
  const int64_t block = kGroup * plan.D * (plan.term_count + 1);
  Launch launch{&plan, &kernels};
  if (torch_parallel_for(0, plan.B * plan.blocks_per_sample, (kElementsPerThread + block - 1) / block,
                         run_blocks, &launch) != 0) {
    fail("residual_update: out of memory, or an error in PyTorch's thread pool");
  }
}

void sum_errors(const Plan& plan, float* errors) {
  for (int64_t b = 0; b < plan.B; ++b) {
    double sums[3] = {};
    for (int64_t n = 0; n < plan.N; ++n) {
      for (int i = 0; i < 3; ++i) sums[i] += plan.error_sums[(b * plan.N + n) * 3 + i];
    }
    for (int i = 0; i < 3; ++i) errors[b * 3 + i] = static_cast<float>(sums[i]);
  }
}

Rows new_rows(Outputs& outputs, int index, const Tensor& x, int64_t rows) {
  const int64_t sizes[] = {x.sizes[0], rows, x.sizes[2]};
  const int64_t row = x.sizes[2] * x.element;
  return {static_cast<char*>(outputs.add(index, x.dtype, 3, sizes)), rows * row, row, x.type};
}

void launch(const Arguments& a, Outputs& outputs) {
  const Kernels& chosen = kernels();
  a.check();
  Plan plan;
  plan.B = a.x.sizes[0], plan.N = a.x.sizes[1], plan.D = a.x.sizes[2];
  plan.x = rows_of(a.x);
  plan.term_count = a.term_count();
  Buffer<Term> terms(plan.term_count);
  plan.gates = vector_of(a.gates, plan.N, static_cast<bool>(a.gate_index));
  fill_terms(a, plan, terms.data);
  std::vector<int32_t> source, target;
  if (a.scatter) {
    check_slot_memory(a);
    plan.store.slot = rows_of(a.slot);
    plan.store.slot_scale = rows_of(a.slot_scale);
    plan.store.fresh = rows_of(a.fresh);
    if (a.fresh_slots) {
      source = checked_map("fresh_slots", a.fresh_slots, a.fresh.sizes[1]);
      plan.store.source = source.data();
    }
  }
  if (a.row_slots) {
    target = checked_map("row_slots", a.row_slots, a.row_count);
    plan.target = target.data();
  }
  if (a.need_x) plan.updated = new_rows(outputs, kUpdated, a.x, plan.N);
  plan.norm = static_cast<Norm>(a.norm);
  if (plan.norm != Norm::kNone) {
    plan.modulated = new_rows(outputs, kModulated, a.x, a.row_slots ? a.row_count : plan.N);
    plan.shift = vector_of(a.shift, plan.N);
    plan.scale = vector_of(a.scale, plan.N);
    plan.norm_weight = vector_of(a.norm_weight, plan.N);
    plan.norm_bias = vector_of(a.norm_bias, plan.N);
    plan.eps = static_cast<float>(a.eps);
    if (a.row_slots) own_targets(target, plan, a.row_count);
  }
  std::vector<double> error_sums;
  float* errors = nullptr;
  if (a.reference) {
    plan.reference = rows_of(a.reference);
    error_sums.resize(plan.B * plan.N * 3);
    plan.error_sums = error_sums.data();
    const int64_t sizes[] = {plan.B, 3};
    errors = static_cast<float*>(outputs.add(kErrors, float32_dtype(), 2, sizes));
  }
  run(plan, chosen);
  if (errors) sum_errors(plan, errors);
}

void call(StableIValue* stack, uint64_t inputs, uint64_t outputs, bool scatter) {
  const Arguments arguments(stack, inputs, outputs, scatter);
  Outputs results(arguments.x);
  launch(arguments, results);
  results.release(stack);
}

void residual_update(StableIValue* stack, uint64_t inputs, uint64_t outputs) {
  call(stack, inputs, outputs, false);
}

void residual_update_scatter(StableIValue* stack, uint64_t inputs, uint64_t outputs) {
  call(stack, inputs, outputs, true);
}

}  // namespace

}  // namespace fastcache

STABLE_TORCH_LIBRARY_IMPL(fastcache, CPU, library) {
  library.impl("residual_update", &fastcache::residual_update);
  library.impl("residual_update_scatter_", &fastcache::residual_update_scatter);
}

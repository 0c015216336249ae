#include "overlap.h"

#include <cstdlib>

namespace fastcache {

namespace {

// Bytes of one innermost run; everything outside it moves by the strides of dimensions 0 and 1.
int64_t run_of(const Tensor& t) { return t.rank > 2 ? t.sizes[2] * t.element : t.element; }

bool same_layout(const Tensor& a, const Tensor& b) {
  return a.rank == b.rank && a.rank >= 2 && a.element == b.element && a.strides[0] == b.strides[0] &&
         a.strides[1] == b.strides[1] && a.strides[1] > 0;
}

}  // namespace

bool overlap(const Tensor& a, const Tensor& b) {
  if (!a || !b || a.empty() || b.empty()) return false;
  if (a.data + a.extent() <= b.data || b.data + b.extent() <= a.data) return false;
  if (!same_layout(a, b)) return true;
  // Interleaved views of one buffer, such as buffer[:, layer]: exact, by the distance of the runs.
  const int64_t batch = a.strides[0] * a.element, row = a.strides[1] * a.element;
  const int64_t run = run_of(a) > run_of(b) ? run_of(a) : run_of(b);
  for (int64_t i = 1 - b.sizes[0]; i < a.sizes[0]; ++i) {
    const int64_t distance = a.data - b.data + i * batch;
    for (int64_t n = distance / row - 1; n <= distance / row + 1; ++n) {
      if (n > -a.sizes[1] && n < b.sizes[1] && std::llabs(distance - n * row) < run) return true;
    }
  }
  return false;
}

bool overlaps_itself(const Tensor& t) {
  if (t.empty()) return false;
  int64_t run = run_of(t) / t.element;
  int64_t inner = t.strides[1], inner_size = t.sizes[1], outer = t.strides[0], outer_size = t.sizes[0];
  if (inner > outer && outer_size > 1) {
    inner = t.strides[0], inner_size = t.sizes[0], outer = t.strides[1], outer_size = t.sizes[1];
  }
  if (inner_size > 1) {
    if (inner < run) return true;
    run += (inner_size - 1) * inner;
  }
  return outer_size > 1 && outer < run;
}

void check_slot_memory(const Arguments& a) {
  if (overlaps_itself(a.slot))
    fail("slot: its rows share memory; it is written in place and must own its rows, call .contiguous()");
  if (a.slot_scale && overlaps_itself(a.slot_scale))
    fail("slot_scale: its elements share memory; it is written in place, call .contiguous()");
  const struct {
    const char* name;
    const Tensor& tensor;
  } reads[] = {{"x", a.x},
               {"fresh", a.fresh},
               {"fresh_slots", a.fresh_slots},
               {"gates", a.gates},
               {"weights", a.weights},
               {"scales", a.scales},
               {"shift", a.shift},
               {"scale", a.scale},
               {"norm_weight", a.norm_weight},
               {"norm_bias", a.norm_bias},
               {"row_slots", a.row_slots},
               {"reference", a.reference},
               {"slot_scale", a.slot_scale}};
  for (const auto& read : reads) {
    if (overlap(a.slot, read.tensor))
      fail(std::string("slot: is written in place and shares memory with ") + read.name +
           "; give it memory of its own");
    if (&read.tensor != &a.slot_scale && a.slot_scale && overlap(a.slot_scale, read.tensor)) {
      fail(std::string("slot_scale: is written in place and shares memory with ") + read.name +
           "; give it memory of its own");
    }
  }
  for (int64_t j = 0; j < a.feature_count; ++j) {
    if (overlap(a.slot, a.features[j]) || overlap(a.slot_scale, a.features[j])) {
      fail("slot: is written in place and shares memory with features[" + std::to_string(j) +
           "]; give it memory of its own");
    }
  }
}

}  // namespace fastcache

#include "parameters.h"

#include <algorithm>
#include <climits>

namespace fastcache::cuda {

int32_t int32_of(const char* what, int64_t value) {
  if (value > INT_MAX)
    fail(std::string("x: at most 2^31 - 1 ") + what + " on a GPU, got " + std::to_string(value));
  return static_cast<int32_t>(value);
}

namespace {

VectorRows vector_rows(const Tensor& tensor, int64_t tokens, bool packed = false) {
  if (!tensor) return {nullptr, 0, 0, 1, Type::kFloat32};
  const Vector vector = vector_of(tensor, tokens, packed);
  return {vector.data, vector.batch / tensor.element, vector.row / tensor.element,
          static_cast<int32_t>(std::max<int64_t>(vector.span, 1)), tensor.type};
}

SlotMap slot_map(const Tensor& map) {
  if (!map) return {nullptr, 0, 0};
  return {reinterpret_cast<const int32_t*>(map.data), map.strides[0], map.strides[1]};
}

Refresh refresh_of(const Arguments& a) {
  Refresh r{};
  if (!a.scatter) return r;
  r.slot = token_rows(a.slot);
  r.fresh = token_rows(a.fresh);
  r.map = slot_map(a.fresh_slots);
  if (a.slot_scale) {
    r.scale = reinterpret_cast<float*>(a.slot_scale.data);
    r.scale_batch = a.slot_scale.strides[0], r.scale_row = a.slot_scale.strides[1];
  }
  r.fresh_count = int32_of("fresh rows", a.fresh.sizes[1]);
  r.slot_type = a.slot.type, r.fresh_type = a.fresh.type;
  return r;
}

bool all_aligned(const Arguments& a, int64_t width) {
  if (a.x.sizes[2] % width != 0) return false;
  for (const Tensor* t :
       {&a.x, &a.slot, &a.fresh, &a.gates, &a.shift, &a.scale, &a.norm_weight, &a.norm_bias, &a.reference}) {
    if (!aligned(*t, width)) return false;
  }
  return std::all_of(a.features, a.features + a.feature_count,
                     [&](const Tensor& feature) { return aligned(feature, width); });
}

}  // namespace

bool aligned(const Tensor& t, int64_t width) {
  if (!t || t.empty()) return true;
  const int64_t bytes = std::min<int64_t>(16, width * t.element);
  if (reinterpret_cast<uintptr_t>(t.data) % bytes != 0) return false;
  for (int64_t i = 0; i + 1 < t.rank; ++i) {
    if (t.sizes[i] > 1 && t.strides[i] * t.element % bytes != 0) return false;
  }
  return true;
}

TokenRows token_rows(const Tensor& tensor) {
  if (!tensor) return {nullptr, 0, 0};
  return {tensor.data, tensor.strides[0], tensor.strides[1]};
}

Common common_of(const Arguments& a) {
  Common p{};
  p.B = int32_of("samples", a.x.sizes[0]), p.N = int32_of("tokens", a.x.sizes[1]),
  p.D = int32_of("channels", a.x.sizes[2]);
  p.term_count = static_cast<int32_t>(a.term_count());
  p.position = static_cast<int32_t>(!a.scatter       ? a.term_count()
                                    : a.position < 0 ? a.feature_count
                                                     : a.position);
  p.x = token_rows(a.x), p.x_type = a.x.type;
  p.gates = vector_rows(a.gates, p.N, static_cast<bool>(a.gate_index));
  if (a.gate_index) {
    p.gate_index = reinterpret_cast<const int32_t*>(a.gate_index.data),
    p.gate_index_stride = a.gate_index.strides[0];
    p.gate_pack = a.gates.strides[0], p.gate_count = int32_of("gates", a.gates.sizes[0]);
  }
  if (a.weights)
    p.weights = reinterpret_cast<const float*>(a.weights.data), p.weight_stride = a.weights.strides[0];
  if (a.scales) {
    p.scales = reinterpret_cast<const float*>(a.scales.data);
    p.scales_term = a.scales.strides[0], p.scales_batch = a.scales.strides[1],
    p.scales_row = a.scales.strides[2];
  }
  p.feature_type = a.feature_count ? a.features[0].type : a.x.type;
  p.refresh = refresh_of(a);
  p.norm = static_cast<Norm>(a.norm);
  p.target = slot_map(a.row_slots);
  p.target_count = int32_of("packed rows", a.row_slots ? a.row_count : a.x.sizes[1]);
  p.vectors[kNormWeight] = vector_rows(a.norm_weight, p.N),
  p.vectors[kNormBias] = vector_rows(a.norm_bias, p.N);
  p.vectors[kScale] = vector_rows(a.scale, p.N), p.vectors[kShift] = vector_rows(a.shift, p.N);
  p.eps = static_cast<float>(a.eps);
  p.reference = token_rows(a.reference), p.reference_type = a.reference ? a.reference.type : Type::kFloat32;
  return p;
}

int width_of(const Arguments& a) {
  if (a.x.element == 2 && all_aligned(a, 8)) return 8;
  return all_aligned(a, 4) ? 4 : 1;
}

bool needs_rows(const Arguments& a) {
  return a.norm != 0 || a.reference || (a.scatter && a.slot.type == Type::kFloat8);
}

}  // namespace fastcache::cuda

// Argument checks of both operators; the texts are those of fastcache/backends/checks.py.
// Nothing is formatted unless a check fails: a passing call pays for comparisons only.
#include "checks.h"

namespace fastcache {

std::string number(int64_t value) { return std::to_string(value); }

std::string indexed(const char* name, int64_t j) {
  std::string label = name;
  if (j >= 0) label.append("[").append(number(j)).append("]");
  return label;
}

namespace {

std::string strides_text(const Tensor& tensor) {
  std::string out = "[";
  for (int64_t i = 0; i < tensor.rank; ++i) out.append(i ? ", " : "").append(number(tensor.strides[i]));
  return out + "]";
}

bool is_float(Type type) {
  return type == Type::kFloat32 || type == Type::kFloat16 || type == Type::kBFloat16;
}

}  // namespace

void check_dtype(const char* name, int64_t j, const Tensor& t, Type expected) {
  if (t.type != expected) fail(indexed(name, j) + ": expected " + text(expected) + ", got " + text(t.type));
}

void check_device(const char* name, int64_t j, const Tensor& t, const Tensor& x) {
  if (t.device_type == x.device_type && t.device_index == x.device_index) return;
  fail(indexed(name, j) + ": expected on the device of x, got a tensor on another device");
}

void check_floating(const char* name, int64_t j, const Tensor& t, bool compressed) {
  if (is_float(t.type) || (compressed && t.type == Type::kFloat8)) return;
  if (t.type == Type::kFloat64)
    fail(indexed(name, j) +
         ": torch.float64 is computed by the eager backend only; use fastcache.ops or "
         "FASTCACHE_BACKEND=eager");
  fail(indexed(name, j) + ": expected float32, float16 or bfloat16" +
       (compressed ? " or float8_e4m3fn" : "") + ", got " + text(t.type));
}

void check_unit_stride(const char* name, int64_t j, const Tensor& t) {
  const int64_t last = t.rank - 1;
  if (t.sizes[last] <= 1 || t.strides[last] == 1 || t.empty()) return;
  fail(indexed(name, j) +
       ": the last dimension must have stride 1 (nothing is copied behind your back; call .contiguous()), "
       "got strides " +
       strides_text(t));
}

namespace {

class Checker {
 public:
  explicit Checker(const Arguments& arguments) : a_(arguments), x_(arguments.x) {}

  void stream() {
    if (x_.rank != 3) fail("x: expected [B, N, D], got " + text(x_));
    floating("x", -1, x_, false);
    unit_stride("x", -1, x_);
    B_ = x_.sizes[0];
    N_ = x_.sizes[1];
    D_ = x_.sizes[2];
  }

  void terms() {
    const int64_t count = a_.term_count();
    if (count > kMaxTerms)
      fail("features: at most " + number(kMaxTerms) + " terms in one call, got " + number(count));
    for (int64_t j = 0; j < a_.feature_count; ++j) {
      const Tensor& feature = a_.features[j];
      same_shape("features", j, feature);
      floating("features", j, feature, true);
      if (feature.dtype != a_.features[0].dtype) {
        fail(indexed("features", j) + ": all features have one dtype, expected " + text(a_.features[0].type) +
             ", got " + text(feature.type));
      }
      device("features", j, feature);
      unit_stride("features", j, feature);
    }
    if (a_.gate_index) {
      if (!a_.gates) fail("gates: gate_index was given without gates");
      shape("gate_index", a_.gate_index, count);
      dtype("gate_index", a_.gate_index, Type::kInt32);
      device("gate_index", -1, a_.gate_index);
      if (a_.gates.rank < 2 || a_.gates.sizes[0] == 0)
        fail("gates: expected packed [G, *vector] beside gate_index, got " + text(a_.gates));
    }
    if (a_.gates) vector("gates", a_.gates, static_cast<bool>(a_.gate_index));
    if (a_.weights) {
      shape("weights", a_.weights, count);
      dtype("weights", a_.weights, Type::kFloat32);
      device("weights", -1, a_.weights);
    }
    if (a_.scales) {
      shape("scales", a_.scales, count, B_, N_);
      dtype("scales", a_.scales, Type::kFloat32);
      device("scales", -1, a_.scales);
    }
  }

  void epilogues() {
    if (a_.norm < 0 || a_.norm > 3)
      fail("norm: expected 0 (none), 1 (LayerNorm), 2 (RMSNorm) or 3 (identity), got " + number(a_.norm));
    modulation("shift", a_.shift);
    modulation("scale", a_.scale);
    affine("norm_weight", a_.norm_weight);
    affine("norm_bias", a_.norm_bias);
    if (a_.row_count < 0) fail("row_count: expected 0 or more, got " + number(a_.row_count));
    if (a_.row_slots) {
      if (a_.norm == 0) fail("row_slots: was given without norm");
      slots("row_slots", a_.row_slots);
    }
    if (a_.reference) {
      same_shape("reference", -1, a_.reference);
      floating("reference", -1, a_.reference, false);
      device("reference", -1, a_.reference);
      unit_stride("reference", -1, a_.reference);
    }
  }

  void stored() {
    const Tensor& slot = a_.slot;
    const Tensor& fresh = a_.fresh;
    if (a_.position < -1 || a_.position > a_.feature_count)
      fail("position: expected -1.." + number(a_.feature_count) + ", got " + number(a_.position));
    same_shape("slot", -1, slot);
    device("slot", -1, slot);
    if (fresh.rank != 3 || fresh.sizes[0] != B_ || fresh.sizes[2] != D_) {
      fail("fresh: expected [" + number(B_) + ", K, " + number(D_) + "], got " + text(fresh));
    }
    device("fresh", -1, fresh);
    unit_stride("fresh", -1, fresh);
    unit_stride("slot", -1, slot);
    floating("fresh", -1, fresh, false);
    floating("slot", -1, slot, true);
    if (a_.fresh_slots) {
      slots("fresh_slots", a_.fresh_slots);
    } else if (fresh.sizes[1] != N_) {
      fail("fresh: expected [" + number(B_) + ", " + number(N_) + ", " + number(D_) +
           "] when fresh_slots is None, got " + text(fresh));
    }
    const bool compressed = slot.type == Type::kFloat8;
    if (compressed && !a_.slot_scale)
      fail("slot_scale: a float8 slot needs [B, N] float32 row scales, got None");
    if (!compressed && a_.slot_scale)
      fail(std::string("slot_scale: only a float8_e4m3fn slot has row scales, got slot of ") +
           text(slot.type));
    if (a_.slot_scale) {
      shape("slot_scale", a_.slot_scale, B_, N_);
      dtype("slot_scale", a_.slot_scale, Type::kFloat32);
      device("slot_scale", -1, a_.slot_scale);
    }
  }

 private:
  void same_shape(const char* name, int64_t j, const Tensor& t) const {
    if (t.rank != 3 || t.sizes[0] != B_ || t.sizes[1] != N_ || t.sizes[2] != D_) {
      fail(indexed(name, j) + ": expected " + text(x_) + ", got " + text(t));
    }
  }

  void shape(const char* name, const Tensor& t, int64_t a, int64_t b = -1, int64_t c = -1) const {
    const int64_t rank = b < 0 ? 1 : c < 0 ? 2 : 3;
    if (t.rank == rank && t.sizes[0] == a && (rank < 2 || t.sizes[1] == b) && (rank < 3 || t.sizes[2] == c))
      return;
    std::string expected = name;
    expected.append(": expected [").append(number(a));
    if (rank > 1) expected.append(", ").append(number(b));
    if (rank > 2) expected.append(", ").append(number(c));
    fail(expected + "], got " + text(t));
  }

  void slots(const char* name, const Tensor& t) const {
    shape(name, t, B_, N_);
    dtype(name, t, Type::kInt32);
    device(name, -1, t);
  }

  void dtype(const char* name, const Tensor& t, Type expected) const { check_dtype(name, -1, t, expected); }

  void device(const char* name, int64_t j, const Tensor& t) const { check_device(name, j, t, x_); }

  void floating(const char* name, int64_t j, const Tensor& t, bool compressed) const {
    check_floating(name, j, t, compressed);
  }

  void unit_stride(const char* name, int64_t j, const Tensor& t) const { check_unit_stride(name, j, t); }

  void vector(const char* name, const Tensor& t, bool packed) const {
    const int64_t* sizes = t.sizes + (packed ? 1 : 0);
    const int64_t rank = t.rank - (packed ? 1 : 0);
    bool fits = rank >= 1 && rank <= 3 && sizes[rank - 1] == D_;
    if (fits && rank > 1) fits = sizes[0] == 1 || sizes[0] == B_;
    if (fits && rank > 2) fits = sizes[1] == 1 || sizes[1] == N_ || (sizes[1] > 0 && N_ % sizes[1] == 0);
    if (!fits) {
      fail(std::string(name) + ": expected " + (packed ? "[G, ...] of " : "") +
           "[D], [B, D], [B, 1, D], [B, F, D] (F divides N) or [B, N, D] for x " + text(x_) + ", got " +
           text(t));
    }
    floating(name, -1, t, false);
    device(name, -1, t);
    unit_stride(name, -1, t);
  }

  void modulation(const char* name, const Tensor& t) const {
    if (!t) return;
    if (a_.norm == 0) fail(std::string(name) + ": was given without norm");
    vector(name, t, false);
  }

  void affine(const char* name, const Tensor& t) const {
    if (!t) return;
    if (a_.norm != 1 && a_.norm != 2) fail(std::string(name) + ": was given without a norm to follow");
    shape(name, t, D_);
    vector(name, t, false);
  }

  const Arguments& a_;
  const Tensor& x_;
  int64_t B_ = 0, N_ = 0, D_ = 0;
};

}  // namespace

void Arguments::check() const {
  Checker checker(*this);
  checker.stream();
  checker.terms();
  checker.epilogues();
  if (scatter) {
    checker.stored();
  } else if (reference && feature_count == 0) {
    fail("reference: needs at least one feature to compare with");
  }
}

}  // namespace fastcache

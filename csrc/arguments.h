// The arguments of both residual operators, read from PyTorch's boxed calling convention and checked.
// Shared by the CPU and the CUDA launcher; checks follow fastcache/backends/checks.py. The operators
// on tokens are called once a step, not once a block: boxed.h reads theirs in a shorter way.
//
// Reading the stack by hand instead of through TORCH_BOX saves a shared_ptr per tensor and a
// vector per list; with 57 tensors in a call that is a third of the dispatch cost.
#pragma once

#include <memory>
#include <string>

#include <torch/csrc/stable/library.h>

#include "fastcache/plan.h"

namespace fastcache {

// A borrowed view of a tensor: what the shim says about it, asked for once.
struct Tensor {
  AtenTensorHandle handle = nullptr;
  char* data = nullptr;
  const int64_t* sizes = nullptr;
  const int64_t* strides = nullptr;
  int64_t rank = 0;
  int64_t element = 1;  // bytes
  Type type = Type::kOther;
  int32_t dtype = 0;
  int32_t device_type = 0;
  int32_t device_index = 0;

  explicit operator bool() const { return handle != nullptr; }
  bool empty() const;
  int64_t extent() const;  // bytes from the first to one past the last element
};

void read(Tensor& tensor, AtenTensorHandle handle, bool written = false);  // takes ownership of the handle
void release(Tensor& tensor);

struct Arguments {
  Tensor x, slot, fresh, fresh_slots, slot_scale;
  Tensor gates, gate_index, weights, scales;
  Tensor shift, scale, norm_weight, norm_bias, row_slots, reference;
  Tensor* features = nullptr;
  int64_t feature_count = 0;
  int64_t position = -1, norm = 0, row_count = 0;
  double eps = 0.0;
  bool need_x = true;
  bool scatter = false;

  int64_t term_count() const { return feature_count + (scatter ? 1 : 0); }

  Arguments(StableIValue* stack, uint64_t inputs, uint64_t outputs,
            bool scatter);  // takes ownership of the stack
  ~Arguments();
  Arguments(const Arguments&) = delete;
  Arguments& operator=(const Arguments&) = delete;

  void check() const;  // shapes, dtypes, devices, strides; no values

 private:
  static constexpr int64_t kInline = 16;
  void release_all();

  Tensor few_[kInline];
  std::unique_ptr<Tensor[]> many_;
};

// Converts checked tensors to the layouts of plan.h.
Rows rows_of(const Tensor& tensor);
Vector vector_of(const Tensor& tensor, int64_t tokens, bool packed = false);

// The outputs of an operator on their way to the caller; freed if something throws before.
class Outputs {
 public:
  explicit Outputs(const Tensor& x, int count = 3) : x_(x), count_(count) {}
  ~Outputs();
  Outputs(const Outputs&) = delete;
  Outputs& operator=(const Outputs&) = delete;

  // Allocates output number `index`, contiguous, on the device of x; returns its memory.
  void* add(int index, int32_t dtype, int64_t rank, const int64_t* sizes);
  void release(StableIValue* stack);  // those never added are empty tensors of shape [0]

 private:
  const Tensor& x_;
  int count_;
  AtenTensorHandle handles_[3] = {};
};

constexpr int kUpdated = 0, kModulated = 1, kErrors = 2;

int32_t float32_dtype();
int32_t int32_dtype();

[[noreturn]] void fail(const std::string& message);
void must(AOTITorchError code, const char* call);
#define FASTCACHE_MUST(call) ::fastcache::must((call), #call)
std::string text(const Tensor& tensor);  // "[2, 256, 1152]"
const char* text(Type type);

}  // namespace fastcache

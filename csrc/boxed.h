// Reads the boxed arguments of any operator: position by position, as its schema orders them.
#pragma once

#include <vector>

#include "arguments.h"

namespace fastcache {

// Owns every handle of the call from the first line on, so that an error frees them all.
class Boxed {
 public:
  // One letter per argument: t Tensor, w Tensor(a!), o Tensor?, l Tensor[], i int, f float or float?, b bool.
  Boxed(const StableIValue* stack, uint64_t inputs, uint64_t outputs, const char* signature,
        uint64_t expected_outputs);
  ~Boxed();
  Boxed(const Boxed&) = delete;
  Boxed& operator=(const Boxed&) = delete;

  const Tensor& tensor(int position) const { return tensors_[starts_[position]]; }
  const Tensor* list(int position) const { return tensors_.data() + starts_[position]; }
  int64_t length(int position) const { return starts_[position + 1] - starts_[position]; }
  int64_t integer(int position) const { return torch::stable::detail::to<int64_t>(values_[position]); }
  double real(int position) const { return torch::stable::detail::to<double>(values_[position]); }
  bool flag(int position) const { return torch::stable::detail::to<bool>(values_[position]); }

 private:
  void release_all();

  std::vector<Tensor> tensors_;  // in order; an absent optional is an empty Tensor
  std::vector<int64_t> starts_;  // of each position in tensors_, and the end
  const StableIValue* values_;
};

}  // namespace fastcache

// The arguments of the operators that score and choose tokens, and their checks, with the texts of
// fastcache/backends/token_checks.py. Shared by the CPU and the CUDA launchers.
#pragma once

#include "boxed.h"
#include "checks.h"

namespace fastcache {

struct SelectArguments {
  SelectArguments(const StableIValue* stack, uint64_t inputs, uint64_t outputs);
  void check() const;         // all but the values of counts
  void check_counts() const;  // on a CPU, where reading them is free

  Boxed boxed;
  const Tensor &score, &age, &counts;
  int64_t capacity, width, cell;
  double age_weight, bonus;
  bool normalize;
};

struct RowScoreArguments {
  RowScoreArguments(const StableIValue* stack, uint64_t inputs, uint64_t outputs);
  void check() const;

  Boxed boxed;
  const Tensor &x, &reference;
};

struct ValueNormArguments {
  ValueNormArguments(const StableIValue* stack, uint64_t inputs, uint64_t outputs);
  void check() const;

  Boxed boxed;
  const Tensor& v;
};

struct ErrorArguments {
  ErrorArguments(const StableIValue* stack, uint64_t inputs, uint64_t outputs);
  void check() const;
  const Tensor& like() const { return newest[0]; }  // checked: there is at least one

  Boxed boxed;
  const Tensor *newest, *earlier;
  int64_t layers, earlier_count;
};

}  // namespace fastcache

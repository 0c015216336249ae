// The operators on tokens in PyTorch's boxed calling convention.
#pragma once

#include <torch/csrc/stable/library.h>

namespace fastcache::cuda {

void select_tokens(StableIValue* stack, uint64_t inputs, uint64_t outputs);
void row_score(StableIValue* stack, uint64_t inputs, uint64_t outputs);
void value_norm(StableIValue* stack, uint64_t inputs, uint64_t outputs);
void relative_error(StableIValue* stack, uint64_t inputs, uint64_t outputs);

}  // namespace fastcache::cuda

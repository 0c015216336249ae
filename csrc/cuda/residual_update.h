// The operators in PyTorch's boxed calling convention.
#pragma once

#include <torch/csrc/stable/library.h>

namespace fastcache::cuda {

void residual_update(StableIValue* stack, uint64_t inputs, uint64_t outputs);
void residual_update_scatter(StableIValue* stack, uint64_t inputs, uint64_t outputs);

}  // namespace fastcache::cuda

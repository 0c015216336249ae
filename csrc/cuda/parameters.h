// From the operators' arguments to the parameters of a launch; no CUDA here.
#pragma once

#include <vector>

#include "../arguments.h"
#include "fastcache/cuda/parameters.h"

namespace fastcache::cuda {

// All but the outputs, the workspace and the error flag.
Common common_of(const Arguments& arguments);

TokenRows token_rows(const Tensor& tensor);

int32_t int32_of(const char* what, int64_t value);  // throws where a GPU's 32-bit index ends

// Do all runs of `width` values start where a load of them may: at a multiple of their size, up to 16 bytes?
bool aligned(const Tensor& tensor, int64_t width);

// Columns that can be read at once in all tensors of the call: 8, 4 or 1, at most 16 bytes of x.
int width_of(const Arguments& arguments);

// Whether the call needs whole rows: row_kernel, not sum_kernel.
bool needs_rows(const Arguments& arguments);

}  // namespace fastcache::cuda

// From checked arguments to launches, without a framework header: one source per dtype of x is
// compiled from launch.cuh, by nvcc for GPUs and by any compiler for the emulator in tests/.
#pragma once

#include "fastcache/cuda/parameters.h"

namespace fastcache::cuda {

struct Call {
  Common common;
  const TokenRows* features;
  int32_t feature_count;
  int width;  // columns that can be read at once in all tensors
  int32_t device;
  int multiprocessors;
  void* stream;
};

// The sum and the refresh of a slot.
template <Type X>
void launch_sum(const Call& call);

// The same over whole rows, with norm, modulation, packed rows, error sums and float8 slots.
template <Type X>
void launch_rows(const Call& call);

// errors [B, 3] from row_errors [B, N, 3].
void launch_errors(const float* row_errors, float* errors, int32_t B, int32_t N, void* stream);

}  // namespace fastcache::cuda

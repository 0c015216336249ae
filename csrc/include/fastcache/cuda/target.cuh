// What the kernels need of their compiler. Under nvcc these are CUDA's own words; elsewhere
// tests/emulator/block_emulator.h, on the include path, stands for the GPU.
#pragma once

#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#define FASTCACHE_DEVICE __device__ __forceinline__
#else
#include "block_emulator.h"
#define FASTCACHE_DEVICE inline
#define __grid_constant__
#endif

namespace fastcache::cuda {

// The same value, of which the compiler no longer knows where it came from.
FASTCACHE_DEVICE int opaque(int value) {
#ifdef __CUDACC__
  asm volatile("" : "+r"(value));
#endif
  return value;
}

}  // namespace fastcache::cuda

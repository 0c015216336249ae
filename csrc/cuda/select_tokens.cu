// Instantiations of the selection kernel: short rows, rows that fit into shared memory, all others.
#include "fastcache/cuda/select_tokens.cuh"
#include "launch.cuh"
#include "token_launch.h"

namespace fastcache::cuda {

namespace {

constexpr int kShortRow = 2048, kSharedRow = 9216;  // 8 KB of keys; 36 of the 48 KB that need no opt-in

}  // namespace

void launch_select(const Selection& p, int64_t rows, void* stream) {
  const dim3 grid(static_cast<unsigned>(rows));
  if (p.N <= kShortRow) return launch(select_kernel<256, kShortRow>, grid, 256, stream, p);
  if (p.N <= kSharedRow) return launch(select_kernel<1024, kSharedRow>, grid, 1024, stream, p);
  launch(select_kernel<1024, 0>, grid, 1024, stream, p);
}

}  // namespace fastcache::cuda

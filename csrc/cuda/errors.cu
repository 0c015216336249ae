// The second half of the error sums: rows to samples.
#include "fastcache/cuda/errors.cuh"
#include "launch.cuh"

namespace fastcache::cuda {

void launch_errors(const float* row_errors, float* errors, int32_t B, int32_t N, void* stream) {
  launch(error_kernel, dim3(static_cast<unsigned>(B)), kErrorThreads, stream, row_errors, errors, N);
}

}  // namespace fastcache::cuda

// Gives PyTorch the operators for CUDA tensors.
#include "residual_update.h"

STABLE_TORCH_LIBRARY_IMPL(fastcache, CUDA, library) {
  library.impl("residual_update", &fastcache::cuda::residual_update);
  library.impl("residual_update_scatter_", &fastcache::cuda::residual_update_scatter);
}

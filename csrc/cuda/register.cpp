// Gives PyTorch the operators for CUDA tensors.
#include "residual_update.h"
#include "token_operators.h"

STABLE_TORCH_LIBRARY_IMPL(fastcache, CUDA, library) {
  library.impl("residual_update", &fastcache::cuda::residual_update);
  library.impl("residual_update_scatter_", &fastcache::cuda::residual_update_scatter);
  library.impl("select_tokens_", &fastcache::cuda::select_tokens);
  library.impl("row_score", &fastcache::cuda::row_score);
  library.impl("value_norm", &fastcache::cuda::value_norm);
  library.impl("relative_error", &fastcache::cuda::relative_error);
}

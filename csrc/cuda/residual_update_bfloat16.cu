// The kernels for a bfloat16 residual stream.
#include "launch.cuh"

namespace fastcache::cuda {

template void launch_sum<Type::kBFloat16>(const Call&);
template void launch_rows<Type::kBFloat16>(const Call&);

}  // namespace fastcache::cuda

// The kernels for a float16 residual stream.
#include "launch.cuh"

namespace fastcache::cuda {

template void launch_sum<Type::kFloat16>(const Call&);
template void launch_rows<Type::kFloat16>(const Call&);

}  // namespace fastcache::cuda

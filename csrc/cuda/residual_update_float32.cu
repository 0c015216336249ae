// The kernels for a float32 residual stream.
#include "launch.cuh"

namespace fastcache::cuda {

template void launch_sum<Type::kFloat32>(const Call&);
template void launch_rows<Type::kFloat32>(const Call&);

}  // namespace fastcache::cuda

// Kernels for x86-64-v3: AVX2, FMA, F16C, BMI (the flags are in CMakeLists.txt).
#include "capability.h"
#include "residual_update_rows.h"

namespace fastcache {

const Kernels kernels_avx2 = {"avx2", residual_update_rows};

}  // namespace fastcache

// Kernels for x86-64-v4: AVX-512 F, BW, CD, DQ, VL (the flags are in CMakeLists.txt).
#include "capability.h"
#include "residual_update_rows.h"

namespace fastcache {

const Kernels kernels_avx512 = {"avx512", residual_update_rows};

}  // namespace fastcache

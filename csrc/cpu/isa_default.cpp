// Kernels for the compiler's baseline for this processor family (the flags are in CMakeLists.txt).
#include "capability.h"
#include "residual_update_rows.h"

namespace fastcache {

const Kernels kernels_default = {"default", residual_update_rows};

}  // namespace fastcache

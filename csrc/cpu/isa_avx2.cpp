// Kernels for x86-64-v3: AVX2, FMA, F16C, BMI (the flags are in CMakeLists.txt).
#include "attention_received_heads.h"
#include "capability.h"
#include "relative_error_rows.h"
#include "residual_update_rows.h"
#include "row_score_rows.h"
#include "select_tokens_rows.h"

namespace fastcache {

const Kernels kernels_avx2 = {"avx2",     residual_update_rows, select_rows,
                              row_scores, error_blocks,         received_heads};

}  // namespace fastcache

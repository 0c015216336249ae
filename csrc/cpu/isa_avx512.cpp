// Kernels for x86-64-v4: AVX-512 F, BW, CD, DQ, VL (the flags are in CMakeLists.txt).
#include "attention_received_heads.h"
#include "capability.h"
#include "relative_error_rows.h"
#include "residual_update_rows.h"
#include "row_score_rows.h"
#include "select_tokens_rows.h"

namespace fastcache {

const Kernels kernels_avx512 = {"avx512",   residual_update_rows, select_rows,
                                row_scores, error_blocks,         received_heads};

}  // namespace fastcache

// From checked arguments of the operators on tokens to launches, without a framework header (see launch.h).
#pragma once

#include "fastcache/cuda/tokens.h"

namespace fastcache::cuda {

void launch_select(const Selection& selection, int64_t rows, void* stream);

// width: columns that can be read at once, the full 16 bytes or 1.
void launch_row_score(const Scores& scores, Type x, int width, void* stream);
void launch_value_norm(const Scores& scores, Type v, int width, void* stream);

// `layers` layers of one launch, tensors in the order of Comparisons; `blocks` of each layer.
void launch_relative_error(const Comparison& comparison, const TokenRows* tensors, int32_t layers,
                           int32_t blocks, Type x, int width, void* stream);
void launch_relative_error_finish(const Comparison& comparison, float* errors, int32_t blocks,
                                  int32_t first_layer, int32_t layers, int32_t all_layers, void* stream);

}  // namespace fastcache::cuda

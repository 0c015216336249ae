// Does a tensor that is written share memory with one that is read?
#pragma once

#include "arguments.h"

namespace fastcache {

bool overlap(const Tensor& a, const Tensor& b);

// True if two elements of one [B, N, ...] tensor share memory (an expanded or folded view).
bool overlaps_itself(const Tensor& tensor);

// Fails if the slot or its row scales, which are written in place, share memory with an input or with
// themselves.
void check_slot_memory(const Arguments& arguments);

}  // namespace fastcache

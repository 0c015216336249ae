// Checks of one tensor that the argument checks of all operators are made of.
// j >= 0 numbers the tensor in its list: "features[3]".
#pragma once

#include "arguments.h"

namespace fastcache {

std::string number(int64_t value);
std::string indexed(const char* name, int64_t j);

void check_dtype(const char* name, int64_t j, const Tensor& t, Type expected);
void check_device(const char* name, int64_t j, const Tensor& t, const Tensor& x);
void check_floating(const char* name, int64_t j, const Tensor& t, bool compressed);  // compressed: float8 too
void check_unit_stride(const char* name, int64_t j, const Tensor& t);

}  // namespace fastcache

// Registers every operator of schema.def with PyTorch, and exports the digest of that file: the
// Python side compares it before it uses this library, so a stale build is an error, not a crash.
#include <torch/csrc/stable/library.h>

#define FASTCACHE_OP(schema) library.def(schema);
STABLE_TORCH_LIBRARY(fastcache, library) {
#include "schema.def"
}
#undef FASTCACHE_OP

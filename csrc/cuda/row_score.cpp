// row_score and value_norm on a GPU: checked arguments become the parameters of one launch.
#include "../token_checks.h"
#include "config.h"
#include "fastcache/cuda/tokens.h"
#include "parameters.h"
#include "runtime.h"
#include "token_launch.h"
#include "token_operators.h"

namespace fastcache {

namespace {

// 16 bytes of x at once, if all tensors of the call allow it; else single values.
int load_width(const Tensor& x, const Tensor& reference) {
  const int width = cuda::full_width(x.type);
  return x.sizes[x.rank - 1] % width == 0 && cuda::aligned(x, width) && cuda::aligned(reference, width)
             ? width
             : 1;
}

// Lanes that own a head of `runs` loads: the power of two that holds it, at most a warp.
int32_t lanes_of(int64_t runs) {
  int32_t lanes = 1;
  while (lanes < 32 && lanes < runs) lanes *= 2;
  return lanes;
}

template <class Launch>
void run(StableIValue* stack, const Tensor& x, cuda::Scores p, int64_t tokens, const Launch& launch) {
  const cuda::DeviceScope scope(x.device_index);
  Outputs results(x, 1);
  p.B = cuda::int32_of("samples", x.sizes[0]), p.N = cuda::int32_of("tokens", tokens),
  p.D = cuda::int32_of("channels", x.sizes[x.rank - 1]);
  const int64_t sizes[] = {p.B, p.N};
  p.out = static_cast<float*>(results.add(0, float32_dtype(), 2, sizes));
  if (p.B > 0 && p.N > 0) launch(p, cuda::current_stream(x.device_index));
  results.release(stack);
}

}  // namespace

void cuda::row_score(StableIValue* stack, uint64_t inputs, uint64_t outputs) {
  const RowScoreArguments a(stack, inputs, outputs);
  a.check();
  Scores p{};
  p.x = token_rows(a.x), p.reference = token_rows(a.reference);
  p.compare = static_cast<bool>(a.reference), p.reference_type = a.reference ? a.reference.type : a.x.type;
  run(stack, a.x, p, a.x.sizes[1], [&](const Scores& scores, void* stream) {
    launch_row_score(scores, a.x.type, load_width(a.x, a.reference), stream);
  });
}

void cuda::value_norm(StableIValue* stack, uint64_t inputs, uint64_t outputs) {
  const ValueNormArguments a(stack, inputs, outputs);
  a.check();
  const int width = load_width(a.v, Tensor());
  Scores p{};
  p.x = {a.v.data, a.v.strides[0], a.v.strides[2]};
  p.heads = int32_of("heads", a.v.sizes[1]), p.head = a.v.strides[1],
  p.lanes = lanes_of(a.v.sizes[3] / width);
  run(stack, a.v, p, a.v.sizes[2],
      [&](const Scores& scores, void* stream) { launch_value_norm(scores, a.v.type, width, stream); });
}

}  // namespace fastcache

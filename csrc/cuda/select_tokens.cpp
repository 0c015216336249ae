// select_tokens_ on a GPU: one launch, nothing waits for it. Counts live on the device, so that a
// captured graph may change them; the kernel clamps and reports those out of range.
#include "../token_checks.h"
#include "fastcache/cuda/tokens.h"
#include "parameters.h"
#include "runtime.h"
#include "token_launch.h"
#include "token_operators.h"

namespace fastcache {

namespace {

cuda::Selection selection_of(const SelectArguments& a) {
  cuda::Selection p{};
  p.N = cuda::int32_of("tokens", a.score.sizes[1]),
  p.capacity = cuda::int32_of("columns of the index", a.capacity);
  p.score = reinterpret_cast<const float*>(a.score.data);
  p.score_row = a.score.strides[0], p.score_token = a.score.strides[1];
  p.age = reinterpret_cast<int32_t*>(a.age.data);
  p.age_row = a.age.strides[0], p.age_token = a.age.strides[1];
  p.counts = reinterpret_cast<const int32_t*>(a.counts.data);
  p.counts_stride = a.counts.strides[0];
  p.age_weight = static_cast<float>(a.age_weight), p.bonus = static_cast<float>(a.bonus);
  p.aged = a.age_weight != 0.0, p.normalize = a.normalize;
  p.width = static_cast<int32_t>(a.width), p.cell = static_cast<int32_t>(a.cell);
  return p;
}

}  // namespace

void cuda::select_tokens(StableIValue* stack, uint64_t inputs, uint64_t outputs) {
  const SelectArguments a(stack, inputs, outputs);
  a.check();
  const DeviceScope scope(a.score.device_index);
  Outputs results(a.score, 2);
  Selection p = selection_of(a);
  const int64_t rows = int32_of("rows", a.score.sizes[0]), index_sizes[] = {rows, a.capacity};
  p.slots = static_cast<int32_t*>(results.add(0, int32_dtype(), 2, a.score.sizes));
  p.index = static_cast<int32_t*>(results.add(1, int32_dtype(), 2, index_sizes));
  p.error_flag = error_flag(a.score.device_index);
  if (rows > 0) launch_select(p, rows, current_stream(a.score.device_index));
  results.release(stack);
}

}  // namespace fastcache

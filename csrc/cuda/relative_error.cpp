// relative_error on a GPU: two launches for as many layers as one table of tensors holds (all of them,
// up to 256 layers with 3 look-aheads). Nothing waits for the GPU.
#include <algorithm>
#include <vector>

#include "../token_checks.h"
#include "config.h"
#include "fastcache/cuda/tokens.h"
#include "parameters.h"
#include "runtime.h"
#include "token_launch.h"
#include "token_operators.h"

namespace fastcache {

namespace {

constexpr int64_t kRunsForLongThreads = int64_t(4)
                                        << 20;  // of all layers: below, more blocks fill the GPU better

int load_width(const ErrorArguments& a) {
  const int width = cuda::full_width(a.like().type);
  const auto fits = [&](const Tensor& tensor) { return cuda::aligned(tensor, width); };
  const bool all = std::all_of(a.newest, a.newest + a.layers, fits) &&
                   std::all_of(a.earlier, a.earlier + a.earlier_count, fits);
  return all && a.like().sizes[2] % width == 0 ? width : 1;
}

bool contiguous(const Tensor& t) {
  return (t.sizes[1] <= 1 || t.strides[1] == t.sizes[2]) &&
         (t.sizes[0] <= 1 || t.strides[0] == t.sizes[1] * t.sizes[2]);
}

// Thread blocks of a layer: by sizes alone, so that equal calls add in an equal order on every GPU.
int32_t blocks_of(int64_t runs, int64_t layers) {
  const int64_t iterations = runs * layers >= kRunsForLongThreads ? 4 : 1,
                runs_a_block = cuda::kRelativeThreads * cuda::kRelativeRuns * iterations;
  return static_cast<int32_t>(std::clamp<int64_t>((runs + runs_a_block - 1) / runs_a_block, 1, 1 << 16));
}

void run(const ErrorArguments& a, Outputs& results) {
  const Tensor& like = a.like();
  cuda::Comparison p{};
  p.N = cuda::int32_of("tokens", like.sizes[1]), p.D = cuda::int32_of("channels", like.sizes[2]);
  p.elements = like.sizes[0] * like.sizes[1] * like.sizes[2];
  p.lookaheads = static_cast<int32_t>(a.earlier_count / a.layers);
  p.dense = std::all_of(a.newest, a.newest + a.layers, contiguous) &&
            std::all_of(a.earlier, a.earlier + a.earlier_count, contiguous);
  const int64_t sizes[] = {p.lookaheads, a.layers};
  float* errors = static_cast<float*>(results.add(0, float32_dtype(), 2, sizes));
  if (p.lookaheads == 0) return;

  const int width = load_width(a);
  const int32_t most = cuda::kManyTensors / (1 + p.lookaheads), layers = static_cast<int32_t>(a.layers),
                blocks = blocks_of(p.elements / width, layers);
  const int64_t groups = (p.lookaheads + cuda::kLookaheads - 1) / cuda::kLookaheads;
  const int64_t floats = 2 * std::min(most, layers) * groups * blocks * (1 + cuda::kLookaheads);
  Outputs workspace(like, 1);  // PyTorch's allocator hands it out again in stream order
  p.partials = static_cast<double*>(workspace.add(0, float32_dtype(), 1, &floats));
  void* stream = cuda::current_stream(like.device_index);
  std::vector<cuda::TokenRows> tensors;
  for (int32_t first = 0; first < layers; first += most) {
    const int32_t count = std::min(most, layers - first);
    tensors.clear();
    for (int32_t l = first; l < first + count; ++l) {
      tensors.push_back(cuda::token_rows(a.newest[l]));
      for (int32_t k = 0; k < p.lookaheads; ++k)
        tensors.push_back(cuda::token_rows(a.earlier[k * layers + l]));
    }
    cuda::launch_relative_error(p, tensors.data(), count, blocks, like.type, width, stream);
    cuda::launch_relative_error_finish(p, errors, blocks, first, count, layers, stream);
  }
}

}  // namespace

void cuda::relative_error(StableIValue* stack, uint64_t inputs, uint64_t outputs) {
  const ErrorArguments a(stack, inputs, outputs);
  a.check();
  const DeviceScope scope(a.like().device_index);
  Outputs results(a.like(), 1);
  run(a, results);
  results.release(stack);
}

}  // namespace fastcache

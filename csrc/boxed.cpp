#include "boxed.h"

#include <cstring>

namespace fastcache {

namespace {

// The handles of a list, which are then the caller's to delete.
void take_list(StableIValue value, std::vector<Tensor>& tensors) {
  const auto list = torch::stable::detail::to<StableListHandle>(value);
  size_t length = 0;
  AOTITorchError failed = torch_list_size(list, &length);
  for (size_t j = 0; j < length && failed == 0; ++j) {
    StableIValue element = 0;
    failed = torch_list_get_item(list, j, &element);
    if (failed == 0) tensors.emplace_back().handle = torch::stable::detail::to<AtenTensorHandle>(element);
  }
  torch_delete_list(list);
  must(failed, "torch_list_get_item");
}

}  // namespace

Boxed::Boxed(const StableIValue* stack, uint64_t inputs, uint64_t outputs, const char* signature,
             uint64_t expected_outputs)
    : values_(stack) {
  if (inputs != std::strlen(signature) || outputs != expected_outputs)
    fail("fastcache: the library was built for another schema; rebuild it");
  starts_.reserve(inputs + 1);
  tensors_.reserve(8);
  try {
    for (uint64_t position = 0; position < inputs; ++position) {
      starts_.push_back(static_cast<int64_t>(tensors_.size()));
      const StableIValue value = stack[position];
      const char kind = signature[position];
      if (kind == 't' || kind == 'w')
        tensors_.emplace_back().handle = torch::stable::detail::to<AtenTensorHandle>(value);
      if (kind == 'o')
        tensors_.emplace_back().handle =
            torch::stable::detail::to<std::optional<AtenTensorHandle>>(value).value_or(nullptr);
      if (kind == 'l') take_list(value, tensors_);
    }
    starts_.push_back(static_cast<int64_t>(tensors_.size()));
    for (uint64_t position = 0; position < inputs; ++position) {
      for (int64_t i = starts_[position]; i < starts_[position + 1]; ++i) {
        if (tensors_[i]) read(tensors_[i], tensors_[i].handle, signature[position] == 'w');
      }
    }
  } catch (...) {
    release_all();
    throw;
  }
}

Boxed::~Boxed() { release_all(); }

void Boxed::release_all() {
  for (Tensor& tensor : tensors_) release(tensor);
}

}  // namespace fastcache

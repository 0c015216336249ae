#include "arguments.h"

#include <stdexcept>

namespace fastcache {

namespace {

struct TypeCode {
  int32_t dtype;
  Type type;
  int64_t size;
};

Type type_of(int32_t dtype, int64_t& size) {
  static const TypeCode codes[] = {
      {aoti_torch_dtype_float32(), Type::kFloat32, 4}, {aoti_torch_dtype_bfloat16(), Type::kBFloat16, 2},
      {aoti_torch_dtype_float16(), Type::kFloat16, 2}, {aoti_torch_dtype_float8_e4m3fn(), Type::kFloat8, 1},
      {aoti_torch_dtype_int32(), Type::kInt32, 4},     {aoti_torch_dtype_float64(), Type::kFloat64, 8},
  };
  for (const TypeCode& code : codes) {
    if (code.dtype == dtype) {
      size = code.size;
      return code.type;
    }
  }
  size = 1;
  return Type::kOther;
}

}  // namespace

void read(Tensor& tensor, AtenTensorHandle handle, bool written) {
  tensor.handle = handle;  // owned from here on, also if a call below fails
  int64_t* sizes = nullptr;
  int64_t* strides = nullptr;
  FASTCACHE_MUST(aoti_torch_get_dim(handle, &tensor.rank));
  FASTCACHE_MUST(aoti_torch_get_sizes(handle, &sizes));
  FASTCACHE_MUST(aoti_torch_get_strides(handle, &strides));
  FASTCACHE_MUST(aoti_torch_get_dtype(handle, &tensor.dtype));
  FASTCACHE_MUST(aoti_torch_get_device_type(handle, &tensor.device_type));
  FASTCACHE_MUST(aoti_torch_get_device_index(handle, &tensor.device_index));
  tensor.sizes = sizes;
  tensor.strides = strides;
  tensor.type = type_of(tensor.dtype, tensor.element);
  if (written) {
    void* data = nullptr;
    FASTCACHE_MUST(torch_get_mutable_data_ptr(handle, &data));
    tensor.data = static_cast<char*>(data);
  } else {
    const void* data = nullptr;
    FASTCACHE_MUST(torch_get_const_data_ptr(handle, &data));
    tensor.data = static_cast<char*>(const_cast<void*>(data));
  }
}

namespace {

void read_optional(Tensor& tensor, AtenTensorHandle handle, bool written = false) {
  if (handle != nullptr) read(tensor, handle, written);
}

AtenTensorHandle unboxed(StableIValue value) { return torch::stable::detail::to<AtenTensorHandle>(value); }

AtenTensorHandle unboxed_optional(StableIValue value) {
  auto handle = torch::stable::detail::to<std::optional<AtenTensorHandle>>(value);
  return handle ? *handle : nullptr;
}

}  // namespace

void release(Tensor& tensor) {
  if (tensor.handle != nullptr) aoti_torch_delete_tensor_object(tensor.handle);
  tensor.handle = nullptr;
}

namespace {

struct List {
  StableListHandle handle;
  explicit List(StableIValue value) : handle(torch::stable::detail::to<StableListHandle>(value)) {}
  ~List() { torch_delete_list(handle); }
};

}  // namespace

Arguments::Arguments(StableIValue* stack, uint64_t inputs, uint64_t outputs, bool scatter_form)
    : scatter(scatter_form) {
  if (inputs != (scatter ? 21 : 16) || outputs != 3)
    fail("fastcache: the library was built for another schema; rebuild it");
  // First take all handles off the stack, so that an error below frees them.
  StableIValue* next = stack;
  x.handle = unboxed(*next++);
  if (scatter) {
    slot.handle = unboxed(*next++);
    fresh.handle = unboxed(*next++);
    fresh_slots.handle = unboxed_optional(*next++);
  }
  List list(*next++);
  if (scatter) {
    position = torch::stable::detail::to<int64_t>(*next++);
    slot_scale.handle = unboxed_optional(*next++);
  }
  Tensor* terms_half[] = {&gates, &gate_index, &weights, &scales};
  for (Tensor* tensor : terms_half) tensor->handle = unboxed_optional(*next++);
  norm = torch::stable::detail::to<int64_t>(*next++);
  Tensor* norm_half[] = {&shift, &scale, &norm_weight, &norm_bias};
  for (Tensor* tensor : norm_half) tensor->handle = unboxed_optional(*next++);
  eps = torch::stable::detail::to<double>(*next++);
  row_slots.handle = unboxed_optional(*next++);
  row_count = torch::stable::detail::to<int64_t>(*next++);
  reference.handle = unboxed_optional(*next++);
  need_x = torch::stable::detail::to<bool>(*next++);

  try {
    read(x, x.handle);
    if (scatter) {
      read(slot, slot.handle, true);
      read(fresh, fresh.handle);
      read_optional(fresh_slots, fresh_slots.handle);
      read_optional(slot_scale, slot_scale.handle, true);
    }
    for (Tensor* tensor : terms_half) read_optional(*tensor, tensor->handle);
    for (Tensor* tensor : norm_half) read_optional(*tensor, tensor->handle);
    read_optional(row_slots, row_slots.handle);
    read_optional(reference, reference.handle);
    size_t listed = 0;
    FASTCACHE_MUST(torch_list_size(list.handle, &listed));
    features = few_;
    if (static_cast<int64_t>(listed) > kInline) {
      many_.reset(new Tensor[listed]);
      features = many_.get();
    }
    for (size_t j = 0; j < listed; ++j) {
      StableIValue element = 0;
      FASTCACHE_MUST(torch_list_get_item(list.handle, j, &element));
      features[j].handle = unboxed(element);
      feature_count = static_cast<int64_t>(j) + 1;
      read(features[j], features[j].handle);
    }
  } catch (...) {
    release_all();
    throw;
  }
}

Arguments::~Arguments() { release_all(); }

void Arguments::release_all() {
  for (Tensor* tensor : {&x, &slot, &fresh, &fresh_slots, &slot_scale, &gates, &gate_index, &weights, &scales,
                         &shift, &scale, &norm_weight, &norm_bias, &row_slots, &reference})
    release(*tensor);
  for (int64_t j = 0; j < feature_count; ++j) release(features[j]);
  feature_count = 0;
}

bool Tensor::empty() const {
  for (int64_t i = 0; i < rank; ++i) {
    if (sizes[i] == 0) return true;
  }
  return false;
}

int64_t Tensor::extent() const {
  if (empty()) return 0;
  int64_t last = 0;
  for (int64_t i = 0; i < rank; ++i) last += (sizes[i] - 1) * strides[i];
  return (last + 1) * element;
}

Rows rows_of(const Tensor& tensor) {
  if (!tensor) return {};
  return {tensor.data, tensor.strides[0] * tensor.element, tensor.strides[1] * tensor.element, tensor.type};
}

Vector vector_of(const Tensor& tensor, int64_t tokens, bool packed) {
  if (!tensor) return {};
  const int64_t* sizes = tensor.sizes + (packed ? 1 : 0);
  const int64_t* strides = tensor.strides + (packed ? 1 : 0);
  const int64_t rank = tensor.rank - (packed ? 1 : 0);
  Vector vector;
  vector.data = tensor.data;
  vector.type = tensor.type;
  if (rank > 1 && sizes[0] > 1) vector.batch = strides[0] * tensor.element;
  if (rank > 2 && sizes[1] > 1) {
    vector.row = strides[1] * tensor.element;
    vector.span = tokens / sizes[1];
  }
  return vector;
}

int32_t float32_dtype() {
  static const int32_t dtype = aoti_torch_dtype_float32();
  return dtype;
}

int32_t int32_dtype() {
  static const int32_t dtype = aoti_torch_dtype_int32();
  return dtype;
}

Outputs::~Outputs() {
  for (AtenTensorHandle handle : handles_) {
    if (handle != nullptr) aoti_torch_delete_tensor_object(handle);
  }
}

void* Outputs::add(int index, int32_t dtype, int64_t rank, const int64_t* sizes) {
  int64_t strides[3] = {1, 1, 1};
  for (int64_t i = rank - 2; i >= 0; --i) strides[i] = strides[i + 1] * (sizes[i + 1] > 1 ? sizes[i + 1] : 1);
  FASTCACHE_MUST(aoti_torch_empty_strided(rank, sizes, strides, dtype, x_.device_type, x_.device_index,
                                          &handles_[index]));
  void* data = nullptr;
  FASTCACHE_MUST(torch_get_mutable_data_ptr(handles_[index], &data));
  return data;
}

void Outputs::release(StableIValue* stack) {
  const int64_t none = 0;
  for (int i = 0; i < count_; ++i) {
    if (handles_[i] == nullptr) add(i, i == kErrors ? float32_dtype() : x_.dtype, 1, &none);
  }
  for (int i = 0; i < count_; ++i) {
    stack[i] = torch::stable::detail::from(handles_[i]);
    handles_[i] = nullptr;
  }
}

void fail(const std::string& message) { throw std::runtime_error(message); }

void must(AOTITorchError code, const char* call) {
  if (code != 0) fail(std::string(call) + " failed inside PyTorch");
}

std::string text(const Tensor& tensor) {
  std::string shape = "[";
  for (int64_t i = 0; i < tensor.rank; ++i)
    shape.append(i ? ", " : "").append(std::to_string(tensor.sizes[i]));
  return shape + "]";
}

const char* text(Type type) {
  switch (type) {
    case Type::kFloat32:
      return "torch.float32";
    case Type::kFloat16:
      return "torch.float16";
    case Type::kBFloat16:
      return "torch.bfloat16";
    case Type::kFloat8:
      return "torch.float8_e4m3fn";
    case Type::kFloat64:
      return "torch.float64";
    case Type::kInt32:
      return "torch.int32";
    default:
      return "another dtype";
  }
}

}  // namespace fastcache

// Tensor: a borrowed view of a torch.Tensor, read without linking libtorch.
//
// torch >= 2.11 offers a table of C functions in a capsule, torch.Tensor.__dlpack_c_exchange_api__
// (DLPack 1.3); one call fills a DLTensor that stays valid while the Python tensor lives. Older
// torch is read through its Python attributes. The structs below follow the DLPack ABI.
#pragma once

#include <pybind11/pybind11.h>

#include <array>
#include <cstdint>
#include <string>

#include "check.h"
#include "dtype.h"
#ifdef VCR1_EMULATE
#include "emulation/presented.h"
#endif

namespace vcr1 {

namespace dlpack {
struct Version {
  uint32_t major, minor;
};
struct Device {
  int32_t type, index;
};
struct DataType {
  uint8_t code, bits;
  uint16_t lanes;
};
struct Tensor {
  void* data;
  Device device;
  int32_t ndim;
  DataType dtype;
  int64_t* shape;
  int64_t* strides;
  uint64_t byte_offset;
};
struct ExchangeApi {
  Version version;
  void* previous_api;
  void* managed_tensor_allocator;
  void* managed_tensor_from_py_object;
  void* managed_tensor_to_py_object;
  int (*borrow)(void* py_object, Tensor* out);
  int (*current_work_stream)(int32_t device_type, int32_t device_index, void** stream);
};
constexpr int32_t kCpu = 1;
constexpr int32_t kCuda = 2;
}  // namespace dlpack

class Tensor {
 public:
  static constexpr int kMaxDims = 8;

  int ndim() const { return ndim_; }
  DType dtype() const { return dtype_; }
  int64_t numel() const { return numel_; }
  int64_t size(int dim) const { return shape_[dim < 0 ? dim + ndim_ : dim]; }
  int64_t stride(int dim) const { return strides_[dim < 0 ? dim + ndim_ : dim]; }
  bool on_cpu() const { return device_.type == dlpack::kCpu; }
  bool on_cuda() const { return device_.type == dlpack::kCuda; }
  int device_index() const { return device_.index; }
  bool same_device(const Tensor& other) const {
    return device_.type == other.device_.type && device_.index == other.device_.index;
  }

  bool is_contiguous() const {
    if (numel_ == 0) return true;
    int64_t expected = 1;
    for (int i = ndim_ - 1; i >= 0; --i) {
      if (shape_[i] != 1 && strides_[i] != expected) return false;
      expected *= shape_[i];
    }
    return true;
  }

  // auto [rows, vocab] = logits.shape<2>("logits");
  template <int N>
  std::array<int64_t, N> shape(const char* name) const {
    VCR1_CHECK(ndim_ == N, name, ": expected ", N, " dimensions, got ", ndim_);
    std::array<int64_t, N> out;
    for (int i = 0; i < N; ++i) out[i] = shape_[i];
    return out;
  }

  // The first element, any strides; ValueError when the dtype is another.
  template <typename T>
  T* data(const char* name) const {
    VCR1_CHECK(dtype_ == DTypeOf<T>::value, name, ": expected ", name_of(DTypeOf<T>::value),
               ", got ", name_of(dtype_));
    return static_cast<T*>(data_);
  }
  // As data(), and the elements lie one after the other.
  template <typename T>
  T* dense(const char* name) const {
    VCR1_CHECK(is_contiguous(), name, ": expected a contiguous tensor");
    return data<T>(name);
  }
  void* raw() const { return data_; }

  // The stream torch uses now on this tensor's device; null on the CPU. Holds the GIL.
  void* stream() const {
    if (!on_cuda()) return nullptr;
#ifdef VCR1_EMULATE
    return nullptr;  // torch knows of no such device
#else
    if (const dlpack::ExchangeApi* table = api()) {
      void* out = nullptr;
      if (table->current_work_stream(device_.type, device_.index, &out) != 0)
        throw pybind11::error_already_set();
      return out;
    }
    auto current = pybind11::module_::import("torch").attr("cuda").attr("current_stream");
    return reinterpret_cast<void*>(
        current(device_.index).attr("cuda_stream").cast<std::uintptr_t>());
#endif
  }

  // A view of `object`, a torch.Tensor. No reference is taken: keep `object` alive.
  static Tensor borrow(pybind11::handle object) {
    Tensor out;
    if (const dlpack::ExchangeApi* table = api()) {
      out.read_dlpack(table, object);
    } else {
      out.read_attributes(object);
    }
    out.numel_ = 1;
    for (int i = 0; i < out.ndim_; ++i) out.numel_ *= out.shape_[i];
    // FakeTensor, meta and other storage-less tensors arrive with a null pointer.
    VCR1_CHECK(out.data_ != nullptr || out.numel_ == 0,
               "the tensor has no memory (a fake or meta tensor?)");
#ifdef VCR1_EMULATE
    if (out.on_cpu() && emulation::presents_cpu_as_cuda()) out.device_.type = dlpack::kCuda;
#endif
    return out;
  }

  static bool is_tensor(pybind11::handle object) {
    const int result = PyObject_IsInstance(object.ptr(), tensor_type().ptr());
    if (result < 0) throw pybind11::error_already_set();
    return result == 1;
  }

  // How tensors are read in this process: "dlpack" or "attributes".
  static const char* protocol() { return api() != nullptr ? "dlpack" : "attributes"; }

 private:
  // Both caches are filled under the GIL and never freed: torch outlives this module.
  static pybind11::handle tensor_type() {
    static const pybind11::handle type =
        pybind11::module_::import("torch").attr("Tensor").cast<pybind11::object>().release();
    return type;
  }
  static const dlpack::ExchangeApi* api() {
    static const dlpack::ExchangeApi* const table = load_api();
    return table;
  }
  static const dlpack::ExchangeApi* load_api() {
    constexpr const char* kName = "__dlpack_c_exchange_api__";
    if (!pybind11::hasattr(tensor_type(), kName)) return nullptr;
    const pybind11::object capsule = tensor_type().attr(kName);
    auto* table = static_cast<const dlpack::ExchangeApi*>(
        PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api"));
    if (table == nullptr) throw pybind11::error_already_set();
    // Another major version may lay the table out differently; borrow() is optional in it.
    return table->version.major == 1 && table->borrow != nullptr ? table : nullptr;
  }

  void read_dlpack(const dlpack::ExchangeApi* table, pybind11::handle object) {
    dlpack::Tensor view{};
    if (table->borrow(object.ptr(), &view) != 0) throw pybind11::error_already_set();
    VCR1_CHECK(view.ndim <= kMaxDims, "at most ", kMaxDims, " dimensions, got ", view.ndim);
    VCR1_CHECK(view.dtype.lanes == 1, "vector element types are not supported");
    if (view.data != nullptr) data_ = static_cast<char*>(view.data) + view.byte_offset;
    device_ = view.device;
    ndim_ = view.ndim;
    dtype_ = dtype_from_dlpack(view.dtype);
    for (int i = 0; i < ndim_; ++i) {
      shape_[i] = view.shape[i];
      strides_[i] = view.strides[i];
    }
  }

  static DType dtype_from_dlpack(dlpack::DataType type) {
    switch (type.code << 8 | type.bits) {
      case 0 << 8 | 64:
        return DType::kInt64;
      case 0 << 8 | 32:
        return DType::kInt32;
      case 0 << 8 | 16:
        return DType::kInt16;
      case 0 << 8 | 8:
        return DType::kInt8;
      case 1 << 8 | 8:
        return DType::kUInt8;
      case 2 << 8 | 64:
        return DType::kFloat64;
      case 2 << 8 | 32:
        return DType::kFloat32;
      case 2 << 8 | 16:
        return DType::kFloat16;
      case 4 << 8 | 16:
        return DType::kBFloat16;
      case 6 << 8 | 8:
        return DType::kBool;
      default:
        return DType::kUnknown;
    }
  }

  void read_attributes(pybind11::handle object) {
    const auto shape = object.attr("shape").cast<pybind11::tuple>();
    const auto strides = object.attr("stride")().cast<pybind11::tuple>();
    VCR1_CHECK(shape.size() <= kMaxDims, "at most ", kMaxDims, " dimensions, got ", shape.size());
    ndim_ = static_cast<int>(shape.size());
    for (int i = 0; i < ndim_; ++i) {
      shape_[i] = shape[i].cast<int64_t>();
      strides_[i] = strides[i].cast<int64_t>();
    }
    data_ = reinterpret_cast<void*>(object.attr("data_ptr")().cast<std::uintptr_t>());
    const auto device = object.attr("device");
    const auto kind = device.attr("type").cast<std::string>();
    device_.type = kind == "cpu" ? dlpack::kCpu : kind == "cuda" ? dlpack::kCuda : 0;
    device_.index = device.attr("index").is_none() ? 0 : device.attr("index").cast<int>();
    const auto name = pybind11::str(object.attr("dtype")).cast<std::string>();
    for (int i = 1; i <= static_cast<int>(DType::kBool); ++i)
      if (name == std::string("torch.") + name_of(static_cast<DType>(i)))
        dtype_ = static_cast<DType>(i);
  }

  void* data_ = nullptr;
  dlpack::Device device_{};
  int ndim_ = 0;
  DType dtype_ = DType::kUnknown;
  int64_t numel_ = 0;
  std::array<int64_t, kMaxDims> shape_{};
  std::array<int64_t, kMaxDims> strides_{};
};

}  // namespace vcr1

namespace pybind11::detail {

// Lets a bound function take vcr1::Tensor or std::optional<vcr1::Tensor> by value.
template <>
struct type_caster<vcr1::Tensor> {
  PYBIND11_TYPE_CASTER(vcr1::Tensor, const_name("torch.Tensor"));
  bool load(handle source, bool) {
    if (!vcr1::Tensor::is_tensor(source)) return false;
    value = vcr1::Tensor::borrow(source);
    return true;
  }
};

}  // namespace pybind11::detail

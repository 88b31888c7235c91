// Python bindings of reused host memory (csrc/cpu/pages.h).
#include <map>
#include <memory>
#include <string>

#include "../cpu/pages.h"
#include "bindings.h"

namespace {

// What torch.from_dlpack() takes over: the ABI of DLPack before 1.0. The tensor's last owner calls
// the deleter, from any thread, without the GIL.
struct ManagedTensor {
  vcr1::dlpack::Tensor tensor;
  void* context;
  void (*deleter)(ManagedTensor*);
};

struct Owned {
  ManagedTensor managed;
  std::vector<int64_t> shape;
  vcr1::cpu::Block* block;
};

void release(ManagedTensor* managed) {
  auto* const owned = static_cast<Owned*>(managed->context);
  vcr1::cpu::release_block(owned->block);
  delete owned;
}

constexpr const char* kCapsule = "dltensor";  // renamed by who takes the tensor over

py::capsule take_block(const std::vector<int64_t>& shape, const std::string& dtype) {
  const std::map<std::string, vcr1::dlpack::DataType> dtypes = {
      {"float32", {2, 32, 1}}, {"float16", {2, 16, 1}}, {"bfloat16", {4, 16, 1}}};
  const auto found = dtypes.find(dtype);
  VCR1_CHECK(found != dtypes.end(), "dtype: expected float32, float16 or bfloat16, got ", dtype);
  auto owned = std::make_unique<Owned>();
  owned->shape = shape;
  vcr1::dlpack::Tensor& tensor = owned->managed.tensor;
  tensor.device = {vcr1::dlpack::kCpu, 0};
  tensor.ndim = static_cast<int32_t>(shape.size());
  tensor.dtype = found->second;
  tensor.shape = owned->shape.data();
  int64_t bytes = tensor.dtype.bits / 8;
  for (const int64_t size : shape) {
    VCR1_CHECK(size > 0, "shape: expected positive sizes, got ", size);
    VCR1_CHECK(!__builtin_mul_overflow(bytes, size, &bytes), "shape: too large");
  }
  owned->block = vcr1::cpu::take_block(static_cast<size_t>(bytes));
  tensor.data = owned->block->data;
  owned->managed.context = owned.get();
  owned->managed.deleter = release;
  return py::capsule(&owned.release()->managed, kCapsule, [](PyObject* capsule) {
    if (!PyCapsule_IsValid(capsule, kCapsule)) return;
    release(static_cast<ManagedTensor*>(PyCapsule_GetPointer(capsule, kCapsule)));
  });
}

}  // namespace

VCR1_BINDINGS(host_memory, m) {
  m.def("take_block", &take_block, py::arg("shape"), py::arg("dtype"),
        "A DLPack capsule of CPU memory with any contents, kept for the next call once released.");
  m.def("drop_kept_blocks", &vcr1::cpu::drop_kept_blocks,
        "Gives kept memory back to the system; returns how many bytes.");
}

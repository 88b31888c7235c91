// What every file of bindings needs: registration, launching, and checks of tensors.
//
// csrc/bindings/<stem>.cpp binds the op of that stem. A bound function checks its tensors, fills
// one struct of csrc/kernels.h, allocates nothing, and launches on the device of its tensors. All
// functions and classes exist in every build, so `_C.pyi` describes each of them.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>
#include <vector>

#include "../kernels.h"
#include "../tensor.h"

namespace py = pybind11;
using vcr1::Tensor;

namespace vcr1 {

struct Binding {
  const char* stem;
  void (*bind)(py::module_& m);
};

// All bindings of the module; module.cpp runs them in the order of their stems.
std::vector<Binding>& bindings();

struct RegisterBinding {
  RegisterBinding(const char* stem, void (*bind)(py::module_& m)) {
    bindings().push_back({stem, bind});
  }
};

// More threads than any machine has. libgomp ends the process when it cannot start a team.
constexpr int kMaxThreads = 4096;

inline void check_threads(int num_threads) {
  VCR1_CHECK(num_threads > 0 && num_threads <= kMaxThreads, "num_threads: expected 1 to ",
             kMaxThreads, ", got ", num_threads);
}

// Runs a CPU launcher without the GIL.
template <typename Args>
void launch_cpu(const char* op, const Tensor& on, void (*fn)(const Args&, int), const Args& args,
                int num_threads) {
  VCR1_CHECK(on.on_cpu(), op, ": there is no kernel for the tensors' device");
  check_threads(num_threads);
  const py::gil_scoped_release released;
  fn(args, num_threads);
}

// The leading dimensions of `tensor` (all but the last), merged where their strides allow.
inline RowLayout row_layout(const Tensor& tensor, const char* name) {
  VCR1_CHECK(tensor.ndim() >= 1, name, ": expected at least 1 dimension");
  VCR1_CHECK(tensor.size(-1) <= 1 || tensor.stride(-1) == 1, name,
             ": expected stride 1 along the last dimension, got ", tensor.stride(-1));
  RowLayout out;
  for (int i = 0; i < tensor.ndim() - 1; ++i) {
    if (tensor.size(i) == 1) continue;  // its stride is never taken, and may be anything
    const int last = out.ndim - 1;
    if (last >= 0 && out.stride[last] == tensor.size(i) * tensor.stride(i)) {
      out.size[last] *= tensor.size(i);
      out.stride[last] = tensor.stride(i);
    } else {
      out.size[out.ndim] = tensor.size(i);
      out.stride[out.ndim] = tensor.stride(i);
      ++out.ndim;
    }
  }
  return out;
}

// A dense tensor of exactly `numel` elements on the device of `like`, or null for None.
template <typename T>
T* dense(const std::optional<Tensor>& tensor, int64_t numel, const Tensor& like, const char* name) {
  if (!tensor) return nullptr;
  VCR1_CHECK(tensor->numel() == numel, name, ": expected ", numel, " elements, got ",
             tensor->numel());
  VCR1_CHECK(tensor->same_device(like), name, ": is on another device than the op's first tensor");
  return tensor->dense<T>(name);
}

// As dense(), of the dtype of `like`.
inline const void* dense_as(const std::optional<Tensor>& tensor, const Tensor& like, int64_t numel,
                            const char* name) {
  if (!tensor) return nullptr;
  VCR1_CHECK(tensor->dtype() == like.dtype(), name, ": expected ", name_of(like.dtype()), ", got ",
             name_of(tensor->dtype()));
  VCR1_CHECK(tensor->numel() == numel, name, ": expected ", numel, " elements, got ",
             tensor->numel());
  VCR1_CHECK(tensor->is_contiguous(), name, ": expected a contiguous tensor");
  VCR1_CHECK(tensor->same_device(like), name, ": is on another device than the op's first tensor");
  return tensor->raw();
}

}  // namespace vcr1

// Defines the bindings of one stem; adding a file adds them to the module.
#define VCR1_BINDINGS(stem, m)                                             \
  static void bind_##stem(py::module_& m);                                 \
  static const vcr1::RegisterBinding register_##stem(#stem, &bind_##stem); \
  static void bind_##stem(py::module_& m)

// Runs the launcher `op` on the device and stream of tensor `on`. A CUDA launch is asynchronous and
// keeps the GIL.
#ifdef VCR1_CUDA
#define VCR1_LAUNCH_CUDA(op, on, args)                       \
  do {                                                       \
    const vcr1::DeviceGuard guard(#op, (on).device_index()); \
    vcr1::cuda::op(args, (on).stream());                     \
  } while (false)
#else
#define VCR1_LAUNCH_CUDA(op, on, args) \
  vcr1::fail<std::invalid_argument>(#op, ": vcr1_fast._C was built without CUDA")
#endif

// Runs the launcher `op` where tensor `on` lives.
#define VCR1_LAUNCH(op, on, args, num_threads)                      \
  do {                                                              \
    if ((on).on_cuda()) {                                           \
      VCR1_LAUNCH_CUDA(op, on, args);                               \
    } else {                                                        \
      vcr1::launch_cpu(#op, on, &vcr1::cpu::op, args, num_threads); \
    }                                                               \
  } while (false)

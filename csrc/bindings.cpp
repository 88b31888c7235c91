// Python bindings: check, allocate nothing, pick CPU or CUDA. The only file that knows pybind11,
// with tensor.h. One bind_<op>() an op.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "cpu/isa.h"
#include "kernels.h"
#include "tensor.h"

namespace py = pybind11;
using vcr1::Tensor;

namespace {

void bind_runtime(py::module_& m) {
#ifdef VCR1_CUDA
  m.attr("has_cuda") = true;
#else
  m.attr("has_cuda") = false;
#endif
  m.def(
      "cpu_isa", [] { return vcr1::cpu::name_of(vcr1::cpu::isa()); },
      "Instruction set of the CPU kernels in use.");
  m.def(
      "choose_cpu_isa", [](const std::string& name) { vcr1::cpu::choose_isa(name); },
      py::arg("name"), "Use the kernels compiled for 'baseline', 'avx2', 'avx512' or 'auto'.");
  m.def("tensor_protocol", &Tensor::protocol, "How tensors are read: 'dlpack' or 'attributes'.");
  m.def(
      "describe",
      [](const Tensor& tensor) {
        py::list shape, strides;
        for (int i = 0; i < tensor.ndim(); ++i) {
          shape.append(tensor.size(i));
          strides.append(tensor.stride(i));
        }
        return py::make_tuple(vcr1::name_of(tensor.dtype()), py::tuple(shape), py::tuple(strides),
                              reinterpret_cast<std::uintptr_t>(tensor.raw()));
      },
      py::arg("tensor"), "(dtype, shape, strides, address) as the kernels see a tensor.");
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Native kernels of vcr1_fast.";
  bind_runtime(m);
}

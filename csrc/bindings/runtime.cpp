// Python bindings besides the ops: instruction sets, threads, and how tensors are read.
#include <utility>

#include "../cpu/isa.h"
#include "../cpu/parallel.h"
#include "bindings.h"

VCR1_BINDINGS(runtime, m) {
#ifdef VCR1_CUDA
  m.attr("has_cuda") = true;
#else
  m.attr("has_cuda") = false;
#endif
  m.def(
      "cuda_versions",
      []() -> std::pair<int, int> {
        int driver = 0, runtime = 0;
#ifdef VCR1_CUDA
        CUDA_CHECK("cuda_versions", cudaDriverGetVersion(&driver));
        CUDA_CHECK("cuda_versions", cudaRuntimeGetVersion(&runtime));
#endif
        return {driver, runtime};
      },
      "CUDA versions (1000 major + 10 minor) that the driver supports, 0 without one, and of the "
      "runtime in this module; (0, 0) in builds without CUDA.");
  m.def(
      "cpu_isa", [] { return vcr1::cpu::name_of(vcr1::cpu::isa()); },
      "Instruction set of the CPU kernels in use.");
  m.def(
      "choose_cpu_isa", [](const std::string& name) { vcr1::cpu::choose_isa(name); },
      py::arg("name"),
      "Use the kernels compiled for 'baseline', 'avx2', 'avx512', 'avx512vbmi' or 'auto'.");
  m.def(
      "use_team",
      [](std::uintptr_t address) {
        vcr1::cpu::use_team(reinterpret_cast<vcr1::cpu::TeamFn>(address));
      },
      py::arg("address"), "Run CPU kernels by the GOMP_parallel at this address; 0: our own pool.");
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

// Python bindings of the emulation, for tests: vcr1_fast._C.emulation. Not in other builds.
#include "../bindings/bindings.h"

#include <cuda_runtime.h>

#include "device.h"
#include "presented.h"

namespace emulation = vcr1::emulation;

VCR1_BINDINGS(emulation, module) {
  py::module_ m = module.def_submodule("emulation", "The emulated GPU: csrc/emulation/device.h.");
  m.def(
      "present_cpu_as_cuda",
      [](bool on) { return std::exchange(emulation::presents_cpu_as_cuda(), on); }, py::arg("on"),
      "Let this thread's CPU tensors count as CUDA tensors; returns whether they did.");
  m.def(
      "set_device",
      [](int major, int code, int shared_bytes, int driver, int multiprocessors,
         int largest_cluster) {
        emulation::device() = {major, code, shared_bytes, driver, multiprocessors, largest_cluster};
      },
      py::arg("major") = 9, py::arg("code") = 90, py::arg("shared_bytes") = 232448,
      py::arg("driver") = 13000, py::arg("multiprocessors") = 132, py::arg("largest_cluster") = 16,
      "The GPU's compute capability, the architecture of the compiled code (80 or 90), the shared "
      "memory that a block may ask for, the CUDA version that the driver supports, the "
      "multiprocessors, and the largest cluster.");
  m.def(
      "take_error", [] { return std::string(cudaGetErrorName(cudaGetLastError())); },
      "The error that the last failed CUDA call has left in the runtime; it is cleared.");
  m.def("seed", &emulation::seed, py::arg("value"), "Seed of the order in which threads run.");
  m.def(
      "take_launches",
      [] {
        py::list out;
        for (const auto& launch : emulation::launches())
          out.append(
              py::make_tuple(launch.grid, launch.block, launch.cluster, launch.shared_bytes));
        emulation::launches().clear();
        return out;
      },
      "(grid, block, cluster, shared bytes) of each launch since the last call.");
}

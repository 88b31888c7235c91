// Whether tensors of the CPU are to count as tensors of the emulated GPU: csrc/tensor.h asks.
#pragma once

namespace vcr1::emulation {

// By thread, and only during the call of an op's "cuda" implementation (ops/backend.py).
inline bool& presents_cpu_as_cuda() {
  static thread_local bool presents = false;
  return presents;
}

}  // namespace vcr1::emulation

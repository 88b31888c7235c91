// Every launcher's signature, CPU beside CUDA: the native table of contents.
//
// A launcher takes one struct of pointers, sizes and strides; it allocates nothing and does not
// synchronise. CPU launchers take the number of threads last, CUDA launchers the stream.
#pragma once

#include <cstdint>

#include "cpu/isa.h"
#include "dtype.h"

// Declares `void name(const Args&, int num_threads)` once per instruction set, as CMake's
// vcr1_cpu_kernel() compiles it, and the function that picks one at run time.
#ifdef VCR1_MULTI_ISA
#define VCR1_CPU_LAUNCHER(name, Args)                   \
  namespace baseline {                                  \
  void name(const Args& args, int num_threads);         \
  }                                                     \
  namespace avx2 {                                      \
  void name(const Args& args, int num_threads);         \
  }                                                     \
  namespace avx512 {                                    \
  void name(const Args& args, int num_threads);         \
  }                                                     \
  inline void name(const Args& args, int num_threads) { \
    switch (isa()) {                                    \
      case Isa::kAvx512:                                \
        return avx512::name(args, num_threads);         \
      case Isa::kAvx2:                                  \
        return avx2::name(args, num_threads);           \
      case Isa::kBaseline:                              \
        return baseline::name(args, num_threads);       \
    }                                                   \
  }
#else
#define VCR1_CPU_LAUNCHER(name, Args)           \
  namespace baseline {                          \
  void name(const Args& args, int num_threads); \
  }                                             \
  inline void name(const Args& args, int num_threads) { baseline::name(args, num_threads); }
#endif

// Instructions that CUDA C++ has no name for (compute capability 8.0 and above).
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#ifdef VCR1_EMULATE
#include "../emulation/instructions.h"
#else
namespace vcr1::cuda {

// Starts a copy of 16 bytes, both sides aligned to them, past the registers and the first cache.
__device__ inline void copy_async(void* shared, const void* global) {
  const auto to = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(global) : "memory");
}

// Closes the thread's group of copies started since the last call.
__device__ inline void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until at most kPending of the thread's last groups are still under way.
template <int kPending>
__device__ inline void wait_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// c += a b on the warp's tensor core: a 16 x 32 bytes, b 32 x 8 unsigned bytes, c 16 x 8 int32.
// With g = lane / 4 and t = lane % 4, byte i of a register: a.x, a.y are a[g, g + 8][4 t + i] and
// a.z, a.w the same 16 columns on; b[0], b[1] are b[4 t + i, 4 t + i + 16][g]; c[0], c[1] are
// c[g][2 t, 2 t + 1] and c[2], c[3] the same of row g + 8.
template <bool kSigned>
__device__ inline void multiply_add(int (&c)[4], const uint4& a, const uint32_t (&b)[2]) {
  if constexpr (kSigned) {
    asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.u8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
        "{%0,%1,%2,%3};"
        : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
        : "r"(a.x), "r"(a.y), "r"(a.z), "r"(a.w), "r"(b[0]), "r"(b[1]));
  } else {
    asm("mma.sync.aligned.m16n8k32.row.col.s32.u8.u8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
        "{%0,%1,%2,%3};"
        : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
        : "r"(a.x), "r"(a.y), "r"(a.z), "r"(a.w), "r"(b[0]), "r"(b[1]));
  }
}

// Two integers cut to 0..255, the first in the low byte.
__device__ inline uint16_t saturate(int low, int high) {
  uint32_t out;
  asm("cvt.pack.sat.u8.s32.b32 %0, %1, %2, 0;" : "=r"(out) : "r"(high), "r"(low));
  return static_cast<uint16_t>(out);
}

}  // namespace vcr1::cuda
#endif  // VCR1_EMULATE

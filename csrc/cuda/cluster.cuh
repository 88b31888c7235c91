// Blocks of a cluster (sm_90 on; before, a cluster is one block).
#pragma once

#include <cuda_runtime.h>

#ifdef VCR1_EMULATE
#include "../emulation/instructions.h"
#else
namespace vcr1::cuda {

// All threads of all blocks of the cluster arrive before any passes wait. What a thread that
// releases read and wrote before is done before any other thread goes on. A release is a fence of
// the whole GPU in every warp that has one: only those threads release that others depend on.
__device__ inline void cluster_arrive(bool release) {
#if __CUDA_ARCH__ >= 900
  if (release)
    asm volatile("barrier.cluster.arrive.release;" ::: "memory");
  else
    asm volatile("barrier.cluster.arrive.relaxed;" ::: "memory");
#endif
}
__device__ inline void cluster_wait() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.wait.acquire;" ::: "memory");
#endif
}

// *p, a float in shared memory, as block `rank` of the cluster has it.
__device__ inline float cluster_read(const float* p, unsigned rank) {
#if __CUDA_ARCH__ >= 900
  const auto own = static_cast<unsigned>(__cvta_generic_to_shared(p));
  unsigned theirs;
  float x;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(theirs) : "r"(own), "r"(rank));
  asm volatile("ld.shared::cluster.f32 %0, [%1];" : "=f"(x) : "r"(theirs) : "memory");
  return x;
#else
  return *p;
#endif
}

}  // namespace vcr1::cuda
#endif  // VCR1_EMULATE

// The emulation's forms of csrc/cuda/ptx.cuh and csrc/cuda/cluster.cuh, which are PTX otherwise.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace vcr1::cuda {

inline void copy_async(void* shared, const void* global) { emulation::copy_async(shared, global); }
inline void commit_copies() { emulation::commit_copies(); }
template <int kPending>
inline void wait_copies() {
  emulation::wait_copies(kPending);
}

template <bool kSigned>
inline void multiply_add(int (&c)[4], const uint4& a, const uint32_t (&b)[2]) {
  const uint32_t rows[4] = {a.x, a.y, a.z, a.w};
  emulation::multiply_add(c, rows, b, kSigned);
}

inline uint16_t saturate(int low, int high) {
  const auto cut = [](int x) { return static_cast<unsigned>(x < 0 ? 0 : x > 255 ? 255 : x); };
  return static_cast<uint16_t>(cut(low) | cut(high) << 8);
}

inline void cluster_arrive(bool release) { emulation::cluster_arrive(release); }
inline void cluster_wait() { emulation::cluster_wait(); }
inline float cluster_read(const float* p, unsigned rank) {
  return emulation::cluster_read(p, rank);
}

}  // namespace vcr1::cuda

// Stands in for the CUDA toolkit's header of this name in builds with -DVCR1_EMULATE=ON: the part
// of the language and of the runtime that csrc/cuda uses. See ../device.h.
#pragma once

#include <math.h>

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#include "../device.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__
#define __align__(n) __attribute__((aligned(n)))
// Of the thread that runs the block: see static_shared() in ../device.cpp.
#define __shared__ static thread_local

// The host's part.

using cudaStream_t = void*;
enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorInvalidConfiguration = 9,
};
enum cudaFuncAttribute {
  cudaFuncAttributeMaxDynamicSharedMemorySize = 8,
  cudaFuncAttributePreferredSharedMemoryCarveout = 9,
  cudaFuncAttributeNonPortableClusterSizeAllowed = 13,
};
enum cudaSharedCarveout { cudaSharedmemCarveoutMaxShared = 100 };
enum cudaDeviceAttr {
  cudaDevAttrMultiProcessorCount = 16,
  cudaDevAttrMaxSharedMemoryPerBlockOptin = 97,
};
enum cudaLaunchAttributeID { cudaLaunchAttributeClusterDimension = 4 };

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
union cudaLaunchAttributeValue {
  struct {
    unsigned x, y, z;
  } clusterDim;
  char pad[64];
};
struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  cudaLaunchAttributeValue val;
};
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes = 0;
  cudaStream_t stream = nullptr;
  cudaLaunchAttribute* attrs = nullptr;
  unsigned numAttrs = 0;
};
struct cudaFuncAttributes {
  int binaryVersion, ptxVersion;
};

namespace vcr1::emulation {
// Of the runtime: the check of a launch, and what it was asked for.
cudaError_t check_launch(const Launch& launch, const void* kernel);
cudaError_t set_shared_limit(const void* kernel, int bytes);
cudaError_t allow_large_clusters(const void* kernel);
}  // namespace vcr1::emulation

cudaError_t cudaGetLastError();
const char* cudaGetErrorName(cudaError_t error);
const char* cudaGetErrorString(cudaError_t error);
cudaError_t cudaGetDevice(int* device);
cudaError_t cudaSetDevice(int device);
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device);
cudaError_t cudaDriverGetVersion(int* version);
cudaError_t cudaRuntimeGetVersion(int* version);

template <typename F>
cudaError_t cudaFuncSetAttribute(F* kernel, cudaFuncAttribute attribute, int value) {
  if (attribute == cudaFuncAttributeNonPortableClusterSizeAllowed)
    return vcr1::emulation::allow_large_clusters(reinterpret_cast<const void*>(kernel));
  if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize) return cudaSuccess;
  return vcr1::emulation::set_shared_limit(reinterpret_cast<const void*>(kernel), value);
}
template <typename F>
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* out, F*) {
  const auto& device = vcr1::emulation::device();
  *out = {10 * device.major, device.code};
  return cudaSuccess;
}

template <typename F>
cudaError_t cudaOccupancyMaxActiveClusters(int* clusters, F*, const cudaLaunchConfig_t* config) {
  const auto& device = vcr1::emulation::device();
  const auto size = static_cast<int>(config->attrs[0].val.clusterDim.x);
  *clusters =
      device.major >= 9 && size <= device.largest_cluster ? device.multiprocessors / size : 0;
  return cudaSuccess;
}

template <typename... Params, typename... Args>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Params...),
                               Args&&... args) {
  vcr1::emulation::Launch launch{config->gridDim.x, config->blockDim.x, 1,
                                 config->dynamicSmemBytes};
  for (unsigned i = 0; i < config->numAttrs; ++i)
    if (config->attrs[i].id == cudaLaunchAttributeClusterDimension)
      launch.cluster = config->attrs[i].val.clusterDim.x;
  const auto error = vcr1::emulation::check_launch(launch, reinterpret_cast<const void*>(kernel));
  if (error != cudaSuccess) return error;
  const auto call = [&](const Params&... params) {
    vcr1::emulation::run(launch, [&] { kernel(params...); });
  };
  call(static_cast<Params>(args)...);
  return cudaSuccess;
}

// The device's part.

struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(8) float2 {
  float x, y;
};

namespace vcr1::emulation {
// A built-in variable of device code, of which only x is used: read when it is named.
template <unsigned (*kRead)()>
struct BuiltIn {
  struct {
    operator unsigned() const { return kRead(); }
  } x;
};
}  // namespace vcr1::emulation
inline constexpr vcr1::emulation::BuiltIn<&vcr1::emulation::thread_index> threadIdx{};
inline constexpr vcr1::emulation::BuiltIn<&vcr1::emulation::block_index> blockIdx{};
inline constexpr vcr1::emulation::BuiltIn<&vcr1::emulation::block_size> blockDim{};
inline constexpr vcr1::emulation::BuiltIn<&vcr1::emulation::grid_size> gridDim{};

inline void __syncthreads() { vcr1::emulation::sync_block(); }
inline void __syncwarp(unsigned mask = ~0u) { vcr1::emulation::sync_warp(mask); }

template <typename T>
T __shfl_sync(unsigned mask, T value, unsigned lane) {
  static_assert(sizeof(T) <= 8);
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  bits = vcr1::emulation::shuffle(mask, bits, lane % 32);
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}
template <typename T>
T __shfl_xor_sync(unsigned mask, T value, unsigned flipped) {
  return __shfl_sync(mask, value, vcr1::emulation::lane() ^ flipped);
}

template <typename T>
T __ldg(const T* p) {
  return *p;
}
template <typename T>
T __ldcs(const T* p) {
  return *p;
}
template <typename T>
void __stcs(T* p, T value) {
  *p = value;
}

inline float __int_as_float(int x) {
  float out;
  std::memcpy(&out, &x, sizeof(out));
  return out;
}
inline float __uint_as_float(unsigned x) {
  float out;
  std::memcpy(&out, &x, sizeof(out));
  return out;
}
inline unsigned __byte_perm(unsigned x, unsigned y, unsigned selector) {
  const uint64_t bytes = uint64_t{y} << 32 | x;
  unsigned out = 0;
  for (unsigned i = 0; i < 4; ++i) {
    const unsigned select = selector >> (4 * i) & 15;
    unsigned byte = bytes >> (8 * (select & 7)) & 255;
    if (select & 8) byte = byte & 128 ? 255 : 0;  // the sign, in place of the byte
    out |= byte << (8 * i);
  }
  return out;
}
inline unsigned __funnelshift_r(unsigned low, unsigned high, unsigned shift) {
  return static_cast<unsigned>((uint64_t{high} << 32 | low) >> (shift & 31));
}

// Rounded before and after, whatever the flags: neither these operations nor the products that are
// their operands are fused into a multiply-add. The compiler must not see through.
namespace vcr1::emulation {
inline float rounded(float x) {
  asm("" : "+x"(x));
  return x;
}
}  // namespace vcr1::emulation
inline float __fadd_rn(float a, float b) {
  using vcr1::emulation::rounded;
  return rounded(rounded(a) + rounded(b));
}
inline float __fsub_rn(float a, float b) {
  using vcr1::emulation::rounded;
  return rounded(rounded(a) - rounded(b));
}
inline float __fmul_rn(float a, float b) {
  using vcr1::emulation::rounded;
  return rounded(rounded(a) * rounded(b));
}
inline float __fdiv_rn(float a, float b) {
  using vcr1::emulation::rounded;
  return rounded(rounded(a) / rounded(b));
}
inline int __float2int_rn(float x) { return static_cast<int>(std::nearbyint(x)); }

template <typename T>
constexpr T min(T a, T b) {
  return b < a ? b : a;
}
template <typename T>
constexpr T max(T a, T b) {
  return a < b ? b : a;
}

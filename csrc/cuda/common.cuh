// What every CUDA kernel here shares: widening loads, narrowing stores, 16-byte packs.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "../check.h"
#include "../kernels.h"

namespace vcr1::cuda {

__device__ inline float widen(float x) { return x; }
__device__ inline float widen(__half x) { return __half2float(x); }
__device__ inline float widen(__nv_bfloat16 x) { return __bfloat162float(x); }
template <typename T>
__device__ inline T narrow(float x);
template <>
__device__ inline float narrow<float>(float x) {
  return x;
}
template <>
__device__ inline __half narrow<__half>(float x) {
  return __float2half_rn(x);
}
template <>
__device__ inline __nv_bfloat16 narrow<__nv_bfloat16>(float x) {
  return __float2bfloat16_rn(x);
}

// Two neighbours at once: one instruction for halves.
__device__ inline void narrow_pair(float a, float b, float* out) {
  out[0] = a;
  out[1] = b;
}
__device__ inline void narrow_pair(float a, float b, __half* out) {
  const __half2 pair = __floats2half2_rn(a, b);
  memcpy(out, &pair, sizeof(pair));
}
__device__ inline void narrow_pair(float a, float b, __nv_bfloat16* out) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(a, b);
  memcpy(out, &pair, sizeof(pair));
}

__device__ inline void widen_pair(const float* in, float& a, float& b) {
  a = in[0];
  b = in[1];
}
__device__ inline void widen_pair(const __half* in, float& a, float& b) {
  __half2 pair;
  memcpy(&pair, in, sizeof(pair));
  const float2 wide = __half22float2(pair);
  a = wide.x;
  b = wide.y;
}
// By hand: the compiler takes the upper half down before it shifts it up again.
__device__ inline void widen_pair(const __nv_bfloat16* in, float& a, float& b) {
  unsigned bits;
  memcpy(&bits, in, sizeof(bits));
  a = __uint_as_float(bits << 16);
  b = __uint_as_float(bits & 0xffff0000u);
}

// 16 bytes of elements, moved by one instruction.
template <typename T>
struct alignas(16) Pack {
  static constexpr int kSize = 16 / sizeof(T);
  T lanes[kSize];
};

template <typename T>
__device__ inline Pack<T> filled_pack(float x) {
  Pack<T> out;
#pragma unroll
  for (int j = 0; j < Pack<T>::kSize; ++j) out.lanes[j] = narrow<T>(x);
  return out;
}

// Elements that are read once, or written and not read again soon: first out of the caches.
template <typename T>
__device__ inline Pack<T> load_streaming(const Pack<T>* p) {
  const uint4 bits = __ldcs(reinterpret_cast<const uint4*>(p));
  Pack<T> out;
  memcpy(&out, &bits, sizeof(out));
  return out;
}
template <typename T>
__device__ inline void store_streaming(Pack<T>* p, const Pack<T>& pack) {
  uint4 bits;
  memcpy(&bits, &pack, sizeof(bits));
  __stcs(reinterpret_cast<uint4*>(p), bits);
}

// A row of `size` elements seen as 16-byte packs: those before the first multiple of 16 bytes and
// after the last are its edge, less than two packs of elements.
template <typename T>
struct PackedRow {
  T* first;
  int head, packs, edge;

  __device__ PackedRow(T* row, int size) : first(row) {
    constexpr int n = Pack<T>::kSize;
    const auto past = static_cast<int>(reinterpret_cast<std::uintptr_t>(row) % 16 / sizeof(T));
    head = min((n - past) % n, size);
    packs = (size - head) / n;
    edge = size - packs * n;
  }
  __device__ auto* pack(int i) const {
    using P = std::conditional_t<std::is_const_v<T>, const Pack<std::remove_const_t<T>>, Pack<T>>;
    return reinterpret_cast<P*>(first + head) + i;
  }
  __device__ T* edge_element(int i) const {  // i < edge
    return first + (i < head ? i : i + packs * Pack<T>::kSize);
  }
};

// The columns of a row that block `rank` of `blocks` works on: whole packs but at the row's ends.
struct Columns {
  int begin, end;

  __device__ Columns(int begin, int end) : begin(begin), end(end) {}
  template <typename T>
  __device__ Columns(const T* row, int size, int rank, int blocks) {
    constexpr int n = Pack<std::remove_const_t<T>>::kSize;
    const PackedRow<const T> all(row, size);
    const int each = (all.packs + blocks - 1) / blocks;
    begin = rank == 0 ? 0 : all.head + min(rank * each, all.packs) * n;
    end = rank == blocks - 1 ? size : all.head + min((rank + 1) * each, all.packs) * n;
  }
  __device__ bool has(int64_t column) const { return column >= begin && column < end; }
};

// The block's dynamic shared memory, aligned to 16 bytes.
__device__ inline unsigned char* dynamic_shared() {
#ifdef VCR1_EMULATE
  return static_cast<unsigned char*>(emulation::dynamic_shared());
#else
  extern __shared__ __align__(16) unsigned char dynamic_shared_bytes[];
  return dynamic_shared_bytes;
#endif
}

// fn(T): the kernel type of a floating dtype. The caller has checked the dtype.
template <typename Fn>
void for_float_dtype(DType dtype, Fn&& fn) {
  if (dtype == DType::kFloat32) {
    fn(float{});
  } else if (dtype == DType::kBFloat16) {
    fn(__nv_bfloat16{});
  } else {
    fn(__half{});
  }
}

// Blocks that the current device runs at a time, `per_sm` of them on each multiprocessor.
inline int64_t blocks_at_a_time(const char* op, int per_sm) {
  int device, multiprocessors;
  CUDA_CHECK(op, cudaGetDevice(&device));
  CUDA_CHECK(op, cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device));
  return int64_t{multiprocessors} * per_sm;
}

struct LaunchShape {
  unsigned blocks, threads;
  size_t shared_bytes = 0;
  unsigned cluster = 1;  // blocks that share memory; more than 1 from sm_90 on
};

// The largest cluster that a kernel can be launched in: 16 needs the device's consent, and without
// code for sm_90 there are none. Of the code, not of the device: where the driver compiles PTX for
// sm_80 on an sm_90 device, clusters can be launched, but cluster.cuh has compiled to nothing.
template <typename... Params>
int largest_cluster(const char* op, void (*kernel)(Params...), const LaunchShape& shape) {
  constexpr int kPortable = 8, kLargest = 16;
  cudaFuncAttributes code{};
  CUDA_CHECK(op, cudaFuncGetAttributes(&code, kernel));
  if (code.ptxVersion < 90) return 1;
  if (cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1) !=
      cudaSuccess) {
    cudaGetLastError();
    return kPortable;
  }
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim.x = kLargest;
  attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(kLargest);
  config.blockDim = dim3(shape.threads);
  config.dynamicSmemBytes = shape.shared_bytes;
  config.attrs = &attribute;
  config.numAttrs = 1;
  int clusters = 0;
  if (cudaOccupancyMaxActiveClusters(&clusters, kernel, &config) != cudaSuccess) {
    cudaGetLastError();
    return kPortable;
  }
  return clusters > 0 ? kLargest : kPortable;
}

template <typename... Params, typename... Args>
void launch(const char* op, void (*kernel)(Params...), const LaunchShape& shape, void* stream,
            const Args&... args) {
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim.x = shape.cluster;
  attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(shape.blocks);
  config.blockDim = dim3(shape.threads);
  config.dynamicSmemBytes = shape.shared_bytes;
  config.stream = static_cast<cudaStream_t>(stream);
  config.attrs = &attribute;
  config.numAttrs = shape.cluster > 1 ? 1 : 0;
  CUDA_CHECK(op, cudaLaunchKernelEx(&config, kernel, args...));
}

}  // namespace vcr1::cuda

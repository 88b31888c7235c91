// Stands in for the CUDA toolkit's header of this name: see cuda_runtime.h.
#pragma once

#include "cuda_runtime.h"

struct __half {
  unsigned short bits;
};
struct alignas(4) __half2 {
  __half x, y;
};

inline float __half2float(__half x) {
  _Float16 value;
  std::memcpy(&value, &x.bits, sizeof(value));
  return static_cast<float>(value);
}
inline __half __float2half_rn(float x) {
  const auto value = static_cast<_Float16>(x);
  __half out;
  std::memcpy(&out.bits, &value, sizeof(value));
  return out;
}
inline __half2 __floats2half2_rn(float a, float b) {
  return {__float2half_rn(a), __float2half_rn(b)};
}
inline float2 __half22float2(__half2 x) { return {__half2float(x.x), __half2float(x.y)}; }
inline unsigned short __half_as_ushort(__half x) { return x.bits; }

// The larger; of NaN and a number, the number.
inline __half __hmax(__half a, __half b) {
  const float x = __half2float(a), y = __half2float(b);
  if (x != x) return y != y ? __half{0x7fff} : b;
  if (y != y) return a;
  return x > y ? a : b;
}
inline __half2 __hmax2(__half2 a, __half2 b) { return {__hmax(a.x, b.x), __hmax(a.y, b.y)}; }

// Vectors of doubles, with the names that simd.h has for floats. Include it only from files built
// by vcr1_cpu_kernel().
//
// Double precision is for checking what the same kernel does in float: what floats have and no
// kernel needs in double is not here.
#pragma once

#include "simd.h"

namespace vcr1::cpu::VCR1_ISA {

struct DoubleVec {
  static constexpr int kWidth = Vec::kWidth / 2;
  typedef double Lanes __attribute__((vector_size(8 * kWidth)));
  Lanes v;
};
inline DoubleVec splat(double x) { return {DoubleVec::Lanes{} + x}; }
inline DoubleVec load(const double* p) {
  DoubleVec out;
  std::memcpy(&out.v, p, sizeof out.v);
  return out;
}
inline void store(double* p, DoubleVec x) { std::memcpy(p, &x.v, sizeof x.v); }
inline DoubleVec add(DoubleVec a, DoubleVec b) { return {a.v + b.v}; }
inline DoubleVec sub(DoubleVec a, DoubleVec b) { return {a.v - b.v}; }
inline DoubleVec mul(DoubleVec a, DoubleVec b) { return {a.v * b.v}; }
inline DoubleVec fma(DoubleVec a, DoubleVec b, DoubleVec c) { return {a.v * b.v + c.v}; }
inline DoubleVec max(DoubleVec a, DoubleVec b) { return {a.v > b.v ? a.v : b.v}; }
inline DoubleVec min(DoubleVec a, DoubleVec b) { return {a.v < b.v ? a.v : b.v}; }
inline double reduce_add(DoubleVec a) {
  double out = a.v[0];
  for (int i = 1; i < DoubleVec::kWidth; ++i) out += a.v[i];
  return out;
}
inline DoubleVec load_partial(const double* p, int n, double fill) {
  if (n >= DoubleVec::kWidth) return load(p);
  DoubleVec out = splat(fill);
  for (int i = 0; i < n; ++i) out.v[i] = p[i];
  return out;
}
inline void store_partial(double* p, DoubleVec x, int n) {
  if (n >= DoubleVec::kWidth) return store(p, x);
  for (int i = 0; i < n; ++i) p[i] = x.v[i];
}

}  // namespace vcr1::cpu::VCR1_ISA

// Choices between vectors of floats, lane by lane: comparisons give a Mask. Include it only from
// files built by vcr1_cpu_kernel().
#pragma once

#include "simd.h"

namespace vcr1::cpu::VCR1_ISA {

#if defined(__AVX512F__)

struct Mask {
  __mmask16 m;
};
inline Mask all_lanes() { return {0xffff}; }
inline Mask load_mask(const bool* p) {
  const __m128i bytes = _mm_loadu_si128((const __m128i*)p);
  return {_mm_test_epi8_mask(bytes, bytes)};
}
inline Mask less(Vec a, Vec b) { return {_mm512_cmp_ps_mask(a.v, b.v, _CMP_LT_OQ)}; }
inline Mask less_equal(Vec a, Vec b) { return {_mm512_cmp_ps_mask(a.v, b.v, _CMP_LE_OQ)}; }
inline Mask equal(Vec a, Vec b) { return {_mm512_cmp_ps_mask(a.v, b.v, _CMP_EQ_OQ)}; }
inline Mask equal_or_nan(Vec a, Vec b) { return {_mm512_cmp_ps_mask(a.v, b.v, _CMP_EQ_UQ)}; }
inline Mask both(Mask a, Mask b) { return {static_cast<__mmask16>(a.m & b.m)}; }
inline bool any(Mask a) { return a.m != 0; }
inline Vec keep(Mask m, Vec x) { return {_mm512_maskz_mov_ps(m.m, x.v)}; }
inline Vec select(Mask m, Vec a, Vec b) { return {_mm512_mask_blend_ps(m.m, b.v, a.v)}; }
inline Vec add_where(Mask m, Vec sum, Vec x) {
  return {_mm512_mask_add_ps(sum.v, m.m, sum.v, x.v)};
}
// As with max(), a NaN in b is kept, one in a is lost.
inline Vec min(Vec a, Vec b) { return {_mm512_min_ps(a.v, b.v)}; }
inline Vec abs(Vec x) { return {_mm512_abs_ps(x.v)}; }

#elif defined(__AVX2__)

struct Mask {
  __m256 m;
};
inline Mask all_lanes() { return {_mm256_castsi256_ps(_mm256_set1_epi32(-1))}; }
inline Mask load_mask(const bool* p) {
  const __m256i wide = _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)p));
  return {_mm256_castsi256_ps(_mm256_cmpgt_epi32(wide, _mm256_setzero_si256()))};
}
inline Mask less(Vec a, Vec b) { return {_mm256_cmp_ps(a.v, b.v, _CMP_LT_OQ)}; }
inline Mask less_equal(Vec a, Vec b) { return {_mm256_cmp_ps(a.v, b.v, _CMP_LE_OQ)}; }
inline Mask equal(Vec a, Vec b) { return {_mm256_cmp_ps(a.v, b.v, _CMP_EQ_OQ)}; }
inline Mask equal_or_nan(Vec a, Vec b) { return {_mm256_cmp_ps(a.v, b.v, _CMP_EQ_UQ)}; }
inline Mask both(Mask a, Mask b) { return {_mm256_and_ps(a.m, b.m)}; }
inline bool any(Mask a) { return _mm256_movemask_ps(a.m) != 0; }
inline Vec keep(Mask m, Vec x) { return {_mm256_and_ps(m.m, x.v)}; }
inline Vec select(Mask m, Vec a, Vec b) { return {_mm256_blendv_ps(b.v, a.v, m.m)}; }
inline Vec add_where(Mask m, Vec sum, Vec x) { return add(sum, keep(m, x)); }
inline Vec min(Vec a, Vec b) { return {_mm256_min_ps(a.v, b.v)}; }
inline Vec abs(Vec x) { return {_mm256_andnot_ps(_mm256_set1_ps(-0.0f), x.v)}; }

#else

struct Mask {
  Vec::Bits m;
};
inline Mask all_lanes() { return {Vec::Bits{} - 1u}; }
inline Mask load_mask(const bool* p) {
  Mask out;
  for (int i = 0; i < Vec::kWidth; ++i) out.m[i] = p[i] ? ~0u : 0u;
  return out;
}
inline Mask less(Vec a, Vec b) { return {(Vec::Bits)(a.v < b.v)}; }
inline Mask less_equal(Vec a, Vec b) { return {(Vec::Bits)(a.v <= b.v)}; }
inline Mask equal(Vec a, Vec b) { return {(Vec::Bits)(a.v == b.v)}; }
inline Mask equal_or_nan(Vec a, Vec b) {
  return {~((Vec::Bits)(a.v < b.v) | (Vec::Bits)(b.v < a.v))};
}
inline Mask both(Mask a, Mask b) { return {a.m & b.m}; }
inline bool any(Mask a) { return (a.m[0] | a.m[1] | a.m[2] | a.m[3]) != 0; }
inline Vec keep(Mask m, Vec x) { return {(Vec::Lanes)(m.m & (Vec::Bits)x.v)}; }
inline Vec select(Mask m, Vec a, Vec b) {
  return {(Vec::Lanes)((m.m & (Vec::Bits)a.v) | (~m.m & (Vec::Bits)b.v))};
}
inline Vec add_where(Mask m, Vec sum, Vec x) { return add(sum, keep(m, x)); }
inline Vec min(Vec a, Vec b) { return {a.v < b.v ? a.v : b.v}; }
inline Vec abs(Vec x) { return {(Vec::Lanes)((Vec::Bits)x.v & 0x7fffffffu)}; }

#endif

}  // namespace vcr1::cpu::VCR1_ISA

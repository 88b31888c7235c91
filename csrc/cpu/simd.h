// Vectors of floats for the instruction set a kernel file is compiled for: Vec, loads and stores of
// fp32, bf16 and fp16, e^x and 2^x. Include it only from files built by vcr1_cpu_kernel().
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "../dtype.h"

#if defined(__AVX512F__) || defined(__AVX2__)
#include <immintrin.h>
#endif

// For functions of arrays of vectors, which a call would pass through memory.
#define VCR1_INLINE __attribute__((always_inline)) inline

namespace vcr1::cpu::VCR1_ISA {

#if defined(__AVX512F__)

struct Vec {
  static constexpr int kWidth = 16;
  __m512 v;
};
struct Pair {
  Vec a, b;
};
inline Vec splat(float x) { return {_mm512_set1_ps(x)}; }
inline Vec load(const float* p) { return {_mm512_loadu_ps(p)}; }
inline Vec load(const BFloat16* p) {
  const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p));
  return {_mm512_castsi512_ps(_mm512_slli_epi32(wide, 16))};
}
inline Vec load(const Float16* p) {
  return {_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p))};
}
// To the upper half of each lane. Rounding would carry a NaN whose payload is all ones into the
// sign.
inline __m512i round_to_bf16(Vec x) {
  const __m512i bits = _mm512_castps_si512(x.v);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  return _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
}
inline __m256i narrow(Vec x, BFloat16*) {
  const __mmask16 nan = _mm512_cmp_ps_mask(x.v, x.v, _CMP_UNORD_Q);
  const __m512i rounded =
      _mm512_mask_mov_epi32(round_to_bf16(x), nan, _mm512_set1_epi32(0x7fc00000));
  return _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded, 16));
}
inline __m256i narrow(Vec x, Float16*) {
  return _mm512_cvtps_ph(x.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
inline void store(float* p, Vec x) { _mm512_storeu_ps(p, x.v); }
inline void store(BFloat16* p, Vec x) { _mm256_storeu_si256((__m256i*)p, narrow(x, p)); }
inline void store(Float16* p, Vec x) { _mm256_storeu_si256((__m256i*)p, narrow(x, p)); }
inline void stream(float* p, Vec x) { _mm512_stream_ps(p, x.v); }
inline void stream(Float16* p, Vec x) { _mm256_stream_si256((__m256i*)p, narrow(x, p)); }
inline Pair load_pair(const BFloat16* p) {
  const __m512i both = _mm512_loadu_si512(p);
  const __m512i odd = _mm512_and_si512(both, _mm512_set1_epi32(-0x10000));
  return {{_mm512_castsi512_ps(_mm512_slli_epi32(both, 16))}, {_mm512_castsi512_ps(odd)}};
}
inline __m512i narrow(Pair x) {
  const __m512i even = _mm512_srli_epi32(round_to_bf16(x.a), 16);
  return _mm512_mask_blend_epi16(0xaaaaaaaa, even, round_to_bf16(x.b));
}
inline void store_pair(BFloat16* p, Pair x) { _mm512_storeu_si512(p, narrow(x)); }
inline void stream_pair(BFloat16* p, Pair x) { _mm512_stream_si512((__m512i*)p, narrow(x)); }
inline Vec add(Vec a, Vec b) { return {_mm512_add_ps(a.v, b.v)}; }
inline Vec sub(Vec a, Vec b) { return {_mm512_sub_ps(a.v, b.v)}; }
inline Vec mul(Vec a, Vec b) { return {_mm512_mul_ps(a.v, b.v)}; }
inline Vec fma(Vec a, Vec b, Vec c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
// A NaN in b is kept, one in a is lost.
inline Vec max(Vec a, Vec b) { return {_mm512_max_ps(a.v, b.v)}; }
inline float reduce_max(Vec a) { return _mm512_reduce_max_ps(a.v); }
inline float reduce_add(Vec a) { return _mm512_reduce_add_ps(a.v); }
// p * 2^n, and 0 where x < bound; n holds whole numbers, t is n + kRoundMagic.
inline Vec scale_or_zero(Vec p, Vec n, Vec, Vec x, Vec bound) {
  const __mmask16 keep = _mm512_cmp_ps_mask(x.v, bound.v, _CMP_NLT_UQ);
  return {_mm512_maskz_scalef_ps(keep, p.v, n.v)};
}
// y = n + f with n = floor(y), which scale_or_zero() takes from y itself.
struct Split {
  Vec n, t, f;
};
inline Split split(Vec y) { return {y, y, {_mm512_reduce_ps(y.v, _MM_FROUND_TO_NEG_INF)}}; }
// 2^f for 0 <= f <= 1 less its constant 1; relative error of the whole 2.1e-9.
constexpr float kExp2[] = {0x1.62e42cp-1f, 0x1.ebfd3ap-3f,  0x1.c68af6p-5f,
                           0x1.3cfd82p-7f, 0x1.47373ap-10f, 0x1.c4456ep-13f};
inline void prefetch(const void* p) { _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T0); }
inline void fence() { _mm_sfence(); }
constexpr int kStreamAlign = 64;

#elif defined(__AVX2__)

struct Vec {
  static constexpr int kWidth = 8;
  __m256 v;
};
struct Pair {
  Vec a, b;
};
inline Vec splat(float x) { return {_mm256_set1_ps(x)}; }
inline Vec load(const float* p) { return {_mm256_loadu_ps(p)}; }
inline Vec load(const BFloat16* p) {
  const __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p));
  return {_mm256_castsi256_ps(_mm256_slli_epi32(wide, 16))};
}
inline Vec load(const Float16* p) { return {_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p))}; }
// To the upper half of each lane. Rounding would carry a NaN whose payload is all ones into the
// sign.
inline __m256i round_to_bf16(Vec x) {
  const __m256i bits = _mm256_castps_si256(x.v);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  return _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd);
}
inline __m128i narrow(Vec x, BFloat16*) {
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(x.v, x.v, _CMP_UNORD_Q));
  __m256i rounded = _mm256_blendv_epi8(round_to_bf16(x), _mm256_set1_epi32(0x7fc00000), nan);
  rounded = _mm256_srli_epi32(rounded, 16);
  const __m256i packed = _mm256_packus_epi32(rounded, rounded);
  return _mm256_castsi256_si128(_mm256_permute4x64_epi64(packed, 0x08));
}
inline __m128i narrow(Vec x, Float16*) {
  return _mm256_cvtps_ph(x.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
inline void store(float* p, Vec x) { _mm256_storeu_ps(p, x.v); }
inline void store(BFloat16* p, Vec x) { _mm_storeu_si128((__m128i*)p, narrow(x, p)); }
inline void store(Float16* p, Vec x) { _mm_storeu_si128((__m128i*)p, narrow(x, p)); }
inline void stream(float* p, Vec x) { _mm256_stream_ps(p, x.v); }
inline void stream(Float16* p, Vec x) { _mm_stream_si128((__m128i*)p, narrow(x, p)); }
inline Pair load_pair(const BFloat16* p) {
  const __m256i both = _mm256_loadu_si256((const __m256i*)p);
  const __m256i odd = _mm256_and_si256(both, _mm256_set1_epi32(-0x10000));
  return {{_mm256_castsi256_ps(_mm256_slli_epi32(both, 16))}, {_mm256_castsi256_ps(odd)}};
}
inline __m256i narrow(Pair x) {
  const __m256i even = _mm256_srli_epi32(round_to_bf16(x.a), 16);
  return _mm256_blend_epi16(even, round_to_bf16(x.b), 0xaa);
}
inline void store_pair(BFloat16* p, Pair x) { _mm256_storeu_si256((__m256i*)p, narrow(x)); }
inline void stream_pair(BFloat16* p, Pair x) { _mm256_stream_si256((__m256i*)p, narrow(x)); }
inline Vec add(Vec a, Vec b) { return {_mm256_add_ps(a.v, b.v)}; }
inline Vec sub(Vec a, Vec b) { return {_mm256_sub_ps(a.v, b.v)}; }
inline Vec mul(Vec a, Vec b) { return {_mm256_mul_ps(a.v, b.v)}; }
inline Vec fma(Vec a, Vec b, Vec c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
inline Vec max(Vec a, Vec b) { return {_mm256_max_ps(a.v, b.v)}; }
inline float reduce_max(Vec a) {
  __m128 x = _mm_max_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
  x = _mm_max_ps(x, _mm_movehl_ps(x, x));
  return _mm_cvtss_f32(_mm_max_ss(x, _mm_shuffle_ps(x, x, 1)));
}
inline float reduce_add(Vec a) {
  __m128 x = _mm_add_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
  x = _mm_add_ps(x, _mm_movehl_ps(x, x));
  return _mm_cvtss_f32(_mm_add_ss(x, _mm_shuffle_ps(x, x, 1)));
}
inline Vec scale_or_zero(Vec p, Vec, Vec t, Vec x, Vec bound) {
  // The low mantissa bits of t hold n: shifted up they are the exponent of 2^n. Multiplying
  // (instead of adding the bits to p's) keeps NaN.
  const __m256i exponent = _mm256_slli_epi32(_mm256_castps_si256(t.v), 23);
  const __m256i power = _mm256_add_epi32(exponent, _mm256_set1_epi32(0x3f800000));
  const __m256 keep = _mm256_cmp_ps(x.v, bound.v, _CMP_NLT_UQ);
  return {_mm256_and_ps(keep, _mm256_mul_ps(p.v, _mm256_castsi256_ps(power)))};
}
inline void prefetch(const void* p) { _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T0); }
inline void fence() { _mm_sfence(); }
constexpr int kStreamAlign = 32;

#else  // Any processor: GCC's and Clang's portable vectors.

struct Vec {
  static constexpr int kWidth = 4;
  typedef float Lanes __attribute__((vector_size(16)));
  typedef uint32_t Bits __attribute__((vector_size(16)));  // unsigned: they may wrap around
  Lanes v;
};
struct Pair {
  Vec a, b;
};
inline Vec splat(float x) { return {Vec::Lanes{x, x, x, x}}; }
inline Vec load(const float* p) {
  Vec out;
  std::memcpy(&out.v, p, sizeof out.v);
  return out;
}
inline float widen(BFloat16 x) {
  const uint32_t bits = uint32_t{x.bits} << 16;
  float out;
  std::memcpy(&out, &bits, sizeof out);
  return out;
}
inline float widen(Float16 x) {
  const uint32_t sign = uint32_t{x.bits & 0x8000u} << 16;
  const uint32_t magnitude = x.bits & 0x7fffu;
  float out;
  if (magnitude >= 0x7c00u) {  // infinity and NaN
    const uint32_t bits = sign | 0x7f800000u | (magnitude & 0x3ffu) << 13;
    std::memcpy(&out, &bits, sizeof out);
    return out;
  }
  if (magnitude < 0x400u) {  // subnormal: an integer multiple of 2^-24
    out = static_cast<float>(magnitude) * 0x1p-24f;
    return sign ? -out : out;
  }
  const uint32_t bits = sign | ((magnitude << 13) + (112u << 23));
  std::memcpy(&out, &bits, sizeof out);
  return out;
}
template <typename Half>
inline Vec load(const Half* p) {
  return {Vec::Lanes{widen(p[0]), widen(p[1]), widen(p[2]), widen(p[3])}};
}
inline void narrow(float x, BFloat16* out) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  out->bits = x != x ? 0x7fc0u : static_cast<uint16_t>((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
}
inline void narrow(float x, Float16* out) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  const uint16_t sign = static_cast<uint16_t>(bits >> 16 & 0x8000u);
  const float size = std::fabs(x);
  if (x != x) {
    out->bits = sign | 0x7e00u;
  } else if (size >= 65520.0f) {
    out->bits = sign | 0x7c00u;
  } else if (size < 0x1p-14f) {
    // 1.5 * 2^23 units of 2^-24: the addition rounds to even at the subnormal's last bit.
    const float shifted = size + 0x1.8p-1f;
    std::memcpy(&bits, &shifted, sizeof bits);
    out->bits = sign | static_cast<uint16_t>(bits & 0x7fffu);
  } else {
    bits &= 0x7fffffffu;
    out->bits =
        sign | static_cast<uint16_t>((bits + 0xfffu + (bits >> 13 & 1u) - (112u << 23)) >> 13);
  }
}
inline void store(float* p, Vec x) { std::memcpy(p, &x.v, sizeof x.v); }
template <typename Half>
inline void store(Half* p, Vec x) {
  for (int i = 0; i < Vec::kWidth; ++i) narrow(x.v[i], p + i);
}
template <typename T>
inline void stream(T* p, Vec x) {
  store(p, x);
}
inline Vec add(Vec a, Vec b) { return {a.v + b.v}; }
inline Vec sub(Vec a, Vec b) { return {a.v - b.v}; }
inline Vec mul(Vec a, Vec b) { return {a.v * b.v}; }
inline Vec fma(Vec a, Vec b, Vec c) { return {a.v * b.v + c.v}; }
inline Vec max(Vec a, Vec b) { return {a.v > b.v ? a.v : b.v}; }
inline float reduce_max(Vec a) {
  float out = a.v[0];
  for (int i = 1; i < Vec::kWidth; ++i) out = out > a.v[i] ? out : a.v[i];
  return out;
}
inline float reduce_add(Vec a) { return (a.v[0] + a.v[2]) + (a.v[1] + a.v[3]); }
inline Vec scale_or_zero(Vec p, Vec, Vec t, Vec x, Vec bound) {
  const Vec::Bits exponent = (Vec::Bits)t.v << 23;
  const Vec::Bits power = exponent + 0x3f800000u;
  const auto drop = (Vec::Bits)(x.v < bound.v);
  return {(Vec::Lanes)((Vec::Bits)(p.v * (Vec::Lanes)power) & ~drop)};
}
inline void prefetch(const void* p) { __builtin_prefetch(p); }
inline void fence() {}
constexpr int kStreamAlign = 16;

#endif

// 2 * kWidth elements, for each dtype in its own order: bf16's are cheapest as the even ones
// and the odd ones. A NaN given to store_pair() must have a clear low half, as those have that come
// from a half or from arithmetic on numbers.
template <typename T>
inline Pair load_pair(const T* p) {
  return {load(p), load(p + Vec::kWidth)};
}
template <typename T>
inline void store_pair(T* p, Pair x) {
  store(p, x.a);
  store(p + Vec::kWidth, x.b);
}
template <typename T>
inline void stream_pair(T* p, Pair x) {
  stream(p, x.a);
  stream(p + Vec::kWidth, x.b);
}

inline float as_float(float x) { return x; }
template <typename Half>
inline float as_float(Half x) {
  Half lanes[Vec::kWidth] = {x};
  float out[Vec::kWidth];
  store(out, load(lanes));
  return out[0];
}

// The first n elements, the others `fill`. n may be beyond kWidth: then all are there.
template <typename T>
inline Vec load_partial(const T* p, int n, float fill) {
  if (n >= Vec::kWidth) return load(p);
  T lanes[Vec::kWidth];
  store(lanes, splat(fill));
  for (int i = 0; i < n; ++i) lanes[i] = p[i];
  return load(lanes);
}
template <typename T>
inline void store_partial(T* p, Vec x, int n) {
  if (n >= Vec::kWidth) return store(p, x);
  T lanes[Vec::kWidth];
  store(lanes, x);
  for (int i = 0; i < n; ++i) p[i] = lanes[i];
}

// e^x to within 1 ulp for x <= 88; exactly 0 below kExpLow, NaN for NaN. Of n vectors in step, so
// that the multiplications of one fill the waits of another.
constexpr float kExpLow = -86.5f;
template <int n>
inline void exp(const Vec (&x)[n], Vec (&out)[n]) {
  // x = n ln 2 + r with |r| <= ln 2 / 2. Adding 1.5 * 2^23 rounds to the nearest whole number; ln 2
  // in two parts keeps r exact. The polynomial is the minimax one of e^r, relative error 1.9e-9.
  constexpr float kTerms[] = {
      0x1.6ab96ep-10f, 0x1.126d1ep-7f, 0x1.55589ap-5f, 0x1.55540ap-3f, 0x1.fffffap-2f, 1.0f, 1.0f};
  const Vec magic = splat(0x1.8p23f);
  Vec t[n], whole[n], r[n];
  for (int k = 0; k < n; ++k) t[k] = fma(x[k], splat(0x1.715476p+0f), magic);
  for (int k = 0; k < n; ++k) whole[k] = sub(t[k], magic);
  for (int k = 0; k < n; ++k) r[k] = fma(whole[k], splat(-0x1.62e4p-1f), x[k]);
  for (int k = 0; k < n; ++k) r[k] = fma(whole[k], splat(-0x1.7f7d1cp-20f), r[k]);
  for (int k = 0; k < n; ++k) out[k] = splat(kTerms[0]);
  for (int j = 1; j < 7; ++j)
    for (int k = 0; k < n; ++k) out[k] = fma(out[k], r[k], splat(kTerms[j]));
  for (int k = 0; k < n; ++k) out[k] = scale_or_zero(out[k], whole[k], t[k], x[k], splat(kExpLow));
}
inline Vec exp(Vec x) {
  const Vec from[] = {x};
  Vec out[1];
  exp(from, out);
  return out[0];
}

#if !defined(__AVX512F__)
// y = n + f with n the nearest whole number; t is n + kRoundMagic.
struct Split {
  Vec n, t, f;
};
inline Split split(Vec y) {
  const Vec t = add(y, splat(0x1.8p23f));
  const Vec n = sub(t, splat(0x1.8p23f));
  return {n, t, sub(y, n)};
}
// 2^f for |f| <= 1/2 less its constant 1; relative error of the whole 3.0e-9.
constexpr float kExp2[] = {0x1.62e430p-1f, 0x1.ebfbdcp-3f,  0x1.c6af7cp-5f,
                           0x1.3b2de0p-7f, 0x1.5f082ep-10f, 0x1.416b52p-13f};
#endif

// factor * 2^y for y <= 127; exactly 0 below kExp2Low, NaN for NaN, `factor` itself at 0. To within
// 1 ulp of the y given: exp() is the better one where |y| is large and known better than to an ulp.
constexpr float kExp2Low = -126.0f;
class Exp2 {
 public:
  explicit Exp2(float factor) : constant_(splat(factor)) {
    for (int i = 0; i < 6; ++i) c_[i] = splat(kExp2[i] * factor);
  }
  // Step by step for all N: a chain of ten operations at a time would fill the scheduler with
  // waiting ones before enough chains are in flight.
  template <int N>
  VCR1_INLINE void operator()(const Vec (&y)[N], Vec (&out)[N]) const {
    Split s[N];
    Vec p[N];
    for (int i = 0; i < N; ++i) s[i] = split(y[i]);
    for (int i = 0; i < N; ++i) p[i] = c_[5];
    for (int c = 4; c >= 0; --c)
      for (int i = 0; i < N; ++i) p[i] = fma(p[i], s[i].f, c_[c]);
    for (int i = 0; i < N; ++i) p[i] = fma(p[i], s[i].f, constant_);
    for (int i = 0; i < N; ++i) out[i] = scale_or_zero(p[i], s[i].n, s[i].t, y[i], splat(kExp2Low));
  }

 private:
  Vec c_[6], constant_;
};

}  // namespace vcr1::cpu::VCR1_ISA

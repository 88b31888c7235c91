// Products of small tiles, of which attention is made. A block of kRows queries lies along the
// vectors' lanes, one query to a lane, in columns[dim][kRows]; keys and values stay rows of
// numbers, each of which is multiplied with whole vectors. Maxima and sums over keys are then taken
// lane by lane. Include it only from files built by vcr1_cpu_kernel().
#pragma once

#include <type_traits>

#include "../kernels.h"
#include "simd_double.h"
#include "simd_mask.h"

namespace vcr1::cpu::VCR1_ISA {

constexpr int kRows = kGroupAttentionRows;  // queries of a block

template <typename S>
struct VecOf {
  using type = Vec;
};
template <>
struct VecOf<double> {
  using type = DoubleVec;
};

// Rows that are multiplied together: with two vectors each, their sums fill the registers.
#if defined(__AVX512F__)
constexpr int kTile = 8;
#else
constexpr int kTile = 4;
#endif

// Four rows of four numbers to four columns, each row times `factor`.
inline void transpose4(const float* from, int stride, float factor, float* to, int to_stride) {
  typedef float Four __attribute__((vector_size(16)));
  Four x[4];
  for (int i = 0; i < 4; ++i) {
    std::memcpy(&x[i], from + i * stride, sizeof x[i]);
    x[i] *= factor;
  }
  const Four a = __builtin_shufflevector(x[0], x[1], 0, 4, 1, 5);
  const Four b = __builtin_shufflevector(x[2], x[3], 0, 4, 1, 5);
  const Four c = __builtin_shufflevector(x[0], x[1], 2, 6, 3, 7);
  const Four d = __builtin_shufflevector(x[2], x[3], 2, 6, 3, 7);
  x[0] = __builtin_shufflevector(a, b, 0, 1, 4, 5);
  x[1] = __builtin_shufflevector(a, b, 2, 3, 6, 7);
  x[2] = __builtin_shufflevector(c, d, 0, 1, 4, 5);
  x[3] = __builtin_shufflevector(c, d, 2, 3, 6, 7);
  for (int i = 0; i < 4; ++i) std::memcpy(to + i * to_stride, &x[i], sizeof x[i]);
}
inline void transpose4(const double* from, int stride, double factor, double* to, int to_stride) {
  for (int i = 0; i < 4; ++i)
    for (int j = 0; j < 4; ++j) to[j * to_stride + i] = from[i * stride + j] * factor;
}

// to[m][n] = from[n][m]^T factor, in multiples of four.
template <typename S>
void transpose(const S* from, int n, int m, S factor, S* to) {
  for (int i = 0; i < n; i += 4)
    for (int j = 0; j < m; j += 4) transpose4(from + i * m + j, m, factor, to + j * n + i, n);
}

// fn(constant, i) for pieces of kTile, 2 and 1 that make up [0, n).
template <typename Fn>
VCR1_INLINE void for_tiles(int n, Fn&& fn) {
  int i = 0;
  for (; i + kTile <= n; i += kTile) fn(std::integral_constant<int, kTile>{}, i);
  for (; i + 2 <= n; i += 2) fn(std::integral_constant<int, 2>{}, i);
  if (i < n) fn(std::integral_constant<int, 1>{}, i);
}

// out[n][kRows] = rows[n][dim] columns[dim][kRows], rows `stride` apart.
template <typename S>
void multiply_columns(const S* rows, int n, int stride, const S* columns, int dim, S* out) {
  using V = typename VecOf<S>::type;
  constexpr int w = V::kWidth;
  for_tiles(n, [&](auto tile, int first) {
    constexpr int kN = decltype(tile)::value;
    for (int lane = 0; lane < kRows; lane += 2 * w) {
      V sums[kN][2];
      for (int i = 0; i < kN; ++i) sums[i][0] = sums[i][1] = splat(S(0));
      const S* const x = rows + first * stride;
      const S* const y = columns + lane;
      for (int d = 0; d < dim; ++d) {
        const V a = load(y + d * kRows), b = load(y + d * kRows + w);
        for (int i = 0; i < kN; ++i) {
          const V each = splat(x[i * stride + d]);
          sums[i][0] = fma(each, a, sums[i][0]);
          sums[i][1] = fma(each, b, sums[i][1]);
        }
      }
      for (int i = 0; i < kN; ++i) {
        store(out + (first + i) * kRows + lane, sums[i][0]);
        store(out + (first + i) * kRows + lane + w, sums[i][1]);
      }
    }
  });
}

// Sums of a tile are added to what is there as one: thousands of terms one by one would each round.
//
// out[dim][kRows] += rows[n][dim]^T weights[n][kRows]; dim is a multiple of kTile.
template <typename S>
void add_columns(const S* rows, int n, int stride, const S* weights, int dim, S* out) {
  using V = typename VecOf<S>::type;
  constexpr int w = V::kWidth;
  for (int first = 0; first < dim; first += kTile)
    for (int lane = 0; lane < kRows; lane += 2 * w) {
      S* const to = out + first * kRows + lane;
      V sums[kTile][2];
      for (int i = 0; i < kTile; ++i) sums[i][0] = sums[i][1] = splat(S(0));
      for (int j = 0; j < n; ++j) {
        const V a = load(weights + j * kRows + lane), b = load(weights + j * kRows + lane + w);
        const S* const x = rows + j * stride + first;
        for (int i = 0; i < kTile; ++i) {
          const V each = splat(x[i]);
          sums[i][0] = fma(each, a, sums[i][0]);
          sums[i][1] = fma(each, b, sums[i][1]);
        }
      }
      for (int i = 0; i < kTile; ++i)
        for (int k = 0; k < 2; ++k) {
          S* const at = to + i * kRows + k * w;
          store(at, add(load(at), sums[i][k]));
        }
    }
}

// out[n][dim] += weights[n][kRows] rows[kRows][dim], of which `used` rows count.
template <int kVecs, typename S>
VCR1_INLINE void add_rows_of(const S* weights, int n, const S* rows, int used, int stride, S* out) {
  using V = typename VecOf<S>::type;
  constexpr int w = V::kWidth;
  for_tiles(n, [&](auto tile, int first) {
    constexpr int kN = decltype(tile)::value;
    S* const to = out + first * stride;
    const S* const by = weights + first * kRows;
    V sums[kN][kVecs];
    for (int i = 0; i < kN; ++i)
      for (int k = 0; k < kVecs; ++k) sums[i][k] = splat(S(0));
    for (int r = 0; r < used; ++r) {
      V x[kVecs];
      for (int k = 0; k < kVecs; ++k) x[k] = load(rows + r * stride + k * w);
      for (int i = 0; i < kN; ++i) {
        const V each = splat(by[i * kRows + r]);
        for (int k = 0; k < kVecs; ++k) sums[i][k] = fma(each, x[k], sums[i][k]);
      }
    }
    for (int i = 0; i < kN; ++i)
      for (int k = 0; k < kVecs; ++k) {
        S* const at = to + i * stride + k * w;
        store(at, add(load(at), sums[i][k]));
      }
  });
}

template <typename S>
void add_rows(const S* weights, int n, const S* rows, int used, int dim, S* out) {
  constexpr int w = VecOf<S>::type::kWidth;
  int d = 0;
  for (; d + 2 * w <= dim; d += 2 * w) add_rows_of<2>(weights, n, rows + d, used, dim, out + d);
  for (; d < dim; d += w) add_rows_of<1>(weights, n, rows + d, used, dim, out + d);
}

// 2^x of four vectors; of doubles by the C library, lane by lane.
VCR1_INLINE void exp2_of(const Vec (&x)[4], Vec (&out)[4]) { Exp2(1.0f)(x, out); }
VCR1_INLINE void exp2_of(const DoubleVec (&x)[4], DoubleVec (&out)[4]) {
  for (int k = 0; k < 4; ++k)
    for (int i = 0; i < DoubleVec::kWidth; ++i) out[k].v[i] = std::exp2(x[k].v[i]);
}

}  // namespace vcr1::cpu::VCR1_ISA

// IoU of two boxes, or spans (boxes of height one), and of two sets of spans: the same source for
// CPU loops and CUDA kernels; see vcr1_fast/ops/iou.py for the maths. Both are compiled without
// fused multiply-adds: of a b + c d only one product would be rounded, and IoU(x, y) would differ
// from IoU(y, x). Everything has internal linkage: it is compiled once per instruction set.
#pragma once

#include <cfloat>

#include "kernels.h"

namespace vcr1::iou {

template <typename T>
struct Box {
  T x0, y0, x1, y1;
  T angle;  // atan(w / h), for CIoU
};

template <typename T>
VCR1_HOST_DEVICE static inline T smaller(T a, T b) {
  return a < b ? a : b;
}
template <typename T>
VCR1_HOST_DEVICE static inline T larger(T a, T b) {
  return a > b ? a : b;
}
template <typename T>
VCR1_HOST_DEVICE static inline T at_least_zero(T a) {
  return a < T(0) ? T(0) : a;  // NaN stays NaN
}

// a / b; unless exact, 0 where b is not positive and finite. The division always has a safe
// operand: it may then be taken for all lanes. kChecked: a is NaN only where b is; to test it all
// the same makes GCC split the control flow of the loop over spans.
template <bool kExact, bool kChecked = false, typename T>
VCR1_HOST_DEVICE static inline T ratio(T a, T b) {
  if constexpr (kExact) return a / b;
  constexpr T kLargest = static_cast<T>(sizeof(T) == sizeof(float) ? FLT_MAX : DBL_MAX);
  const bool usable = (b > T(0)) & (b <= kLargest) & (kChecked || a == a);
  const T quotient = a / (usable ? b : T(1));
  return usable ? quotient : T(0);
}

template <IouKind kKind, bool kExact, typename T>
VCR1_HOST_DEVICE static inline T overlap(const Box<T>& a, const Box<T>& b) {
  T width_a = a.x1 - a.x0, height_a = a.y1 - a.y0, width_b = b.x1 - b.x0, height_b = b.y1 - b.y0;
  if constexpr (!kExact) {
    width_a = at_least_zero(width_a), height_a = at_least_zero(height_a);
    width_b = at_least_zero(width_b), height_b = at_least_zero(height_b);
  }
  const T shared = at_least_zero(smaller(a.x1, b.x1) - larger(a.x0, b.x0)) *
                   at_least_zero(smaller(a.y1, b.y1) - larger(a.y0, b.y0));
  const T united = width_a * height_a + width_b * height_b - shared;
  const T iou = ratio<kExact, true>(shared, united);
  if constexpr (kKind == IouKind::kIou || kKind == IouKind::kSpan) return iou;

  T x0 = smaller(a.x0, b.x0), y0 = smaller(a.y0, b.y0);
  T x1 = larger(a.x1, b.x1), y1 = larger(a.y1, b.y1);
  if constexpr (!kExact) {  // reversed corners, too
    x0 = smaller(x0, smaller(a.x1, b.x1)), y0 = smaller(y0, smaller(a.y1, b.y1));
    x1 = larger(x1, larger(a.x0, b.x0)), y1 = larger(y1, larger(a.y0, b.y0));
  }
  const T width = at_least_zero(x1 - x0), height = at_least_zero(y1 - y0);
  if constexpr (kKind == IouKind::kGiou) {
    const T hull = width * height;
    return iou - ratio<kExact>(hull - united, hull);
  }
  const T eps = kExact ? T(1e-7) : T(0);
  const T dx = (a.x0 + a.x1) / 2 - (b.x0 + b.x1) / 2, dy = (a.y0 + a.y1) / 2 - (b.y0 + b.y1) / 2;
  const T diou = iou - ratio<kExact>(dx * dx + dy * dy, width * width + height * height + eps);
  if constexpr (kKind == IouKind::kDiou) return diou;

  const T angle = a.angle - b.angle;
  const T v = T(0.405284734569351085775) * (angle * angle);  // 4 / pi^2
  const T penalty = ratio<kExact>(v, 1 - iou + v + eps) * v;
  if constexpr (kExact) return diou - penalty;
  // One select at the end: earlier, GCC splits the control flow of the loop over pairs.
  return diou - (v == v ? penalty : T(0));
}

struct Span {
  double start, end;
};

// Drops empty spans, sorts by the start, and joins what overlaps; returns how many disjoint spans
// are left. sort(begin, end): the order of equal starts does not matter.
template <typename Sort>
VCR1_HOST_DEVICE static inline int64_t merge(Span* spans, int64_t n, Sort sort) {
  int64_t kept = 0;
  for (int64_t i = 0; i < n; ++i)
    if (spans[i].end > spans[i].start) spans[kept++] = spans[i];
  sort(spans, spans + kept);
  int64_t merged = 0;
  for (int64_t i = 0; i < kept; ++i) {
    if (merged > 0 && spans[i].start <= spans[merged - 1].end)
      spans[merged - 1].end = larger(spans[merged - 1].end, spans[i].end);
    else
      spans[merged++] = spans[i];
  }
  return merged;
}

// A sum with its rounding errors carried along (Knuth's two-sum): for the few terms of a set or a
// track the result is the correctly rounded one, whatever their order, as that of Python's fsum.
// Needs a compiler that neither reorders additions nor fuses them.
struct ExactSum {
  double high = 0, low = 0;

  VCR1_HOST_DEVICE void add(double term) {
    const double sum = high + term, added = sum - high;
    low += (high - (sum - added)) + (term - added);
    high = sum;
  }
  VCR1_HOST_DEVICE double value() const { return high + low; }
};

// IoU of two sets of disjoint spans in order.
VCR1_HOST_DEVICE static inline double overlap(const Span* p, int64_t n, const Span* t, int64_t m,
                                              double empty) {
  ExactSum length_p, length_t, common;
  for (int64_t k = 0; k < n; ++k) length_p.add(p[k].end - p[k].start);
  for (int64_t k = 0; k < m; ++k) length_t.add(t[k].end - t[k].start);
  for (int64_t j = 0, k = 0; j < n && k < m;) {
    common.add(at_least_zero(smaller(p[j].end, t[k].end) - larger(p[j].start, t[k].start)));
    if (p[j].end < t[k].end)
      ++j;
    else
      ++k;
  }
  const double shared = common.value(), united = length_p.value() + length_t.value() - shared;
  return united == 0 ? empty : smaller(ratio<false>(shared, united), 1.0);
}

}  // namespace vcr1::iou

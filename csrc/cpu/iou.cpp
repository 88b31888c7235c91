// IoU of boxes and spans (a span is a box of height one), of tracks and of sets of spans.
//
// Boxes come as planes (x0[], y0[], x1[], y1[], and for CIoU atan(w / h)[]), so that the loop over
// pairs is straight-line code which the compiler turns into vectors.
#include <algorithm>
#include <limits>
#include <type_traits>

#include "../kernels.h"
#include "parallel.h"

namespace vcr1::cpu::VCR1_ISA {

template <typename T>
struct Box {
  T x0, y0, x1, y1, angle;
};

template <typename T, IouKind kKind>
inline Box<T> load(const T* planes, int64_t n, int64_t i) {
  if constexpr (kKind == IouKind::kSpan)
    return {planes[i], T(0), planes[n + i], T(1), T(0)};
  else
    return {planes[i], planes[n + i], planes[2 * n + i], planes[3 * n + i],
            kKind == IouKind::kCiou ? planes[4 * n + i] : T(0)};
}

template <typename T>
inline T smaller(T a, T b) {
  return a < b ? a : b;
}
template <typename T>
inline T larger(T a, T b) {
  return a > b ? a : b;
}
template <typename T>
inline T at_least_zero(T a) {
  return a < T(0) ? T(0) : a;  // NaN stays NaN
}

// a / b; unless exact, 0 where b is not positive and finite. The division always has a safe
// operand: it may then be taken for all lanes.
template <bool kExact, typename T>
inline T ratio(T a, T b) {
  if constexpr (kExact) return a / b;
  const bool usable = (b > T(0)) & (b <= std::numeric_limits<T>::max()) & (a == a);
  const T quotient = a / (usable ? b : T(1));
  return usable ? quotient : T(0);
}

template <IouKind kKind, bool kExact, typename T>
inline T overlap(const Box<T>& a, const Box<T>& b) {
  T width_a = a.x1 - a.x0, height_a = a.y1 - a.y0, width_b = b.x1 - b.x0, height_b = b.y1 - b.y0;
  if constexpr (!kExact) {
    width_a = at_least_zero(width_a), height_a = at_least_zero(height_a);
    width_b = at_least_zero(width_b), height_b = at_least_zero(height_b);
  }
  const T shared = at_least_zero(smaller(a.x1, b.x1) - larger(a.x0, b.x0)) *
                   at_least_zero(smaller(a.y1, b.y1) - larger(a.y0, b.y0));
  const T united = width_a * height_a + width_b * height_b - shared;
  const T iou = ratio<kExact>(shared, united);
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
  return diou - (v == v ? penalty : T(0));
}

template <IouKind kKind, bool kExact, typename T>
inline void run(const BoxIouArgs& args, int num_threads) {
  const auto *a = static_cast<const T*>(args.a), *b = static_cast<const T*>(args.b);
  auto* const out = static_cast<T*>(args.out);
  const int64_t n = args.n, m = args.m;
  if (!args.pairwise) {
    parallel_for(n, 4096, num_threads, [=](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i)
        out[i] = overlap<kKind, kExact>(load<T, kKind>(a, n, i), load<T, kKind>(b, n, i));
    });
    return;
  }
  parallel_for(n, 4096 / (m + 1) + 1, num_threads, [=](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const Box<T> box = load<T, kKind>(a, n, i);
      T* row = out + i * m;
      for (int64_t j = 0; j < m; ++j) row[j] = overlap<kKind, kExact>(box, load<T, kKind>(b, m, j));
    }
  });
}

template <typename T>
inline void run_kind(const BoxIouArgs& args, int num_threads) {
  const auto pick = [&](auto exact) {
    constexpr bool kExact = decltype(exact)::value;
    switch (args.kind) {
      case IouKind::kSpan:
        return run<IouKind::kSpan, kExact, T>(args, num_threads);
      case IouKind::kIou:
        return run<IouKind::kIou, kExact, T>(args, num_threads);
      case IouKind::kGiou:
        return run<IouKind::kGiou, kExact, T>(args, num_threads);
      case IouKind::kDiou:
        return run<IouKind::kDiou, kExact, T>(args, num_threads);
      case IouKind::kCiou:
        return run<IouKind::kCiou, kExact, T>(args, num_threads);
    }
  };
  if (args.torchvision) return pick(std::true_type{});
  pick(std::false_type{});
}

void box_iou(const BoxIouArgs& args, int num_threads) {
  if (args.dtype == DType::kFloat64) return run_kind<double>(args, num_threads);
  run_kind<float>(args, num_threads);
}

template <typename T>
inline void run_tracks(const TrackIouArgs& args, int num_threads) {
  const auto *pred = static_cast<const T*>(args.pred), *target = static_cast<const T*>(args.target);
  parallel_for(args.batch, 256, num_threads, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      double sum = 0;
      for (int64_t k = 0; k < args.lengths[i]; ++k) {
        const T* p = pred + (i * args.steps + k) * 4;
        const T* t = target + (i * args.steps + k) * 4;
        sum += overlap<IouKind::kIou, false>(Box<T>{p[0], p[1], p[2], p[3], T(0)},
                                             Box<T>{t[0], t[1], t[2], t[3], T(0)});
      }
      const double count = args.lengths[i] > 0 ? static_cast<double>(args.lengths[i]) : 1.0;
      static_cast<T*>(args.out)[i] = static_cast<T>(sum / count);
    }
  });
}

void track_iou(const TrackIouArgs& args, int num_threads) {
  if (args.dtype == DType::kFloat64) return run_tracks<double>(args, num_threads);
  run_tracks<float>(args, num_threads);
}

struct Span {
  double start, end;
};

// Drops empty spans, sorts, and joins what overlaps; returns how many disjoint spans are left.
inline int64_t merge(Span* spans, int64_t n) {
  int64_t kept = 0;
  for (int64_t i = 0; i < n; ++i)
    if (spans[i].end > spans[i].start) spans[kept++] = spans[i];
  std::sort(spans, spans + kept, [](const Span& a, const Span& b) { return a.start < b.start; });
  int64_t merged = 0;
  for (int64_t i = 0; i < kept; ++i) {
    if (merged > 0 && spans[i].start <= spans[merged - 1].end)
      spans[merged - 1].end = larger(spans[merged - 1].end, spans[i].end);
    else
      spans[merged++] = spans[i];
  }
  return merged;
}

void interval_set_iou(const IntervalSetIouArgs& args, int num_threads) {
  parallel_for(args.n, 64, num_threads, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      auto* const p = reinterpret_cast<Span*>(args.pred) + args.pred_offsets[i];
      auto* const t = reinterpret_cast<Span*>(args.target) + args.target_offsets[i];
      const int64_t n = merge(p, args.pred_offsets[i + 1] - args.pred_offsets[i]);
      const int64_t m = merge(t, args.target_offsets[i + 1] - args.target_offsets[i]);
      double length = 0, shared = 0;
      for (int64_t k = 0; k < n; ++k) length += p[k].end - p[k].start;
      for (int64_t k = 0; k < m; ++k) length += t[k].end - t[k].start;
      for (int64_t j = 0, k = 0; j < n && k < m;) {
        shared += at_least_zero(smaller(p[j].end, t[k].end) - larger(p[j].start, t[k].start));
        if (p[j].end < t[k].end)
          ++j;
        else
          ++k;
      }
      const double united = length - shared;
      args.out[i] = united == 0 ? args.empty : smaller(ratio<false>(shared, united), 1.0);
    }
  });
}

}  // namespace vcr1::cpu::VCR1_ISA

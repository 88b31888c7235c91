// IoU of boxes and spans (a span is a box of height one), of tracks and of sets of spans.
//
// Boxes come as planes (x0[], y0[], x1[], y1[], and for CIoU atan(w / h)[]), so that the loop over
// pairs is straight-line code which the compiler turns into vectors.
#include "../iou.h"

#include <algorithm>
#include <type_traits>

#include "parallel.h"

namespace vcr1::cpu::VCR1_ISA {

using namespace vcr1::iou;

template <typename T, IouKind kKind>
inline Box<T> load(const T* planes, int64_t n, int64_t i) {
  if constexpr (kKind == IouKind::kSpan)
    return {planes[i], T(0), planes[n + i], T(1), T(0)};
  else
    return {planes[i], planes[n + i], planes[2 * n + i], planes[3 * n + i],
            kKind == IouKind::kCiou ? planes[4 * n + i] : T(0)};
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

const auto sort_spans = [](Span* begin, Span* end) {
  std::sort(begin, end, [](const Span& a, const Span& b) { return a.start < b.start; });
};

void interval_set_iou(const IntervalSetIouArgs& args, int num_threads) {
  parallel_for(args.n, 64, num_threads, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      auto* const p = reinterpret_cast<Span*>(args.pred) + args.pred_offsets[i];
      auto* const t = reinterpret_cast<Span*>(args.target) + args.target_offsets[i];
      const int64_t n = merge(p, args.pred_offsets[i + 1] - args.pred_offsets[i], sort_spans);
      const int64_t m = merge(t, args.target_offsets[i + 1] - args.target_offsets[i], sort_spans);
      args.out[i] = overlap(p, n, t, m, args.empty);
    }
  });
}

}  // namespace vcr1::cpu::VCR1_ISA

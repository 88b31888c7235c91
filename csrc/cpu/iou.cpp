// IoU of boxes and spans (a span is a box of height one), of tracks and of sets of spans.
//
// Boxes of all pairs come as planes (x0[], y0[], x1[], y1[], and for CIoU atan(w / h)[]), so that
// the loop over pairs is straight-line code which the compiler turns into vectors; those compared
// once come as they are, because the transposition would cost more than what follows.
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

template <IouKind kKind, typename T>
inline Box<T> load_row(const T* rows, int64_t i) {
  if constexpr (kKind == IouKind::kSpan) return {rows[2 * i], T(0), rows[2 * i + 1], T(1), T(0)};
  return {rows[4 * i], rows[4 * i + 1], rows[4 * i + 2], rows[4 * i + 3], T(0)};
}

template <IouKind kKind, bool kExact, typename T>
inline void run_rows(const T* a, const T* b, T* out, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i)
    out[i] = overlap<kKind, kExact>(load_row<kKind>(a, i), load_row<kKind>(b, i));
}

template <IouKind kKind, bool kExact, typename T>
inline void run(const BoxIouArgs& args, int num_threads) {
  const auto *a = static_cast<const T*>(args.a), *b = static_cast<const T*>(args.b);
  auto* const out = static_cast<T*>(args.out);
  const int64_t n = args.n, m = args.m;
  if (!args.pairwise)
    return parallel_for(n, 16384, num_threads, [=](int64_t begin, int64_t end) {
      if constexpr (kKind == IouKind::kCiou)
        for (int64_t i = begin; i < end; ++i)
          out[i] = overlap<kKind, kExact>(load<T, kKind>(a, n, i), load<T, kKind>(b, n, i));
      else
        run_rows<kKind, kExact>(a, b, out, begin, end);
    });
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

// The IoUs first, of short tracks several together, so that the divisions come as vectors; then
// their sums, in the order of the steps.
template <typename T>
inline void run_tracks(const TrackIouArgs& args, int num_threads) {
  constexpr int64_t kBoxes = 1024;
  const auto *pred = static_cast<const T*>(args.pred), *target = static_cast<const T*>(args.target);
  auto* const out = static_cast<T*>(args.out);
  const int64_t steps = args.steps, piece = steps < kBoxes ? steps : kBoxes;
  const int64_t together = steps > 0 ? kBoxes / piece : kBoxes;
  parallel_for(args.batch, 16384 / (steps + 1) + 1, num_threads, [=](int64_t begin, int64_t end) {
    T iou[kBoxes];
    for (int64_t i = begin, tracks; i < end; i += tracks) {
      tracks = std::min(together, end - i);
      ExactSum sums[kBoxes];
      for (int64_t first = 0; first < steps; first += piece) {
        const int64_t at = (i * steps + first) * 4, count = std::min(piece, steps - first);
        run_rows<IouKind::kIou, false>(pred + at, target + at, iou, 0, tracks * count);
        for (int64_t t = 0; t < tracks; ++t)
          for (int64_t k = 0; k < std::min(count, args.lengths[i + t] - first); ++k)
            sums[t].add(iou[t * count + k]);
      }
      for (int64_t t = 0; t < tracks; ++t) {
        const int64_t length = args.lengths[i + t];
        out[i + t] = static_cast<T>(sums[t].value() / static_cast<double>(length > 0 ? length : 1));
      }
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

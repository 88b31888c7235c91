// IoU of boxes, spans, tracks and sets of spans. The formulae are in iou.h; sums keep the order of
// the CPU kernels, so that the results have their bits (but for CIoU's angles).
//
// Nothing here has run on a GPU yet.
#include <limits>

#include "../iou.h"
#include "common.cuh"

namespace vcr1::cuda {
namespace {

using namespace vcr1::iou;

constexpr int kThreads = 128;
constexpr int kTileRows = 32;  // boxes of `a` in shared memory

__device__ inline float angle_of(float width, float height) { return atan2f(width, height); }
__device__ inline double angle_of(double width, double height) { return atan2(width, height); }

// Box i of (n, 4), or span i of (n, 2).
template <IouKind kKind, bool kExact, typename T>
__device__ inline Box<T> load(const T* rows, int64_t i) {
  if constexpr (kKind == IouKind::kSpan) return {rows[2 * i], T(0), rows[2 * i + 1], T(1), T(0)};
  const T* const row = rows + 4 * i;
  Box<T> box{row[0], row[1], row[2], row[3], T(0)};
  if constexpr (kKind == IouKind::kCiou) {
    const T width = box.x1 - box.x0, height = box.y1 - box.y0;
    box.angle =
        kExact ? atan(width / height) : angle_of(at_least_zero(width), at_least_zero(height));
  }
  return box;
}

template <IouKind kKind, bool kExact, typename T>
__global__ void __launch_bounds__(kThreads)
    paired_kernel(const T* a, const T* b, T* out, const int64_t n) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= n) return;
  out[i] = overlap<kKind, kExact>(load<kKind, kExact>(a, i), load<kKind, kExact>(b, i));
}

// A thread keeps one column's box, and the block's rows pass by in shared memory.
template <IouKind kKind, bool kExact, typename T>
__global__ void __launch_bounds__(kThreads)
    pairwise_kernel(const T* a, const T* b, T* out, const int64_t n, const int64_t m) {
  __shared__ Box<T> rows[kTileRows];
  const int64_t tiles = (m + kThreads - 1) / kThreads;
  const int64_t first = blockIdx.x / tiles * kTileRows;
  const int64_t column = blockIdx.x % tiles * kThreads + threadIdx.x;
  const int count = static_cast<int>(smaller<int64_t>(kTileRows, n - first));
  const int thread = threadIdx.x;
  if (thread < count) rows[thread] = load<kKind, kExact>(a, first + thread);
  __syncthreads();
  if (column >= m) return;
  const Box<T> box = load<kKind, kExact>(b, column);
  for (int i = 0; i < count; ++i)
    out[(first + i) * m + column] = overlap<kKind, kExact>(rows[i], box);
}

// A warp a track: the lanes take a box each, and all add up the results, one after the other.
template <typename T>
__global__ void __launch_bounds__(kThreads) track_kernel(const TrackIouArgs args) {
  const int64_t track = static_cast<int64_t>(blockIdx.x) * (kThreads / 32) + threadIdx.x / 32;
  if (track >= args.batch) return;
  const int lane = threadIdx.x % 32;
  const int64_t length = smaller(at_least_zero(args.lengths[track]), args.steps);
  ExactSum sum;
  for (int64_t k = 0; k < length; k += 32) {
    T value = T(0);
    if (k + lane < length) {
      const int64_t i = track * args.steps + k + lane;
      value = overlap<IouKind::kIou, false>(
          load<IouKind::kIou, false>(static_cast<const T*>(args.pred), i),
          load<IouKind::kIou, false>(static_cast<const T*>(args.target), i));
    }
    const int count = static_cast<int>(smaller<int64_t>(32, length - k));
    for (int i = 0; i < count; ++i) sum.add(static_cast<double>(__shfl_sync(~0u, value, i)));
  }
  const double count = length > 0 ? static_cast<double>(length) : 1.0;
  if (lane == 0) static_cast<T*>(args.out)[track] = static_cast<T>(sum.value() / count);
}

// Heapsort: in place, without recursion, and never worse than n log n.
struct SortSpans {
  __device__ void operator()(Span* begin, Span* end) const {
    int64_t n = end - begin;
    for (int64_t root = n / 2; n > 1;) {
      if (root > 0) {
        --root;  // building the heap
      } else {
        const Span last = begin[--n];
        begin[n] = begin[0];
        begin[0] = last;
      }
      sink(begin, root, n);
    }
  }
  __device__ void sink(Span* spans, int64_t at, int64_t n) const {
    const Span moved = spans[at];
    for (int64_t child = 2 * at + 1; child < n; child = 2 * at + 1) {
      if (child + 1 < n && spans[child].start < spans[child + 1].start) ++child;
      if (!(moved.start < spans[child].start)) break;
      spans[at] = spans[child];
      at = child;
    }
    spans[at] = moved;
  }
};

// A thread a pair of sets. Offsets that fall, or leave the spans, give NaN: to refuse them the host
// would have to wait for their values.
__global__ void __launch_bounds__(kThreads) interval_set_kernel(const IntervalSetIouArgs args) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= args.n) return;
  const int64_t p0 = args.pred_offsets[i], p1 = args.pred_offsets[i + 1];
  const int64_t t0 = args.target_offsets[i], t1 = args.target_offsets[i + 1];
  if (p0 < 0 || p1 < p0 || p1 > args.p || t0 < 0 || t1 < t0 || t1 > args.q) {
    args.out[i] = nan("");
    return;
  }
  auto* const p = reinterpret_cast<Span*>(args.pred) + p0;
  auto* const t = reinterpret_cast<Span*>(args.target) + t0;
  const int64_t n = merge(p, p1 - p0, SortSpans());
  const int64_t m = merge(t, t1 - t0, SortSpans());
  args.out[i] = overlap(p, n, t, m, args.empty);
}

unsigned blocks(const char* op, int64_t n) {
  VCR1_CHECK(n <= std::numeric_limits<int32_t>::max(), op, ": ", n, " blocks are too many");
  return static_cast<unsigned>(n);
}

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

template <IouKind kKind, bool kExact, typename T>
void run(const BoxIouArgs& args, cudaStream_t stream) {
  const auto *a = static_cast<const T*>(args.a), *b = static_cast<const T*>(args.b);
  auto* const out = static_cast<T*>(args.out);
  if (args.pairwise) {
    const unsigned grid =
        blocks("box_iou", divide_up(args.n, kTileRows) * divide_up(args.m, kThreads));
    launch("box_iou", pairwise_kernel<kKind, kExact, T>, {grid, kThreads}, stream, a, b, out,
           args.n, args.m);
  } else {
    const unsigned grid = blocks("box_iou", divide_up(args.n, kThreads));
    launch("box_iou", paired_kernel<kKind, kExact, T>, {grid, kThreads}, stream, a, b, out, args.n);
  }
}

template <bool kExact, typename T>
void run_kind(const BoxIouArgs& args, cudaStream_t stream) {
  switch (args.kind) {
    case IouKind::kSpan:
      return run<IouKind::kSpan, kExact, T>(args, stream);
    case IouKind::kIou:
      return run<IouKind::kIou, kExact, T>(args, stream);
    case IouKind::kGiou:
      return run<IouKind::kGiou, kExact, T>(args, stream);
    case IouKind::kDiou:
      return run<IouKind::kDiou, kExact, T>(args, stream);
    case IouKind::kCiou:
      return run<IouKind::kCiou, kExact, T>(args, stream);
  }
}

template <typename T>
void run_convention(const BoxIouArgs& args, cudaStream_t stream) {
  if (args.torchvision) return run_kind<true, T>(args, stream);
  run_kind<false, T>(args, stream);
}

}  // namespace

void box_iou(const BoxIouArgs& args, void* stream) {
  const auto on = static_cast<cudaStream_t>(stream);
  if (args.dtype == DType::kFloat64) return run_convention<double>(args, on);
  run_convention<float>(args, on);
}

void track_iou(const TrackIouArgs& args, void* stream) {
  const unsigned grid = blocks("track_iou", divide_up(args.batch, kThreads / 32));
  const auto kernel = args.dtype == DType::kFloat64 ? track_kernel<double> : track_kernel<float>;
  launch("track_iou", kernel, {grid, kThreads}, stream, args);
}

void interval_set_iou(const IntervalSetIouArgs& args, void* stream) {
  const unsigned grid = blocks("interval_set_iou", divide_up(args.n, kThreads));
  launch("interval_set_iou", interval_set_kernel, {grid, kThreads}, stream, args);
}

}  // namespace vcr1::cuda

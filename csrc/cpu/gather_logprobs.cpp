// Log-probabilities of given tokens, entropy and log-sum-exp in one pass over the logits, and the
// gradient in one more. The maths is in vcr1_fast/ops/gather_logprobs.py.
#include <algorithm>
#include <limits>
#include <type_traits>

#include "../kernels.h"
#include "pages.h"
#include "parallel.h"
#include "simd.h"

namespace vcr1::cpu::VCR1_ISA {
namespace {

constexpr float kInf = std::numeric_limits<float>::infinity();
constexpr float kNan = std::numeric_limits<float>::quiet_NaN();
constexpr double kLn2 = 0.6931471805599453;
// Under entropy a logit this far below the maximum (or at -inf) weighs exactly 0, and 0 * inf would
// be NaN; exponents of 2 are clamped here first.
constexpr float kLow = -256.0f;

// A long row is read at kStreams places in turn, which keeps several times the loads in flight that
// one place does: processors do not fetch ahead beyond a page. A tile is what is summed in fp32, at
// most 128 numbers a lane; a step is one or two cache lines of one stream.
constexpr int kStreams = 8;
constexpr int kStep = 4 * Vec::kWidth;
constexpr int kTile = 256 * Vec::kWidth;
constexpr int kLine = 64;              // bytes
constexpr int kAhead = 1024;           // bytes: how far ahead of the loads to prefetch
constexpr int kStreamedRow = 1 << 16;  // bytes: shorter rows are read in one piece

// fn(streams, begin, gap, n): n elements from each of begin + s * gap, s < streams. n is a multiple
// of kStep where there are several streams.
template <typename T, typename Fn>
void for_tiles(int64_t vocab, Fn&& fn) {
  int64_t gap = 0;
  // An odd number of steps: at a multiple of the page size all streams would share cache sets.
  if (vocab * static_cast<int64_t>(sizeof(T)) >= kStreamedRow)
    gap = ((vocab / kStreams / kStep - 1) | 1) * kStep;
  constexpr int64_t each = kTile / kStreams;
  for (int64_t i = 0; i < gap; i += each)
    fn(std::integral_constant<int, kStreams>(), i, gap, static_cast<int>(std::min(each, gap - i)));
  for (int64_t i = kStreams * gap; i < vocab; i += kTile)
    fn(std::integral_constant<int, 1>(), i, int64_t{0},
       static_cast<int>(std::min<int64_t>(kTile, vocab - i)));
}

template <typename T>
void prefetch_step(const T* p, int64_t ahead = kAhead) {
  for (int i = 0; i < kStep * static_cast<int>(sizeof(T)); i += kLine)
    prefetch(reinterpret_cast<const char*>(p) + ahead + i);
}

struct Sums {
  float max = -kInf;        // of the logits, not divided by the temperature
  double weight = 0.0;      // sum of 2^y, y = (x - max) log2(e) / T
  double weighted_y = 0.0;  // sum of y 2^y
};

// kStep elements, in the order that load_pair() gives, and what is left of a tile, filled up.
constexpr int kVecs = kStep / Vec::kWidth;
using Step = Vec[kVecs];

template <typename T>
VCR1_INLINE void load_step(const T* p, Step& out) {
  for (int u = 0; u < kVecs; u += 2) {
    const Pair both = load_pair(p + u * Vec::kWidth);
    out[u] = both.a;
    out[u + 1] = both.b;
  }
}

template <bool kEntropy>
struct Lanes {
  Vec max[2], weight[2], weighted_y[2];
  Lanes() {
    for (int i = 0; i < 2; ++i) {
      max[i] = splat(-kInf);
      weight[i] = weighted_y[i] = splat(0.0f);
    }
  }
  template <int N>
  VCR1_INLINE void take(const Vec (&x)[N], Vec shift, Vec scale, const Exp2& exp2) {
    Vec y[N], e[N];
    for (int i = 0; i < N; ++i) max[i % 2] = cpu::VCR1_ISA::max(x[i], max[i % 2]);
    for (int i = 0; i < N; ++i) y[i] = sub(x[i], shift);
    for (int i = 0; i < N; ++i) y[i] = mul(y[i], scale);
    exp2(y, e);
    for (int i = 0; i < N; ++i) weight[i % 2] = add(weight[i % 2], e[i]);
    if (!kEntropy) return;
    for (int i = 0; i < N; ++i)
      weighted_y[i % 2] = fma(e[i], cpu::VCR1_ISA::max(splat(kLow), y[i]), weighted_y[i % 2]);
  }
};

template <int kN, typename T>
float tile_max(const T* x, int64_t gap, int n) {
  constexpr int w = Vec::kWidth;
  Vec a = splat(-kInf), b = a;
  int i = 0;
  for (; i + kStep <= n; i += kStep)
    for (int s = 0; s < kN; ++s) {
      const T* const p = x + s * gap + i;
      prefetch_step(p);
      Step v;
      load_step(p, v);
      for (int u = 0; u < kVecs; u += 2) {
        a = max(v[u], a);
        b = max(v[u + 1], b);
      }
    }
  for (; i < n; i += w) a = max(load_partial(x + i, n - i, -kInf), a);
  return reduce_max(max(a, b));
}

// ahead: bytes from a load to what to prefetch with it.
template <int kN, bool kEntropy, typename T>
Sums tile_sums(const T* x, int64_t gap, int n, float shift_by, float scale_by, int64_t ahead) {
  constexpr int w = Vec::kWidth;
  const Vec shift = splat(shift_by), scale = splat(scale_by);
  const Exp2 exp2(1.0f);
  Lanes<kEntropy> lanes;
  int i = 0;
  for (; i + kStep <= n; i += kStep)
    for (int s = 0; s < kN; ++s) {
      const T* const p = x + s * gap + i;
      prefetch_step(p, ahead);
      Step v;
      load_step(p, v);
      lanes.take(v, shift, scale, exp2);
    }
  for (; i < n; i += w) {
    const Vec rest[1] = {load_partial(x + i, n - i, -kInf)};
    lanes.take(rest, shift, scale, exp2);
  }
  Sums out;
  out.max = reduce_max(max(lanes.max[0], lanes.max[1]));
  out.weight = reduce_add(add(lanes.weight[0], lanes.weight[1]));
  if (kEntropy) out.weighted_y = reduce_add(add(lanes.weighted_y[0], lanes.weighted_y[1]));
  return out;
}

// The sums so far relative to a larger maximum.
void raise_max(float max, float scale, Sums& sums) {
  if (sums.weight != 0.0) {
    const double y = (double{sums.max} - max) * scale;
    const double factor = std::exp2(y);
    // (y + y_i) 2^(y + y_i) summed over i.
    sums.weighted_y = factor > 0.0 ? factor * (sums.weighted_y + y * sums.weight) : 0.0;
    sums.weight *= factor;
  }
  sums.max = max;
}

// One read from memory: each tile is summed relative to the maximum before it, and again, from the
// first-level cache, where it holds a larger one, as only a few do unless the row is sorted. The
// first one's maximum is found alone, and while it is then summed, what follows is prefetched a
// whole tile ahead: the next row, where rows are short.
template <bool kEntropy, typename T>
Sums row_sums(const T* x, int64_t vocab, float scale) {
  Sums sums;
  for_tiles<T>(vocab, [&](auto streams, int64_t begin, int64_t gap, int n) {
    const auto tile = [&](float shift, int64_t ahead) {
      return tile_sums<streams, kEntropy>(x + begin, gap, n, shift, scale, ahead);
    };
    const bool first = sums.max == -kInf;
    if (first) sums.max = tile_max<streams>(x + begin, gap, n);
    // Before the first finite logit: -inf less -inf would be NaN.
    Sums added =
        tile(sums.max == -kInf ? 0.0f : sums.max, first ? n * int64_t{sizeof(T)} : int64_t{kAhead});
    if (added.max > sums.max) {
      raise_max(added.max, scale, sums);
      added = tile(sums.max, kAhead);
    }
    sums.weight += added.weight;  // of -inf alone: 0, or NaN, which max() drops
    sums.weighted_y += added.weighted_y;
  });
  return sums;
}

float temperature_of(const GatherLogprobsInput& in, int64_t row) {
  return in.row_temperature != nullptr ? in.row_temperature[row] : in.temperature;
}

template <typename T>
void forward_row(const GatherLogprobsForward& a, int64_t row) {
  const GatherLogprobsInput& in = a.in;
  float* const logps = a.logps + row * in.k;
  float* const stats = a.stats + row * 3;
  if (in.mask != nullptr && !in.mask[row]) {
    std::fill(logps, logps + in.k, 0.0f);
    std::fill(stats, stats + 3, 0.0f);
    a.lse[row] = 0.0f;
    if (a.entropy != nullptr) a.entropy[row] = 0.0f;
    return;
  }
  const T* const x = static_cast<const T*>(in.logits) + row_offset(in.layout, row);
  const double temperature = temperature_of(in, row);
  const float scale = static_cast<float>(1.0 / kLn2 / temperature);
  const Sums sums = a.entropy != nullptr ? row_sums<true>(x, in.vocab, scale)
                                         : row_sums<false>(x, in.vocab, scale);
  const bool empty = sums.weight == 0.0;  // every logit is -inf: no distribution
  const double log_sum = empty ? double{kNan} : std::log(sums.weight);
  const double mean_d = kLn2 * sums.weighted_y / sums.weight;
  for (int64_t j = 0; j < in.k; ++j) {
    // Against the maximum first: the logits may share an offset far larger than log_sum.
    const double d = (double{as_float(x[in.labels[row * in.k + j]])} - sums.max) / temperature;
    logps[j] = static_cast<float>(d - log_sum);
  }
  a.lse[row] = static_cast<float>(sums.max / temperature + (empty ? 0.0 : log_sum));
  if (a.entropy != nullptr) a.entropy[row] = static_cast<float>(log_sum - mean_d);
  stats[0] = sums.max;
  stats[1] = static_cast<float>(log_sum);
  stats[2] = static_cast<float>(mean_d);
}

// dL/dx_j = p_j (a - h (d_j - mean_d)) / T, and the label terms, which the caller adds. In powers
// of two, with y_j = d_j log2(e): 2^y_j (constant + slope y_j), or factor 2^y_j where h = 0.
struct RowGradient {
  float max, scale;  // y = (x - max) scale
  float factor, constant, slope;
};

template <bool kEntropy>
class Gradient {
 public:
  explicit Gradient(const RowGradient& row)
      : exp2_(kEntropy ? 1.0f : row.factor),
        shift_(splat(row.max)),
        scale_(splat(row.scale)),
        constant_(splat(row.constant)),
        slope_(splat(row.slope)) {}
  template <int N>
  VCR1_INLINE void operator()(const Vec (&x)[N], Vec (&out)[N]) const {
    Vec y[N];
    for (int i = 0; i < N; ++i) y[i] = sub(x[i], shift_);
    for (int i = 0; i < N; ++i) y[i] = mul(y[i], scale_);
    exp2_(y, out);
    if (!kEntropy) return;
    for (int i = 0; i < N; ++i) y[i] = fma(slope_, max(splat(kLow), y[i]), constant_);
    for (int i = 0; i < N; ++i) out[i] = mul(out[i], y[i]);
  }

 private:
  Exp2 exp2_;
  Vec shift_, scale_, constant_, slope_;
};

template <int kN, bool kEntropy, bool kStream, typename T>
void write_tile(const RowGradient& row, const T* x, T* out, int64_t gap, int n) {
  constexpr int w = Vec::kWidth;
  const Gradient<kEntropy> gradient(row);
  int i = 0;
  for (; i + kStep <= n; i += kStep)
    for (int s = 0; s < kN; ++s) {
      const int64_t at = s * gap + i;
      prefetch_step(x + at);
      // All loads before the first store: in place a load would wait for the store beside it.
      Step v, g;
      load_step(x + at, v);
      gradient(v, g);
      for (int u = 0; u < kVecs; u += 2) {
        T* const to = out + at + u * w;
        const Pair both{g[u], g[u + 1]};
        kStream ? stream_pair(to, both) : store_pair(to, both);
      }
    }
  for (; i < n; i += w) {
    const Vec rest[1] = {load_partial(x + i, n - i, -kInf)};
    Vec g[1];
    gradient(rest, g);
    store_partial(out + i, g[0], n - i);
  }
}

template <bool kEntropy, bool kStream, typename T>
void write_row(const RowGradient& row, const T* x, T* out, int64_t vocab) {
  for_tiles<T>(vocab, [&](auto streams, int64_t begin, int64_t gap, int n) {
    write_tile<streams, kEntropy, kStream>(row, x + begin, out + begin, gap, n);
  });
  if (kStream) fence();
}

template <bool kEntropy, typename T>
void write_row(const RowGradient& row, const T* x, T* out, int64_t vocab, bool fresh) {
  // Streaming spares reading the output's lines. They are in the cache already in place, and where
  // the system has just zeroed them.
  const bool aligned = reinterpret_cast<std::uintptr_t>(out) % kStreamAlign == 0;
  if (x != out && !fresh && aligned && vocab * static_cast<int64_t>(sizeof(T)) >= kStreamedRow)
    write_row<kEntropy, true>(row, x, out, vocab);
  else
    write_row<kEntropy, false>(row, x, out, vocab);
}

struct Backward : GatherLogprobsBackward {
  bool fresh;  // the gradient's memory has not been touched yet
};

// Without the payload of an upstream NaN, which store_pair() could not take.
float narrowed(double x) { return std::isnan(x) ? kNan : static_cast<float>(x); }

template <typename T>
void backward_row(const Backward& a, int64_t row) {
  const GatherLogprobsInput& in = a.in;
  const T* const x = static_cast<const T*>(in.logits) + row_offset(in.layout, row);
  T* const out = static_cast<T*>(a.grad) + row_offset(a.grad_layout, row);
  const float* const g = a.grad_logps + row * in.k;
  const float* const stats = a.stats + row * 3;
  const float h = a.grad_entropy != nullptr ? a.grad_entropy[row] : 0.0f;
  const float g_lse = a.grad_lse != nullptr ? a.grad_lse[row] : 0.0f;
  double g_sum = 0.0;
  bool zero = h == 0.0f && g_lse == 0.0f;
  for (int64_t j = 0; j < in.k; ++j) {
    zero = zero && g[j] == 0.0f;
    g_sum += g[j];
  }
  if (a.fresh) populate(out, in.vocab * sizeof(T));
  if (zero || (in.mask != nullptr && !in.mask[row])) {
    std::memset(static_cast<void*>(out), 0, in.vocab * sizeof(T));
    return;
  }
  const double inv_temperature = 1.0 / double{temperature_of(in, row)};
  const double each = std::exp(-double{stats[1]}) * inv_temperature;  // p / T = each 2^y
  const double through = g_lse - g_sum;
  RowGradient gradient{};
  gradient.max = stats[0];
  gradient.scale = static_cast<float>(inv_temperature / kLn2);
  gradient.factor = narrowed(each * through);
  gradient.constant = narrowed(each * (through + double{h} * stats[2]));
  gradient.slope = narrowed(-each * h * kLn2);
  h != 0.0f ? write_row<true>(gradient, x, out, in.vocab, a.fresh)
            : write_row<false>(gradient, x, out, in.vocab, a.fresh);

  // Each label's element again in fp32, because the row may hold it rounded, and from its log-prob,
  // because in place its logit is gone. A label that stands twice gets both gradients.
  const int64_t* const labels = in.labels + row * in.k;
  for (int64_t j = 0; j < in.k; ++j) {
    double own = 0.0;
    for (int64_t i = 0; i < in.k; ++i)
      if (labels[i] == labels[j]) own += g[i];
    const double logp = a.logps[row * in.k + j];
    const double p = std::exp(logp);
    const double d = std::max(kLow * kLn2, logp + stats[1]);
    double value = p * through;
    if (h != 0.0f) value -= p * h * (d - stats[2]);
    value = (value + own) * inv_temperature;
    store_partial(out + labels[j], splat(static_cast<float>(value)), 1);
  }
}

template <typename Args>
using RowFn = void (*)(const Args&, int64_t);

template <typename Args>
void for_rows(const Args& args, RowFn<Args> f32, RowFn<Args> bf16, RowFn<Args> f16,
              int num_threads) {
  const GatherLogprobsInput& in = args.in;
  const auto fn = in.dtype == DType::kFloat32 ? f32 : in.dtype == DType::kBFloat16 ? bf16 : f16;
  const int64_t grain = std::max<int64_t>(1, (1 << 15) / std::max<int64_t>(1, in.vocab));
  parallel_for(in.rows, grain, num_threads, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) fn(args, row);
  });
}

}  // namespace

void gather_logprobs(const GatherLogprobsForward& args, int num_threads) {
  for_rows(args, forward_row<float>, forward_row<BFloat16>, forward_row<Float16>, num_threads);
}

void gather_logprobs_backward(const GatherLogprobsBackward& args, int num_threads) {
  Backward a{args, false};
  if (args.grad != args.in.logits) {
    const int64_t item = args.in.dtype == DType::kFloat32 ? 4 : 2;
    const int64_t middle = row_offset(args.grad_layout, args.in.rows / 2) * item;
    a.fresh = untouched(static_cast<const char*>(args.grad) + middle);
  }
  for_rows(a, backward_row<float>, backward_row<BFloat16>, backward_row<Float16>, num_threads);
}

}  // namespace vcr1::cpu::VCR1_ISA

// Log-probabilities of given tokens, entropy and log-sum-exp in one pass over the logits, and the
// gradient in one more. The maths is in vcr1_fast/ops/gather_logprobs.py.
#include <algorithm>
#include <limits>

#include "../kernels.h"
#include "parallel.h"
#include "simd.h"

namespace vcr1::cpu::VCR1_ISA {
namespace {

constexpr float kInf = std::numeric_limits<float>::infinity();
constexpr float kNan = std::numeric_limits<float>::quiet_NaN();
// A block is read twice, from memory for its maximum and from the first-level cache for its sum.
constexpr int kBlock = 4096;
// Under entropy a logit this far below the maximum (or at -inf) weighs exactly 0, and 0 * inf would
// be NaN; shifted logits are clamped here first.
constexpr float kShiftLow = -200.0f;

struct Sums {
  float max = -kInf;        // of the logits, not divided by the temperature
  double weight = 0.0;      // sum of e^d, d = (x - max) / T
  double weighted_d = 0.0;  // sum of d e^d
};

template <typename T>
float block_max(const T* x, int n) {
  constexpr int w = Vec::kWidth;
  Vec m0 = splat(-kInf), m1 = m0, m2 = m0, m3 = m0;
  int i = 0;
  for (; i + 4 * w <= n; i += 4 * w) {
    m0 = max(load(x + i), m0);
    m1 = max(load(x + i + w), m1);
    m2 = max(load(x + i + 2 * w), m2);
    m3 = max(load(x + i + 3 * w), m3);
  }
  for (; i + w <= n; i += w) m0 = max(load(x + i), m0);
  if (i < n) m0 = max(load_partial(x + i, n - i, -kInf), m0);
  return reduce_max(max(max(m0, m1), max(m2, m3)));
}

template <bool kEntropy>
struct BlockSum {
  Vec weight = splat(0.0f), weighted_d = splat(0.0f);
  void take(Vec x, Vec shift, Vec scale) {
    Vec d = mul(sub(x, shift), scale);
    const Vec e = exp(d);
    weight = add(weight, e);
    if (kEntropy) weighted_d = fma(e, max(splat(kShiftLow), d), weighted_d);
  }
};

template <bool kEntropy, typename T>
void add_block(const T* x, int n, float inv_temperature, Sums& sums) {
  constexpr int w = Vec::kWidth;
  const float top = block_max(x, n);
  if (top > sums.max) {
    if (sums.weight != 0.0) {
      const double d = (double{sums.max} - top) * inv_temperature;
      const double factor = std::exp(d);
      // (d + d_i) e^(d + d_i) summed over i.
      sums.weighted_d = factor > 0.0 ? factor * (sums.weighted_d + d * sums.weight) : 0.0;
      sums.weight *= factor;
    }
    sums.max = top;
  }
  if (sums.max == -kInf) {  // nothing but -inf so far, or NaN, which max() drops
    for (int i = 0; i < n; ++i)
      if (std::isnan(as_float(x[i]))) sums.weight = kNan;
    return;
  }
  const Vec shift = splat(sums.max), scale = splat(inv_temperature);
  BlockSum<kEntropy> s0, s1, s2, s3;
  int i = 0;
  for (; i + 4 * w <= n; i += 4 * w) {
    s0.take(load(x + i), shift, scale);
    s1.take(load(x + i + w), shift, scale);
    s2.take(load(x + i + 2 * w), shift, scale);
    s3.take(load(x + i + 3 * w), shift, scale);
  }
  for (; i + w <= n; i += w) s0.take(load(x + i), shift, scale);
  if (i < n) s1.take(load_partial(x + i, n - i, -kInf), shift, scale);
  sums.weight += reduce_add(add(add(s0.weight, s1.weight), add(s2.weight, s3.weight)));
  if (kEntropy)
    sums.weighted_d +=
        reduce_add(add(add(s0.weighted_d, s1.weighted_d), add(s2.weighted_d, s3.weighted_d)));
}

template <bool kEntropy, typename T>
Sums row_sums(const T* x, int64_t vocab, float inv_temperature) {
  Sums sums;
  for (int64_t i = 0; i < vocab; i += kBlock)
    add_block<kEntropy>(x + i, static_cast<int>(std::min<int64_t>(kBlock, vocab - i)),
                        inv_temperature, sums);
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
  const float inv_temperature = static_cast<float>(1.0 / temperature);
  const Sums sums = a.entropy != nullptr ? row_sums<true>(x, in.vocab, inv_temperature)
                                         : row_sums<false>(x, in.vocab, inv_temperature);
  const bool empty = sums.weight == 0.0;  // every logit is -inf: no distribution
  const double log_sum = empty ? double{kNan} : std::log(sums.weight);
  const double mean_d = sums.weighted_d / sums.weight;
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

// dL/dx_j = p_j (a - h (d_j - mean_d)) / T, and the label terms, which the caller adds.
struct RowGradient {
  float max, inv_temperature, log_sum, mean_d;
  float a, h;  // both divided by T
  template <bool kEntropy>
  Vec at(Vec x) const {
    const Vec d = mul(sub(x, splat(max)), splat(inv_temperature));
    const Vec p = exp(sub(d, splat(log_sum)));
    if (!kEntropy) return mul(p, splat(a));
    const Vec shifted = sub(cpu::VCR1_ISA::max(splat(kShiftLow), d), splat(mean_d));
    return mul(p, fma(splat(-h), shifted, splat(a)));
  }
};

template <bool kEntropy, bool kStream, typename T>
void write_row(const RowGradient& gradient, const T* x, T* out, int64_t n) {
  constexpr int w = Vec::kWidth;
  int64_t i = 0;
  for (; i + 4 * w <= n; i += 4 * w) {
    // All loads before the first store: in place a load would wait for the store beside it.
    Vec g[4];
    for (int u = 0; u < 4; ++u) g[u] = gradient.at<kEntropy>(load(x + i + u * w));
    for (int u = 0; u < 4; ++u)
      kStream ? stream(out + i + u * w, g[u]) : store(out + i + u * w, g[u]);
  }
  for (; i + w <= n; i += w) store(out + i, gradient.at<kEntropy>(load(x + i)));
  if (i < n) {
    const int rest = static_cast<int>(n - i);
    store_partial(out + i, gradient.at<kEntropy>(load_partial(x + i, rest, -kInf)), rest);
  }
}

template <bool kEntropy, typename T>
void write_row(const RowGradient& gradient, const T* x, T* out, int64_t n) {
  // Streaming spares reading the output's lines; in place they are in the cache already.
  const bool aligned = reinterpret_cast<std::uintptr_t>(out) % kStreamAlign == 0;
  if (x != out && aligned && n * static_cast<int64_t>(sizeof(T)) >= 1 << 16) {
    write_row<kEntropy, true>(gradient, x, out, n);
    fence();
  } else {
    write_row<kEntropy, false>(gradient, x, out, n);
  }
}

template <typename T>
void backward_row(const GatherLogprobsBackward& a, int64_t row) {
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
  if (zero || (in.mask != nullptr && !in.mask[row])) {
    std::memset(static_cast<void*>(out), 0, in.vocab * sizeof(T));
    return;
  }
  const float inv_temperature = static_cast<float>(1.0 / double{temperature_of(in, row)});
  RowGradient gradient{stats[0], inv_temperature, stats[1], stats[2], 0.0f, h * inv_temperature};
  gradient.a = static_cast<float>(g_lse - g_sum) * inv_temperature;
  h != 0.0f ? write_row<true>(gradient, x, out, in.vocab)
            : write_row<false>(gradient, x, out, in.vocab);

  // Each label's element anew in fp32, because the row may hold it rounded, and from its log-prob,
  // because in place its logit is gone. A label that stands twice gets both gradients.
  const int64_t* const labels = in.labels + row * in.k;
  for (int64_t j = 0; j < in.k; ++j) {
    double own = 0.0;
    for (int64_t i = 0; i < in.k; ++i)
      if (labels[i] == labels[j]) own += g[i];
    const double logp = a.logps[row * in.k + j];
    const double p = std::exp(logp);
    const double d = std::max<double>(kShiftLow, logp + stats[1]);
    double value = p * (double{g_lse} - g_sum);
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
  for_rows(args, backward_row<float>, backward_row<BFloat16>, backward_row<Float16>, num_threads);
}

}  // namespace vcr1::cpu::VCR1_ISA

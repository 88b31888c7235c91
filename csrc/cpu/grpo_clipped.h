// The GRPO loss of a completion for the options that most trainers use, in one loop whose values
// and sums stay in registers: float32, a clipped loss or cispo, no KL or k3, no rollout correction.
// It computes what Kernel and Terms do, by blocks in memory and several times slower, for every
// option. Included only by files that vcr1_cpu_kernel() builds.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>

#include "../grpo_token.h"
#include "../kernels.h"
#include "simd_mask.h"

namespace vcr1::cpu::VCR1_ISA {
namespace {

// Whether Clipped computes this loss. Ratios by sequence: with one advantage a completion, all its
// tokens have the same derivative in s, which is then their mean.
inline bool fits_clipped(const GrpoLossArgs& a) {
  const grpo::Parameters& p = a.parameters;
  const bool policy = p.loss_type != grpo::kSapo && p.loss_type != grpo::kVespo;
  const bool kl = a.ref_logps == nullptr ||
                  (p.kl == grpo::kK3 && !p.kl_bias_correction && !p.kl_straight_through);
  const bool unweighted = a.rollout_logps == nullptr && a.token_weights == nullptr &&
                          !std::isfinite(p.off_policy_threshold);
  return a.dtype == DType::kFloat32 && policy && kl && unweighted &&
         (p.level == grpo::kToken || !a.token_advantages);
}

// exp() for every x; `ends`: there is none beyond 88.
template <int n>
inline void exp_each(const Vec (&x)[n], bool ends, Vec (&out)[n]) {
  exp(x, out);
  if (ends) return;
  for (int k = 0; k < n; ++k) {
    if (!any(less(splat(88.0f), x[k]))) continue;
    float from[Vec::kWidth], to[Vec::kWidth];
    store(from, x[k]);
    store(to, out[k]);
    for (int i = 0; i < Vec::kWidth; ++i)
      if (from[i] > 88.0f) to[i] = std::exp(from[i]);
    out[k] = load(to);
  }
}

// Tensors from a completion's token on; null as in GrpoLossArgs.
struct ClippedTokens {
  const float *logps, *old, *ref, *advantages, *entropy;
  const bool* mask;
  float *grad, *grad_entropy;
};

// Sums over tokens, lane by lane.
struct ClippedSums {
  Vec policy, ratio, moved, kl, entropy, below, above, over, lowest, highest;
};

template <bool kCispo, bool kRef>
class Clipped {
 public:
  // c: what is known before its tokens are read; its entropy gets the gradient `bonus`.
  Clipped(const GrpoLossArgs& a, int64_t b, const grpo::Completion& c, double bonus)
      : a_(a), weight_(c.weight), tokens_(c.tokens), bonus_(bonus) {
    if (!a.token_advantages) advantage_ = static_cast<const float*>(a.advantages)[b];
  }

  void run(int64_t begin, int64_t end, double* sums) {
    if (a_.parameters.level != grpo::kToken) {
      const Vec limit = number(a_.parameters.log_ratio_clamp);
      double total = 0.0;
      blocks(begin, end, [&](const ClippedTokens& t, int64_t first, int64_t last) {
        Vec sum = splat(0.0f), logp;
        for (int64_t i = first; i < last; i += Vec::kWidth)
          sum = add(sum, clamp(limit, log_ratio(t, i, counts(t, i), logp)));
        total += reduce_add(sum);
      });
      ratio_ = std::exp(static_cast<float>(total / tokens_));
    }
    blocks(begin, end, [&](const ClippedTokens& t, int64_t first, int64_t last) {
      add_up(block(t, first, last), sums);
    });
    sums[grpo::kOffPolicyKept] = tokens_;
  }

 private:
  // Sums over a block are in single precision; blocks are added in double precision.
  static constexpr int64_t kTokens = 1024;

  static Vec number(double x) { return splat(static_cast<float>(x)); }
  static Vec clamp(Vec limit, Vec x) { return clamp(sub(splat(0.0f), limit), limit, x); }
  // A NaN in x is kept.
  static Vec clamp(Vec low, Vec high, Vec x) { return min(high, max(low, x)); }

  static Mask counts(const ClippedTokens& t, int64_t i) {
    return t.mask != nullptr ? load_mask(t.mask + i) : all_lanes();
  }

  // logp, and the log-ratio before it is cut: 0 where a token does not count, whatever is there.
  static Vec log_ratio(const ClippedTokens& t, int64_t i, Mask counts, Vec& logp) {
    logp = keep(counts, load(t.logps + i));
    // Without old log-probs 0, but an infinite log-prob must not pass as a ratio of 1.
    return sub(logp, t.old != nullptr ? keep(counts, load(t.old + i)) : logp);
  }

  // Calls fn(tokens, first, last) for blocks of whole vectors. The last tokens of a completion are
  // worked on in copies: nothing beyond them is touched.
  template <typename Fn>
  void blocks(int64_t begin, int64_t end, Fn&& fn) const {
    const auto in = [](const void* x) { return static_cast<const float*>(x); };
    ClippedTokens t{in(a_.logps),
                    in(a_.old_logps),
                    in(a_.ref_logps),
                    a_.token_advantages ? in(a_.advantages) : nullptr,
                    in(a_.entropy),
                    a_.mask,
                    static_cast<float*>(a_.grad_logps),
                    static_cast<float*>(a_.grad_entropy)};
    const int64_t whole = begin + (end - begin) / Vec::kWidth * Vec::kWidth;
    for (int64_t i = begin; i < whole; i += kTokens) fn(t, i, std::min(i + kTokens, whole));
    if (whole == end) return;
    const int64_t rest = end - whole;
    const ClippedTokens all = t;
    float copies[7][Vec::kWidth] = {};
    bool mask[Vec::kWidth] = {};
    for (int64_t i = 0; i < rest; ++i) mask[i] = all.mask == nullptr || all.mask[whole + i];
    t.mask = mask;
    const float** const inputs[] = {&t.logps, &t.old, &t.ref, &t.advantages, &t.entropy};
    for (int k = 0; k < 5; ++k) {
      if (*inputs[k] == nullptr) continue;
      std::copy_n(*inputs[k] + whole, rest, copies[k]);
      *inputs[k] = copies[k];
    }
    t.grad = copies[5];
    if (all.grad_entropy != nullptr) t.grad_entropy = copies[6];
    fn(t, 0, Vec::kWidth);
    std::copy_n(copies[5], rest, all.grad + whole);
    if (all.grad_entropy != nullptr) std::copy_n(copies[6], rest, all.grad_entropy + whole);
  }

  // What does not change within a completion. ends: exponents do, at 88; has_bound: an estimator of
  // the KL may be beyond its bound, or no number.
  struct Constants {
    Vec limit, delta, low, high, kl_limit, kl_bound, weight, kl_weight, bonus, ratio, advantage;
    bool by_token, cuts, ends, has_delta, has_bound;
  };

  Constants constants(const ClippedTokens& t) const {
    const grpo::Parameters& p = a_.parameters;
    const bool ends = p.log_ratio_clamp <= 88.0 && p.kl_input_clamp <= 88.0;
    return {number(p.log_ratio_clamp),
            number(p.delta),
            number(p.ratio_low),
            number(p.ratio_high),
            number(p.kl_input_clamp),
            number(p.kl_output_clamp),
            number(weight_),
            splat(static_cast<float>(weight_) * static_cast<float>(p.beta)),
            number(bonus_),
            splat(ratio_),
            splat(advantage_),
            p.level == grpo::kToken,
            t.old != nullptr && p.level != grpo::kSequenceToken,
            ends,
            std::isfinite(p.delta),
            std::isfinite(p.kl_output_clamp) || !ends};
  }

  // The derivative of min(min(r, delta) a, clip(r) a) in r; half of each where both are equal.
  static Vec slope(Vec ratio, Vec a, Vec free, Vec cut, const Constants& c) {
    const Vec d_free = keep(less_equal(ratio, c.delta), a);
    const Vec d_cut = keep(both(less_equal(c.low, ratio), less_equal(ratio, c.high)), a);
    const Vec tie = mul(splat(0.5f), add(d_free, d_cut));
    return select(less(free, cut), d_free, select(less(cut, free), d_cut, tie));
  }

  ClippedSums block(const ClippedTokens& t, int64_t first, int64_t last) const {
    const Vec zero = splat(0.0f), inf = splat(std::numeric_limits<float>::infinity());
    ClippedSums s{zero, zero, zero, zero, zero, zero, zero, zero, inf, sub(zero, inf)};
    const Constants c = constants(t);
    int64_t i = first;
    for (; i + 2 * Vec::kWidth <= last; i += 2 * Vec::kWidth) step<2>(t, c, i, s);
    if (i < last) step<1>(t, c, i, s);
    return s;
  }

  // n vectors of tokens. Inlined, or the sums would go through memory.
  template <int n>
  __attribute__((always_inline)) static inline void step(const ClippedTokens& t, const Constants& c,
                                                         int64_t first, ClippedSums& s) {
    const Vec zero = splat(0.0f), one = splat(1.0f);
    constexpr int kExponents = kRef ? 2 * n : n;
    Mask counts[n];
    Vec logp[n], raw[n], apart[n], exponents[kExponents], powers[kExponents];
    for (int k = 0; k < n; ++k) {
      const int64_t i = first + k * Vec::kWidth;
      counts[k] = Clipped::counts(t, i);
      raw[k] = log_ratio(t, i, counts[k], logp[k]);
      exponents[k] = clamp(c.limit, raw[k]);
      if constexpr (kRef) {
        apart[k] = sub(keep(counts[k], load(t.ref + i)), logp[k]);
        exponents[n + k] = clamp(c.kl_limit, apart[k]);
      }
    }
    exp_each(exponents, c.ends, powers);
    for (int k = 0; k < n; ++k) {
      const int64_t i = first + k * Vec::kWidth;
      const Vec x = exponents[k], ratio = c.by_token ? powers[k] : c.ratio;
      const Vec a = keep(counts[k], t.advantages != nullptr ? load(t.advantages + i) : c.advantage);

      // The policy term and its gradient, both negated: weighted_policy() and clipped_policy().
      Vec value, grad;
      if (kCispo) {
        const Vec phi = mul(clamp(c.low, c.high, ratio), a);
        value = mul(phi, logp[k]);
        grad = mul(c.weight, phi);
      } else {
        const Vec free = mul(min(c.delta, ratio), a), cut = mul(clamp(c.low, c.high, ratio), a);
        value = min(free, cut);
        // Where both are equal the ratio is inside the range.
        grad = c.has_delta ? slope(ratio, a, free, cut, c) : keep(less_equal(free, cut), a);
        grad = mul(mul(c.weight, grad), ratio);
        if (c.cuts) grad = keep(equal_or_nan(x, raw[k]), grad);
      }
      s.policy = add_where(counts[k], s.policy, value);

      if constexpr (kRef) {
        const Vec d = exponents[n + k], e = powers[n + k], k3 = sub(sub(e, d), one);
        Mask inside = equal(d, apart[k]);
        if (c.has_bound) inside = both(inside, less_equal(abs(k3), c.kl_bound));
        grad = fma(c.kl_weight, keep(inside, sub(e, one)), grad);
        s.kl = add(s.kl, c.has_bound ? clamp(c.kl_bound, k3) : k3);
      }
      store(t.grad + i, keep(counts[k], sub(zero, grad)));

      s.ratio = add_where(counts[k], s.ratio, ratio);
      s.moved = add(s.moved, sub(sub(powers[k], one), x));
      s.lowest = select(counts[k], min(ratio, s.lowest), s.lowest);
      s.highest = select(counts[k], max(ratio, s.highest), s.highest);
      // The advantage is 0 outside the mask.
      const Mask bad = less(a, zero), good = less(zero, a);
      s.below = add_where(both(less(ratio, c.low), bad), s.below, one);
      s.above = add_where(both(less(c.high, ratio), good), s.above, one);
      if (c.has_delta) s.over = add_where(both(less(c.delta, ratio), bad), s.over, one);
      if (t.entropy != nullptr) {
        s.entropy = add(s.entropy, keep(counts[k], load(t.entropy + i)));
        if (t.grad_entropy != nullptr) store(t.grad_entropy + i, keep(counts[k], c.bonus));
      }
    }
  }

  void add_up(const ClippedSums& s, double* out) const {
    const double policy = -reduce_add(s.policy) * weight_, kl = reduce_add(s.kl);
    const double entropy = reduce_add(s.entropy);
    out[grpo::kPolicyLoss] += policy;
    out[grpo::kLossSum] += policy + kl * a_.parameters.beta * weight_;
    if (a_.grad_entropy != nullptr) out[grpo::kLossSum] += entropy * bonus_;
    out[grpo::kKlMean] += kl;
    out[grpo::kEntropyMean] += entropy;
    out[grpo::kRatioMean] += reduce_add(s.ratio);
    out[grpo::kRatioMax] = std::max<double>(out[grpo::kRatioMax], reduce_max(s.highest));
    const Vec negated = sub(splat(0.0f), s.lowest);
    out[grpo::kRatioMin] = std::min<double>(out[grpo::kRatioMin], -reduce_max(negated));
    out[grpo::kApproxKl] += reduce_add(s.moved);
    const double below = reduce_add(s.below), above = reduce_add(s.above);
    out[grpo::kClipLow] += below;
    out[grpo::kClipHigh] += above;
    out[grpo::kClipRegion] += below + above;
    out[grpo::kClipDelta] += reduce_add(s.over);
  }

  const GrpoLossArgs& a_;
  const double weight_, tokens_, bonus_;
  float advantage_ = 0.0f, ratio_ = 0.0f;
};

}  // namespace
}  // namespace vcr1::cpu::VCR1_ISA

// The GRPO loss of one token, the same source for CPU loops and CUDA kernels. The maths, with these
// names, is in vcr1_fast/ops/grpo/reference.py. The caller computes exponentials, some in vectors.
// Everything has internal linkage: it is compiled once per instruction set.
#pragma once

#include <cmath>

#include "kernels.h"

namespace vcr1::grpo {

constexpr double kVespoFloor = -18.420680743952367;  // log 1e-8
constexpr double kVespoCeiling = 20.0;

template <typename T>
VCR1_HOST_DEVICE static inline T clamp(T x, double low, double high) {
  return x < static_cast<T>(low)    ? static_cast<T>(low)
         : x > static_cast<T>(high) ? static_cast<T>(high)
                                    : x;
}

// Values that the tokens of one completion share.
struct Completion {
  double weight;     // of a token in the loss
  double tokens;     // that count
  double log_ratio;  // mean
  double phi_pos, phi_neg;
  double correction;  // rollout weight of the completion
  bool dropped;       // by the rollout correction
  bool off_policy;    // leave out where the advantage is negative
};

template <typename T>
struct Token {
  bool counts;
  T logp, before;  // before: the log-prob under the old policy
  T log_ratio, unclamped, advantage, gap;
};

// Token i of completion b, its log-prob given.
template <typename T>
VCR1_HOST_DEVICE static inline Token<T> load_token(const GrpoLossArgs& a, int64_t b, int64_t i,
                                                   bool counts, T logp) {
  const T* const rollout = static_cast<const T*>(a.rollout_logps);
  const T limit = static_cast<T>(a.parameters.log_ratio_clamp);
  Token<T> t;
  t.counts = counts;
  t.logp = logp;
  t.before = counts && a.old_logps != nullptr ? static_cast<const T*>(a.old_logps)[i] : logp;
  const T x = t.logp - t.before;
  t.log_ratio = clamp(x, -limit, limit);
  t.unclamped = std::abs(x) <= limit ? T{1} : T{0};
  t.advantage = counts ? static_cast<const T*>(a.advantages)[a.token_advantages ? i : b] : T{0};
  const T gap = counts && rollout != nullptr ? t.before - rollout[i] : T{0};
  t.gap = gap == gap ? gap : T{0};  // nan: the sampler gave no log-prob
  return t;
}

template <typename T>
VCR1_HOST_DEVICE static inline Token<T> load_token(const GrpoLossArgs& a, int64_t b, int64_t i) {
  // Selected, not multiplied: values outside the mask may be inf or nan.
  const bool counts = a.mask == nullptr || a.mask[i];
  return load_token(a, b, i, counts, counts ? static_cast<const T*>(a.logps)[i] : T{0});
}

// Whether tokens can only be weighed after sums over their completion.
VCR1_HOST_DEVICE static inline bool shares_statistics(const GrpoLossArgs& a) {
  const Parameters& p = a.parameters;
  return p.level != kToken || p.loss_type == kVespo || std::isfinite(p.off_policy_threshold) ||
         p.rollout_correction >= kSequenceTruncate;
}

// Sums over a completion: of log-ratios, of those within +-20, of old - rollout, and of
// (rollout - logp).
struct Statistics {
  double log_ratio, bounded, gap, drift;
};

template <typename T>
VCR1_HOST_DEVICE static inline void set_statistics(const GrpoLossArgs& a, const Statistics& sums,
                                                   Completion& c) {
  const Parameters& p = a.parameters;
  c.log_ratio = sums.log_ratio / c.tokens;
  c.off_policy = sums.drift / c.tokens > p.off_policy_threshold;
  c.correction = 1.0;
  if (p.rollout_correction < kSequenceTruncate) return;
  const double tested = static_cast<T>(
      std::exp(p.rollout_correction == kSequenceIcepop ? sums.gap / c.tokens : sums.gap));
  c.dropped = tested < p.rollout_min || tested > p.rollout_max;
  c.correction = p.rollout_correction == kSequenceTruncate
                     ? clamp(tested, p.rollout_min, p.rollout_max)
                 : c.dropped ? 0.0
                             : tested;
}

VCR1_HOST_DEVICE static inline double vespo_log(double weight) {
  return clamp(std::log(weight), kVespoFloor, kVespoCeiling);
}

// bounded: the sum of that name; log_weight: that of vespo_log of the rollout corrections.
VCR1_HOST_DEVICE static inline void set_vespo(const Parameters& p, double bounded,
                                              double log_weight, Completion& c) {
  const double log_w = clamp(bounded + log_weight, kVespoFloor, kVespoCeiling);
  const double lambda_pos = p.vespo_lambda_pos > 1e-4 ? p.vespo_lambda_pos : 1e-4;
  const double lambda_neg = p.vespo_lambda_neg > 1e-4 ? p.vespo_lambda_neg : 1e-4;
  c.phi_pos = std::exp(lambda_pos + p.vespo_k_pos * log_w - lambda_pos * std::exp(log_w));
  c.phi_neg = std::exp(lambda_neg + p.vespo_k_neg * log_w - lambda_neg * std::exp(log_w));
}

template <typename T>
struct Correction {
  T weight, clipped;  // of the rollout; clipped: 1 where it changed the token
};

// Of a correction by token, and icepop: x = e^gap.
template <typename T>
VCR1_HOST_DEVICE static inline Correction<T> token_correction(const GrpoLossArgs& a,
                                                              const Completion& c, T x) {
  const Parameters& p = a.parameters;
  const T low = static_cast<T>(p.rollout_min), high = static_cast<T>(p.rollout_max);
  const bool outside = p.rollout_correction == kSequenceIcepop ? c.dropped : x < low || x > high;
  const T weight = p.rollout_correction == kTokenTruncate ? clamp(x, low, high)
                   : outside                              ? T{0}
                                                          : x;
  return {weight, static_cast<T>(outside)};
}

// Of a correction that is one number a completion.
VCR1_HOST_DEVICE static inline bool corrects_whole(const Parameters& p) {
  return p.rollout_correction == kSequenceTruncate || p.rollout_correction == kSequenceMask;
}

// Value, derivative in the ratio, direct derivative in the log-prob.
template <typename T>
struct Policy {
  T value, d_ratio, d_logp;
};

template <typename T>
VCR1_HOST_DEVICE static inline Policy<T> clipped_policy(T r, T a, T low, T high, T delta) {
  const T free = (r > delta ? delta : r) * a, clipped = clamp(r, low, high) * a;
  const T d_free = r <= delta ? -a : T{0};
  const T d_clipped = r >= low && r <= high ? -a : T{0};
  const T tie = T{0.5} * (d_free + d_clipped);
  return {-(free < clipped ? free : clipped),
          free < clipped   ? d_free
          : free > clipped ? d_clipped
                           : tie,
          T{0}};
}

// cispo and vespo: phi is a constant for the gradient.
template <typename T>
VCR1_HOST_DEVICE static inline Policy<T> weighted_policy(T phi, T a, T logp) {
  return {-phi * a * logp, T{0}, -phi * a};
}

template <typename T>
VCR1_HOST_DEVICE static inline Policy<T> sapo_policy(T a, T tau, T e) {  // e = e^(tau (1 - r))
  const T gate = 1 / (1 + e), step = -4 * a * gate;
  return {step / tau, step * (1 - gate), T{0}};
}

template <typename T>
struct KlTerm {
  T value, d_logp;
};

// raw = ref - logp; d: raw within +-limit; e = e^d, needed for k3 only.
template <typename T>
VCR1_HOST_DEVICE static inline KlTerm<T> kl_term(const Parameters& p, T raw, T d, T e, T limit,
                                                 T bound) {
  T value = std::abs(d), slope = d > 0 ? T{1} : d < 0 ? T{-1} : T{0};
  if (p.kl == kK1) value = -d, slope = -1;
  if (p.kl == kK2) value = T{0.5} * d * d, slope = d;
  if (p.kl == kK3) value = e - d - 1, slope = e - 1;
  bool inside = std::abs(raw) <= limit;
  if (p.kl_straight_through)
    slope = d;
  else
    inside = inside && std::abs(value) <= bound;
  return {clamp(value, -bound, bound), inside ? -slope : T{0}};
}

// A token's part of the loss, and of its gradient: directly in logp, and through s, the log-ratio.
template <typename T>
struct Part {
  T policy, loss, direct, d_s;
};

// factor: F of the reference; correction: the token's rollout weight.
template <typename T>
VCR1_HOST_DEVICE static inline Part<T> combine(const Parameters& p, T weight, T beta, T factor,
                                               T correction, T ratio, const Policy<T>& policy,
                                               const KlTerm<T>& kl) {
  const T bias = p.kl_bias_correction ? ratio : T{1};
  const T kl_weight = beta * (p.rollout_after_kl && p.loss_type != kVespo ? correction : T{1});
  T through = factor * policy.d_ratio;
  if (p.kl_bias_correction) through += kl_weight * kl.value;
  Part<T> out;
  out.policy = policy.value * (factor * weight);
  out.loss = out.policy + weight * kl_weight * kl.value * bias;
  out.direct = weight * (factor * policy.d_logp + kl_weight * kl.d_logp * bias);
  out.d_s = weight * through * ratio;
  return out;
}

}  // namespace vcr1::grpo

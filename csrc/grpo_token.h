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

// A token with everything that its gradient and its metrics take.
template <typename T>
struct Evaluated {
  Token<T> token;
  T token_ratio, ratio, phi, kept;
  Correction<T> correction;
  KlTerm<T> kl;
  Part<T> part;
};

template <typename T>
VCR1_HOST_DEVICE static inline Correction<T> rollout_correction(const GrpoLossArgs& a,
                                                                const Completion& c, T gap) {
  const Parameters& p = a.parameters;
  if (p.rollout_correction == kNone) return {T{1}, T{0}};
  if (corrects_whole(p)) return {static_cast<T>(c.correction), static_cast<T>(c.dropped)};
  return token_correction(a, c, std::exp(gap));
}

template <typename T>
VCR1_HOST_DEVICE static inline Policy<T> policy_term(const GrpoLossArgs& a, const Completion& c,
                                                     const Token<T>& t, T ratio, T& phi) {
  const Parameters& p = a.parameters;
  const T low = static_cast<T>(p.ratio_low), high = static_cast<T>(p.ratio_high);
  phi = 0;
  if (p.loss_type == kVespo) {
    phi = static_cast<T>(t.advantage >= 0 ? c.phi_pos : c.phi_neg);
    return weighted_policy(phi, t.advantage, t.logp);
  }
  if (p.loss_type == kCispo) return weighted_policy(clamp(ratio, low, high), t.advantage, t.logp);
  if (p.loss_type == kSapo) {
    const T tau = static_cast<T>(t.advantage > 0 ? p.sapo_tau_pos : p.sapo_tau_neg);
    return sapo_policy(t.advantage, tau, std::exp(tau * (1 - ratio)));
  }
  return clipped_policy(ratio, t.advantage, low, high, static_cast<T>(p.delta));
}

template <typename T>
VCR1_HOST_DEVICE static inline KlTerm<T> reference_term(const GrpoLossArgs& a, const Token<T>& t,
                                                        int64_t i) {
  if (a.ref_logps == nullptr) return {T{0}, T{0}};
  const Parameters& p = a.parameters;
  const T limit = static_cast<T>(p.kl_input_clamp);
  const T raw = t.counts ? static_cast<const T*>(a.ref_logps)[i] - t.logp : T{0};
  const T d = clamp(raw, -limit, limit);
  return kl_term(p, raw, d, p.kl == kK3 ? std::exp(d) : T{0}, limit,
                 static_cast<T>(p.kl_output_clamp));
}

// Token i, `t`, of a completion whose tokens weigh `weight` in the loss.
template <typename T>
VCR1_HOST_DEVICE static inline Evaluated<T> evaluate(const GrpoLossArgs& a, const Completion& c,
                                                     const Token<T>& t, int64_t i, T weight) {
  const Parameters& p = a.parameters;
  Evaluated<T> out;
  out.token = t;
  out.token_ratio = std::exp(t.log_ratio);
  out.ratio = p.level == kToken ? out.token_ratio : std::exp(static_cast<T>(c.log_ratio));
  out.correction = rollout_correction(a, c, t.gap);
  const bool kept = !(c.off_policy && t.advantage < 0);
  out.kept = static_cast<T>(kept);
  T factor = p.loss_type == kVespo ? T{1} : out.correction.weight;
  if (a.token_weights != nullptr)
    factor *= t.counts ? static_cast<const T*>(a.token_weights)[i] : T{0};
  const Policy<T> policy = policy_term(a, c, t, out.ratio, out.phi);
  out.kl = reference_term(a, t, i);
  out.part = combine(p, weight, static_cast<T>(p.beta), kept ? factor : T{0}, out.correction.weight,
                     out.ratio, policy, out.kl);
  return out;
}

// Values that the whole batch shares. weight: of a token, but for a mean over its completion.
struct Batch {
  double tokens, weight, entropy_weight;
};

// tokens, sequences, entropy_weight: sums over all completions.
template <typename T>
VCR1_HOST_DEVICE static inline Batch batch_of(const GrpoLossArgs& a, double tokens,
                                              double sequences, double entropy_weight) {
  const Parameters& p = a.parameters;
  const bool by_tokens = p.aggregation == kTokenMean || p.aggregation == kNumItems;
  double count = p.exclude_empty ? sequences : static_cast<double>(a.sequences);
  if (by_tokens) count = tokens;
  if (p.aggregation == kNumItems && p.num_items != 0.0) count = p.num_items;
  if (!by_tokens && p.num_sequences != 0.0) count = p.num_sequences;
  if (a.denominator != nullptr) count = *static_cast<const T*>(a.denominator);
  Batch out{tokens, 1.0 / (count > 1.0 ? count : 1.0),
            entropy_weight > 0.0 ? 1.0 / entropy_weight : 1.0};
  if (p.aggregation == kMaxLength) out.weight /= p.max_length;
  return out;
}

// The loss weight of each of the `tokens` tokens of completion b.
template <typename T>
VCR1_HOST_DEVICE static inline double token_weight(const GrpoLossArgs& a, const Batch& batch,
                                                   int64_t b, double tokens) {
  if (a.weights != nullptr) return static_cast<const T*>(a.weights)[b];
  return a.parameters.aggregation == kSequenceMean ? batch.weight / (tokens > 1.0 ? tokens : 1.0)
                                                   : batch.weight;
}

// The gradient of a token's entropy, but for the token's own weight.
VCR1_HOST_DEVICE static inline double entropy_scale(const Parameters& p, const Batch& batch,
                                                    double weight) {
  return -p.entropy_coef * (p.entropy_token_mean ? batch.entropy_weight : weight);
}

// The tokens of completion b: [begin, end).
VCR1_HOST_DEVICE static inline void token_range(const GrpoLossArgs& a, int64_t b, int64_t& begin,
                                                int64_t& end) {
  begin = b * a.columns;
  end = begin + a.columns;
  if (a.offsets == nullptr) return;
  const auto within = [](int64_t x, int64_t low, int64_t high) {
    return x < low ? low : x > high ? high : x;
  };
  begin = within(a.offsets[b], 0, a.tokens);
  end = within(a.offsets[b + 1], begin, a.tokens);
}

// The tokens before `first` and from `last` on are in no completion.
VCR1_HOST_DEVICE static inline void covered_range(const GrpoLossArgs& a, int64_t& first,
                                                  int64_t& last) {
  int64_t unused;
  first = 0, last = a.tokens;
  if (a.offsets == nullptr) return;
  last = first;
  if (a.sequences == 0) return;
  token_range(a, 0, first, unused);
  token_range(a, a.sequences - 1, unused, last);
}

// Adds token i of completion b to sums: of tokens, of their weights, and of old - rollout.
template <typename T>
VCR1_HOST_DEVICE static inline void add_counts(const GrpoTokensArgs& a, int64_t b, int64_t i,
                                               double (&sums)[3]) {
  const GrpoLossArgs& given = a.loss;
  if (given.mask != nullptr && !given.mask[i]) return;
  sums[0] += 1.0;
  sums[1] += given.token_weights != nullptr ? static_cast<const T*>(given.token_weights)[i] : T{1};
  if (a.rollout_logps != nullptr) sums[2] += load_token<T>(given, b, i, true, T{0}).gap;
}

// The completion of these sums: its count and its rollout correction.
template <typename T>
VCR1_HOST_DEVICE static inline Completion counted(const GrpoTokensArgs& a,
                                                  const double (&sums)[3]) {
  Completion c{};
  c.tokens = sums[0];
  c.correction = 1.0;
  if (a.rollout_logps != nullptr && c.tokens > 0.0)
    set_statistics<T>(a.loss, {0.0, 0.0, sums[2], 0.0}, c);
  return c;
}

// What the rows of a head need of token i of completion b: see GrpoTokensArgs.
template <typename T>
VCR1_HOST_DEVICE static inline void write_token(const GrpoTokensArgs& a, const Completion& c,
                                                double entropy_scale, int64_t b, int64_t i) {
  const GrpoLossArgs& given = a.loss;
  const Token<T> t = load_token<T>(given, b, i, given.mask == nullptr || given.mask[i], T{0});
  a.keep[i] = t.counts;
  static_cast<T*>(a.weights)[i] = t.counts ? static_cast<T>(c.weight) : T{0};
  static_cast<T*>(a.advantages)[i] = t.advantage;
  if (a.grad_entropy != nullptr) {
    const T own = given.token_weights == nullptr ? T{1}
                  : t.counts                     ? static_cast<const T*>(given.token_weights)[i]
                                                 : T{0};
    static_cast<T*>(a.grad_entropy)[i] = t.counts ? static_cast<T>(entropy_scale) * own : T{0};
  }
  if (a.rollout_logps == nullptr) return;
  const T weight = given.parameters.rollout_correction == kSequenceIcepop
                       ? c.dropped ? T{0} : std::exp(t.gap)
                       : static_cast<T>(c.correction);
  static_cast<T*>(a.rollout_logps)[i] = t.before - std::log(weight);
}

// A token in no completion.
template <typename T>
VCR1_HOST_DEVICE static inline void write_nothing(const GrpoTokensArgs& a, int64_t i) {
  a.keep[i] = false;
  void* const outputs[4] = {a.weights, a.advantages, a.grad_entropy, a.rollout_logps};
  for (void* const out : outputs)
    if (out != nullptr) static_cast<T*>(out)[i] = T{0};
}

// dloss/dlogp of token i, a completion by itself with its weight.
template <typename T>
VCR1_HOST_DEVICE static inline T token_gradient(const GrpoLossArgs& a, int64_t i) {
  Completion c{};
  c.correction = 1.0;
  const Token<T> t = load_token<T>(a, i, i, true, static_cast<const T*>(a.logps)[i]);
  const Part<T> part = evaluate(a, c, t, i, static_cast<const T*>(a.weights)[i]).part;
  return part.direct + part.d_s * t.unclamped;
}

VCR1_HOST_DEVICE static inline void pack_element(const GrpoPackArgs::Vector& v, int64_t from,
                                                 int64_t to) {
  if (v.element == 8)
    static_cast<int64_t*>(v.to)[to] = static_cast<const int64_t*>(v.from)[from];
  else if (v.element == 4)
    static_cast<int32_t*>(v.to)[to] = static_cast<const int32_t*>(v.from)[from];
  else
    static_cast<int8_t*>(v.to)[to] = static_cast<const int8_t*>(v.from)[from];
}

// How many of the `count` numbers, ascending, are below x.
VCR1_HOST_DEVICE static inline int64_t lower_bound(const int64_t* numbers, int64_t count,
                                                   int64_t x) {
  int64_t low = 0;
  while (count > 0) {
    const int64_t half = count / 2;
    if (numbers[low + half] < x) {
      low += half + 1;
      count -= half + 1;
    } else {
      count = half;
    }
  }
  return low;
}

// Where completion b begins among the packed tokens.
VCR1_HOST_DEVICE static inline int64_t packed_offset(const GrpoPackArgs& a, int64_t b) {
  return lower_bound(a.rows, a.count, a.offsets != nullptr ? a.offsets[b] : b * a.length);
}

}  // namespace vcr1::grpo

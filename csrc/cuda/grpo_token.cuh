// One token of the GRPO loss, with everything that its gradient and its metrics take: see
// vcr1_fast/ops/grpo/reference.py for the maths.
#pragma once

#include "../grpo_token.h"
#include "common.cuh"

namespace vcr1::cuda {

using namespace vcr1::grpo;

template <typename T>
struct Evaluated {
  Token<T> token;
  T token_ratio, ratio, phi, kept;
  Correction<T> correction;
  KlTerm<T> kl;
  Part<T> part;
};

template <typename T>
__device__ inline Correction<T> rollout_correction(const GrpoLossArgs& a, const Completion& c,
                                                   T gap) {
  const Parameters& p = a.parameters;
  if (p.rollout_correction == kNone) return {T{1}, T{0}};
  if (corrects_whole(p)) return {static_cast<T>(c.correction), static_cast<T>(c.dropped)};
  return token_correction(a, c, std::exp(gap));
}

template <typename T>
__device__ inline Policy<T> policy_term(const GrpoLossArgs& a, const Completion& c,
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
__device__ inline KlTerm<T> reference_term(const GrpoLossArgs& a, const Token<T>& t, int64_t i) {
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
__device__ inline Evaluated<T> evaluate(const GrpoLossArgs& a, const Completion& c,
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

}  // namespace vcr1::cuda

// The terms of the GRPO loss on blocks of tokens: see vcr1_fast/ops/grpo_terms.py for the maths.
// Included only by files that vcr1_cpu_kernel() builds.
#pragma once

#include <algorithm>
#include <cmath>

#include "../grpo_token.h"
#include "simd.h"

namespace vcr1::cpu::VCR1_ISA {
namespace {

using namespace vcr1::grpo;

constexpr int kBlock = 256;  // tokens worked on at a time, in the first-level cache

// x and out must not be the same.
void exp_all(const double* x, double* out, int n) {
  for (int i = 0; i < n; ++i) out[i] = std::exp(x[i]);
}

void exp_all(const float* x, float* out, int n) {
  constexpr float kLargest = 88.0f;  // of simd.h's exp
  int i = 0;
  for (; i + Vec::kWidth <= n; i += Vec::kWidth) store(out + i, exp(load(x + i)));
  if (i < n) store_partial(out + i, exp(load_partial(x + i, n - i, 0.0f)), n - i);
  for (int j = 0; j < n; ++j)
    if (x[j] > kLargest) out[j] = std::exp(x[j]);
}

// Sum over the tokens that count; eight partial sums let the compiler use vectors.
template <typename T>
double sum(const T* x, const bool* counts, int n) {
  double lanes[8] = {};
  int i = 0;
  for (; i + 8 <= n; i += 8)
    for (int k = 0; k < 8; ++k) lanes[k] += counts[i + k] ? double{x[i + k]} : 0.0;
  for (; i < n; ++i) lanes[i % 8] += counts[i] ? double{x[i]} : 0.0;
  return ((lanes[0] + lanes[4]) + (lanes[2] + lanes[6])) +
         ((lanes[1] + lanes[5]) + (lanes[3] + lanes[7]));
}

// A completion and what its tokens add up to.
struct Sums : Completion {
  double* sums;
  double grad_s;  // sum of dloss/ds, for sequence ratios
};

template <typename T>
struct Block {
  bool counts[kBlock];
  T logp[kBlock], log_ratio[kBlock], advantage[kBlock], gap[kBlock];
  T unclamped[kBlock], ratio[kBlock], token_ratio[kBlock];
  T policy[kBlock], d_ratio[kBlock], d_logp[kBlock], phi[kBlock];
  T kl[kBlock], d_kl[kBlock];
  T factor[kBlock], weight[kBlock], clipped[kBlock];  // of the policy; the rollout correction
  T scratch[kBlock];
};

template <typename T>
class Terms {
 public:
  explicit Terms(const GrpoLossArgs& args) : a_(args), k_(args.kinds), v_(args.values) {}

 protected:
  const T* logps() const { return static_cast<const T*>(a_.logps); }
  const T* old() const { return static_cast<const T*>(a_.old_logps); }

  void load_tokens(int64_t b, int64_t first, int n, Block<T>& t) const {
    for (int j = 0; j < n; ++j) {
      const Token<T> token = load_token<T>(a_, b, first + j);
      t.counts[j] = token.counts;
      t.logp[j] = token.logp;
      t.log_ratio[j] = token.log_ratio;
      t.unclamped[j] = token.unclamped;
      t.advantage[j] = token.advantage;
      t.gap[j] = token.gap;
    }
  }

  void ratios(const Completion& c, int n, Block<T>& t) const {
    exp_all(t.log_ratio, t.token_ratio, n);
    if (k_.level == kToken)
      std::copy(t.token_ratio, t.token_ratio + n, t.ratio);
    else
      std::fill(t.ratio, t.ratio + n, std::exp(static_cast<T>(c.log_ratio)));
  }

  // The rollout correction of each token, and whether it changed the token.
  void rollout(const Completion& c, int n, Block<T>& t) const {
    if (corrects_whole(k_)) {
      std::fill(t.weight, t.weight + n, static_cast<T>(c.correction));
      std::fill(t.clipped, t.clipped + n, static_cast<T>(c.dropped));
      return;
    }
    exp_all(t.gap, t.weight, n);
    for (int j = 0; j < n; ++j) {
      const Correction<T> correction = token_correction(a_, c, t.weight[j]);
      t.weight[j] = correction.weight;
      t.clipped[j] = correction.clipped;
    }
  }

  // F of the reference: what multiplies the policy term and is constant for the gradient.
  void factors(int64_t first, const Sums& c, int n, Block<T>& t) const {
    const T* const token_weights = static_cast<const T*>(a_.token_weights);
    if (k_.rollout != kNone) {
      rollout(c, n, t);
    } else {
      std::fill(t.weight, t.weight + n, T{1});
      std::fill(t.clipped, t.clipped + n, T{0});
    }
    for (int j = 0; j < n; ++j) {
      const bool kept = !(c.off_policy && t.advantage[j] < 0);
      T factor = k_.loss == kVespo ? T{1} : t.weight[j];
      if (token_weights != nullptr) factor *= t.counts[j] ? token_weights[first + j] : T{0};
      t.factor[j] = kept ? factor : T{0};
      t.scratch[j] = static_cast<T>(kept);
    }
    c.sums[kOffPolicyKept] += sum(t.scratch, t.counts, n);
  }

  // The policy term, its derivative in the ratio and its direct derivative in logp.
  void policy(const Sums& c, int n, Block<T>& t) const {
    const T low = static_cast<T>(v_.ratio_low), high = static_cast<T>(v_.ratio_high);
    const T delta = static_cast<T>(v_.delta);
    const auto put = [&](int j, const Policy<T>& term) {
      t.policy[j] = term.value;
      t.d_ratio[j] = term.d_ratio;
      t.d_logp[j] = term.d_logp;
    };
    if (k_.loss == kVespo) {
      for (int j = 0; j < n; ++j) {
        t.phi[j] = static_cast<T>(t.advantage[j] >= 0 ? c.phi_pos : c.phi_neg);
        put(j, weighted_policy(t.phi[j], t.advantage[j], t.logp[j]));
      }
      c.sums[kVespoPhi] += sum(t.phi, t.counts, n);
    } else if (k_.loss == kCispo) {
      for (int j = 0; j < n; ++j)
        put(j, weighted_policy(clamp(t.ratio[j], low, high), t.advantage[j], t.logp[j]));
    } else if (k_.loss == kSapo) {
      const T tau_pos = static_cast<T>(v_.sapo_tau_pos), tau_neg = static_cast<T>(v_.sapo_tau_neg);
      for (int j = 0; j < n; ++j)
        t.scratch[j] = (t.advantage[j] > 0 ? tau_pos : tau_neg) * (1 - t.ratio[j]);
      exp_all(t.scratch, t.phi, n);
      for (int j = 0; j < n; ++j)
        put(j, sapo_policy(t.advantage[j], t.advantage[j] > 0 ? tau_pos : tau_neg, t.phi[j]));
    } else {
      for (int j = 0; j < n; ++j)
        put(j, clipped_policy(t.ratio[j], t.advantage[j], low, high, delta));
    }
  }

  void kl(int64_t first, int n, Block<T>& t) const {
    if (a_.ref_logps == nullptr) {
      std::fill(t.kl, t.kl + n, T{0});
      std::fill(t.d_kl, t.d_kl + n, T{0});
      return;
    }
    const T* const ref = static_cast<const T*>(a_.ref_logps);
    const T limit = static_cast<T>(v_.kl_input_clamp), bound = static_cast<T>(v_.kl_output_clamp);
    for (int j = 0; j < n; ++j)
      t.scratch[j] = clamp(t.counts[j] ? ref[first + j] - t.logp[j] : T{0}, -limit, limit);
    if (k_.kl == kK3) exp_all(t.scratch, t.kl, n);
    for (int j = 0; j < n; ++j) {
      const T raw = t.counts[j] ? ref[first + j] - t.logp[j] : T{0};
      const KlTerm<T> term = kl_term(k_, raw, t.scratch[j], t.kl[j], limit, bound);
      t.kl[j] = term.value;
      t.d_kl[j] = term.d_logp;
    }
  }

  const GrpoLossArgs& a_;
  const Kinds& k_;
  const Values& v_;
};

}  // namespace
}  // namespace vcr1::cpu::VCR1_ISA

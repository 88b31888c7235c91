// The terms of the GRPO loss on blocks of tokens: see vcr1_fast/ops/grpo_terms.py for the maths.
// Included only by files that vcr1_cpu_kernel() builds.
#pragma once

#include <algorithm>
#include <cmath>

#include "../kernels.h"
#include "simd.h"

namespace vcr1::cpu::VCR1_ISA {
namespace {

using namespace vcr1::grpo;

constexpr int kBlock = 256;  // tokens worked on at a time, in the first-level cache
constexpr double kVespoFloor = -18.420680743952367;  // log 1e-8
constexpr double kVespoCeiling = 20.0;

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

template <typename T>
T clamp(T x, double low, double high) {
  return x < static_cast<T>(low)    ? static_cast<T>(low)
         : x > static_cast<T>(high) ? static_cast<T>(high)
                                    : x;
}

// What the tokens of one completion share.
struct Completion {
  double* sums;
  double weight;     // of a token in the loss
  double tokens;     // that count
  double log_ratio;  // mean
  double phi_pos, phi_neg;
  double correction;  // rollout weight of the completion
  bool dropped;       // by the rollout correction
  bool off_policy;    // leave out where the advantage is negative
  double grad_s;      // sum of dloss/ds, for sequence ratios
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
    const T* const rollout = static_cast<const T*>(a_.rollout_logps);
    const T* const advantages = static_cast<const T*>(a_.advantages);
    const T limit = static_cast<T>(v_.log_ratio_clamp);
    for (int j = 0; j < n; ++j) {
      const int64_t i = first + j;
      const bool counts = a_.mask == nullptr || a_.mask[i];
      // Selected, not multiplied: what stands outside the mask may be inf or nan.
      const T logp = counts ? logps()[i] : T{0};
      const T before = counts && a_.old_logps != nullptr ? old()[i] : logp;
      const T x = logp - before;
      t.counts[j] = counts;
      t.logp[j] = logp;
      t.log_ratio[j] = clamp(x, -limit, limit);
      t.unclamped[j] = std::abs(x) <= limit ? T{1} : T{0};
      t.advantage[j] = counts ? advantages[a_.token_advantages ? i : b] : T{0};
      if (rollout != nullptr) {
        const T gap = counts ? before - rollout[i] : T{0};
        t.gap[j] = std::isnan(gap) ? T{0} : gap;
      }
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
    if (k_.rollout == kSequenceTruncate || k_.rollout == kSequenceMask) {
      std::fill(t.weight, t.weight + n, static_cast<T>(c.correction));
      std::fill(t.clipped, t.clipped + n, static_cast<T>(c.dropped));
      return;
    }
    exp_all(t.gap, t.weight, n);
    const T low = static_cast<T>(v_.rollout_min), high = static_cast<T>(v_.rollout_max);
    for (int j = 0; j < n; ++j) {
      const T x = t.weight[j];
      const bool outside = k_.rollout == kSequenceIcepop ? c.dropped : x < low || x > high;
      t.clipped[j] = static_cast<T>(outside);
      t.weight[j] = k_.rollout == kTokenTruncate ? clamp(x, low, high) : outside ? T{0} : x;
    }
  }

  // F of the reference: what multiplies the policy term and is constant for the gradient.
  void factors(int64_t first, const Completion& c, int n, Block<T>& t) const {
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
  void policy(const Completion& c, int n, Block<T>& t) const {
    const T low = static_cast<T>(v_.ratio_low), high = static_cast<T>(v_.ratio_high);
    const T delta = static_cast<T>(v_.delta);
    const auto direct = [&](int j, T phi) {
      t.policy[j] = -phi * t.advantage[j] * t.logp[j];
      t.d_ratio[j] = 0;
      t.d_logp[j] = -phi * t.advantage[j];
    };
    if (k_.loss == kVespo) {
      for (int j = 0; j < n; ++j) {
        t.phi[j] = static_cast<T>(t.advantage[j] >= 0 ? c.phi_pos : c.phi_neg);
        direct(j, t.phi[j]);
      }
      c.sums[kVespoPhi] += sum(t.phi, t.counts, n);
    } else if (k_.loss == kCispo) {
      for (int j = 0; j < n; ++j) direct(j, clamp(t.ratio[j], low, high));
    } else if (k_.loss == kSapo) {
      const T tau_pos = static_cast<T>(v_.sapo_tau_pos), tau_neg = static_cast<T>(v_.sapo_tau_neg);
      for (int j = 0; j < n; ++j)
        t.scratch[j] = (t.advantage[j] > 0 ? tau_pos : tau_neg) * (1 - t.ratio[j]);
      exp_all(t.scratch, t.phi, n);
      for (int j = 0; j < n; ++j) {
        const T gate = 1 / (1 + t.phi[j]);
        const T step = -4 * t.advantage[j] * gate;
        t.policy[j] = step / (t.advantage[j] > 0 ? tau_pos : tau_neg);
        t.d_ratio[j] = step * (1 - gate);
        t.d_logp[j] = 0;
      }
    } else {
      for (int j = 0; j < n; ++j) {
        const T r = t.ratio[j], a = t.advantage[j];
        const T free = (r > delta ? delta : r) * a, clipped = clamp(r, low, high) * a;
        const T d_free = r <= delta ? -a : T{0};
        const T d_clipped = r >= low && r <= high ? -a : T{0};
        const T tie = T{0.5} * (d_free + d_clipped);
        t.policy[j] = -(free < clipped ? free : clipped);
        t.d_ratio[j] = free < clipped ? d_free : free > clipped ? d_clipped : tie;
        t.d_logp[j] = 0;
      }
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
      const T d = t.scratch[j];
      const T raw = t.counts[j] ? ref[first + j] - t.logp[j] : T{0};
      T value = std::abs(d), slope = d > 0 ? T{1} : d < 0 ? T{-1} : T{0};
      if (k_.kl == kK1) value = -d, slope = -1;
      if (k_.kl == kK2) value = T{0.5} * d * d, slope = d;
      if (k_.kl == kK3) value = t.kl[j] - d - 1, slope = t.kl[j] - 1;
      bool inside = std::abs(raw) <= limit;
      if (k_.kl_straight_through)
        slope = d;
      else
        inside = inside && std::abs(value) <= bound;
      t.kl[j] = clamp(value, -bound, bound);
      t.d_kl[j] = inside ? -slope : T{0};
    }
  }

  const GrpoLossArgs& a_;
  const Kinds& k_;
  const Values& v_;
};

}  // namespace
}  // namespace vcr1::cpu::VCR1_ISA

// The terms of the GRPO loss on blocks of tokens; the maths is in vcr1_fast/ops/grpo/reference.py.
// Included only by files that vcr1_cpu_kernel() builds.
//
// Every loop runs over whole vectors of a block's arrays, without branches, so that the compiler
// can use them: values outside the mask or beyond the completion are set to 0 on loading, and
// options are looked at before a loop, not in it.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>

#include "../grpo_token.h"
#include "../kernels.h"
#include "simd.h"

namespace vcr1::cpu::VCR1_ISA {
namespace {

using namespace vcr1::grpo;

constexpr int kBlock = 256;  // tokens worked on at a time, in the first-level cache
constexpr int kLanes = 16;   // tokens are padded to a multiple of the widest vector

// In all functions on arrays n is a multiple of kLanes. x and out must not be the same.
inline void exp_all(const double* x, double* out, int n) {
  for (int i = 0; i < n; ++i) out[i] = std::exp(x[i]);
}

inline void exp_all(const float* x, float* out, int n) {
  constexpr float kLargest = 88.0f;  // of simd.h's exp
  Vec top = splat(-1.0f);
  for (int i = 0; i < n; i += Vec::kWidth) {
    const Vec v = load(x + i);
    top = max(v, top);
    store(out + i, exp(v));
  }
  if (!(reduce_max(top) > kLargest)) return;
  for (int i = 0; i < n; ++i)
    if (x[i] > kLargest) out[i] = std::exp(x[i]);
}

// Of a block, in an order that does not depend on anything but n; a completion's blocks are added
// in double precision.
inline double sum(const float* x, int n) {
  Vec a = splat(0.0f), b = a;
  int i = 0;
  for (; i + 2 * Vec::kWidth <= n; i += 2 * Vec::kWidth) {
    a = add(a, load(x + i));
    b = add(b, load(x + i + Vec::kWidth));
  }
  if (i < n) a = add(a, load(x + i));
  return reduce_add(add(a, b));
}

inline double sum(const double* x, int n) {
  double lanes[8] = {};
  for (int i = 0; i < n; i += 8)
    for (int k = 0; k < 8; ++k) lanes[k] += x[i + k];
  return ((lanes[0] + lanes[4]) + (lanes[2] + lanes[6])) +
         ((lanes[1] + lanes[5]) + (lanes[3] + lanes[7]));
}

// NaN is passed over.
inline float largest(const float* x, int n) {
  Vec top = splat(-std::numeric_limits<float>::infinity());
  for (int i = 0; i < n; i += Vec::kWidth) top = max(load(x + i), top);
  return reduce_max(top);
}

inline double largest(const double* x, int n) {
  double top = -std::numeric_limits<double>::infinity();
  for (int i = 0; i < n; ++i) top = x[i] > top ? x[i] : top;
  return top;
}

// A completion and what its tokens add up to.
struct Sums : Completion {
  double* sums;
  double grad_s;  // sum of dloss/ds, for sequence ratios
};

template <typename T>
struct alignas(64) Block {
  T counts[kBlock];  // 1 or 0
  T logp[kBlock], log_ratio[kBlock], unclamped[kBlock], advantage[kBlock], gap[kBlock];
  T ratio[kBlock], token_ratio[kBlock];
  T policy[kBlock], d_ratio[kBlock], d_logp[kBlock];
  T kl[kBlock], d_kl[kBlock];
  T factor[kBlock], weight[kBlock], clipped[kBlock];  // of the policy; the rollout correction
  T scratch[kBlock], raw[kBlock];
};

template <typename T>
class Terms {
 public:
  explicit Terms(const GrpoLossArgs& args) : a_(args), p_(args.parameters) {}

 protected:
  // The elements of a tensor from `first`, 0 where the token does not count and up to n. Selected,
  // not multiplied: values outside the mask may be inf or nan.
  void take(const void* tensor, int64_t first, const T* counts, int valid, int n, T* out) const {
    const T* const x = static_cast<const T*>(tensor) + first;
    for (int j = 0; j < valid; ++j) {
      const T value = x[j];
      out[j] = counts[j] != 0 ? value : T{0};
    }
    for (int j = valid; j < n; ++j) out[j] = 0;
  }

  // Loads tokens first .. first + valid - 1 of completion b; returns the padded number of them.
  int load_tokens(int64_t b, int64_t first, int valid, Block<T>& t) const {
    const int n = (valid + kLanes - 1) / kLanes * kLanes;
    if (a_.mask != nullptr) {
      for (int j = 0; j < valid; ++j) t.counts[j] = static_cast<T>(a_.mask[first + j]);
    } else {
      for (int j = 0; j < valid; ++j) t.counts[j] = 1;
    }
    for (int j = valid; j < n; ++j) t.counts[j] = 0;
    take(a_.logps, first, t.counts, valid, n, t.logp);
    if (a_.old_logps != nullptr) {
      const T limit = static_cast<T>(p_.log_ratio_clamp);
      take(a_.old_logps, first, t.counts, valid, n, t.raw);
      for (int j = 0; j < n; ++j) {
        const T x = t.logp[j] - t.raw[j];
        t.log_ratio[j] = clamp(x, -limit, limit);
        t.unclamped[j] = std::abs(x) <= limit ? T{1} : T{0};
      }
    } else {
      std::copy(t.logp, t.logp + n, t.raw);
      // 0 for every finite log-prob; an infinite one must not pass as a ratio of 1.
      for (int j = 0; j < n; ++j) t.log_ratio[j] = t.logp[j] - t.logp[j];
      std::fill(t.unclamped, t.unclamped + n, T{1});
    }
    if (a_.rollout_logps != nullptr) {
      take(a_.rollout_logps, first, t.counts, valid, n, t.scratch);
      for (int j = 0; j < n; ++j) {
        const T gap = t.raw[j] - t.scratch[j];
        t.gap[j] = gap != gap ? T{0} : gap;
      }
    }
    if (a_.token_advantages) {
      take(a_.advantages, first, t.counts, valid, n, t.advantage);
    } else {
      const T advantage = static_cast<const T*>(a_.advantages)[b];
      for (int j = 0; j < n; ++j) t.advantage[j] = t.counts[j] != 0 ? advantage : T{0};
    }
    return n;
  }

  void ratios(const Sums& c, int n, Block<T>& t) const {
    exp_all(t.log_ratio, t.token_ratio, n);
    if (p_.level == kToken)
      std::copy(t.token_ratio, t.token_ratio + n, t.ratio);
    else
      std::fill(t.ratio, t.ratio + n, std::exp(static_cast<T>(c.log_ratio)));
  }

  // The rollout correction of each token, and whether it changed the token.
  void rollout(const Sums& c, int n, Block<T>& t) const {
    if (p_.rollout_correction == kNone || corrects_whole(p_)) {
      std::fill(t.weight, t.weight + n,
                p_.rollout_correction == kNone ? T{1} : static_cast<T>(c.correction));
      std::fill(t.clipped, t.clipped + n,
                static_cast<T>(p_.rollout_correction != kNone && c.dropped));
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
  void factors(int64_t first, const Sums& c, int valid, int n, Block<T>& t) const {
    rollout(c, n, t);
    if (p_.loss_type == kVespo)
      std::fill(t.factor, t.factor + n, T{1});
    else
      std::copy(t.weight, t.weight + n, t.factor);
    if (a_.token_weights != nullptr) {
      take(a_.token_weights, first, t.counts, valid, n, t.scratch);
      for (int j = 0; j < n; ++j) t.factor[j] *= t.scratch[j];
    }
    if (!std::isfinite(p_.off_policy_threshold)) {
      c.sums[kOffPolicyKept] = c.tokens;
      return;
    }
    const bool off_policy = c.off_policy;
    for (int j = 0; j < n; ++j) {
      const bool drop = off_policy & (t.advantage[j] < 0);
      t.factor[j] = drop ? T{0} : t.factor[j];
      t.scratch[j] = drop ? T{0} : t.counts[j];
    }
    c.sums[kOffPolicyKept] += sum(t.scratch, n);
  }

  // The policy term, its derivative in the ratio and its direct derivative in logp. They are finite
  // outside the mask unless the completion's own ratio is not.
  void policy(const Sums& c, int n, Block<T>& t) const {
    const T low = static_cast<T>(p_.ratio_low), high = static_cast<T>(p_.ratio_high);
    const auto put = [&](int j, const Policy<T>& term) {
      t.policy[j] = term.value;
      t.d_ratio[j] = term.d_ratio;
      t.d_logp[j] = term.d_logp;
    };
    if (p_.loss_type == kVespo || p_.loss_type == kCispo) {
      T* const phi = t.scratch;
      if (p_.loss_type == kVespo) {
        const T pos = static_cast<T>(c.phi_pos), neg = static_cast<T>(c.phi_neg);
        for (int j = 0; j < n; ++j) {
          phi[j] = t.advantage[j] >= 0 ? pos : neg;
          t.policy[j] = t.counts[j] != 0 ? phi[j] : T{0};
        }
        c.sums[kVespoPhi] += sum(t.policy, n);
      } else {
        for (int j = 0; j < n; ++j) phi[j] = clamp(t.ratio[j], low, high);
      }
      for (int j = 0; j < n; ++j) put(j, weighted_policy(phi[j], t.advantage[j], t.logp[j]));
    } else if (p_.loss_type == kSapo) {
      const T tau_pos = static_cast<T>(p_.sapo_tau_pos), tau_neg = static_cast<T>(p_.sapo_tau_neg);
      for (int j = 0; j < n; ++j)
        t.scratch[j] = (t.advantage[j] > 0 ? tau_pos : tau_neg) * (1 - t.ratio[j]);
      exp_all(t.scratch, t.raw, n);
      for (int j = 0; j < n; ++j)
        put(j, sapo_policy(t.advantage[j], t.advantage[j] > 0 ? tau_pos : tau_neg, t.raw[j]));
    } else {
      const T delta = static_cast<T>(p_.delta);
      for (int j = 0; j < n; ++j)
        put(j, clipped_policy(t.ratio[j], t.advantage[j], low, high, delta));
    }
  }

  void kl(int64_t first, int valid, int n, Block<T>& t) const {
    if (a_.ref_logps == nullptr) {
      std::fill(t.kl, t.kl + n, T{0});
      std::fill(t.d_kl, t.d_kl + n, T{0});
      return;
    }
    const T limit = static_cast<T>(p_.kl_input_clamp), bound = static_cast<T>(p_.kl_output_clamp);
    T* const d = t.scratch;
    take(a_.ref_logps, first, t.counts, valid, n, t.raw);
    for (int j = 0; j < n; ++j) {
      t.raw[j] -= t.logp[j];
      d[j] = clamp(t.raw[j], -limit, limit);
    }
    if (p_.kl == kK3) exp_all(d, t.kl, n);
    const Parameters p = p_;  // a copy: stores to the block cannot alias it
    for (int j = 0; j < n; ++j) {
      const KlTerm<T> term = kl_term(p, t.raw[j], d[j], t.kl[j], limit, bound);
      t.kl[j] = term.value;
      t.d_kl[j] = term.d_logp;
    }
  }

  const GrpoLossArgs& a_;
  const Parameters& p_;
};

}  // namespace
}  // namespace vcr1::cpu::VCR1_ISA

// The GRPO loss, its gradient and its metrics in one pass over the tokens. The maths, with these
// names, is in vcr1_fast/ops/grpo_reference.py and grpo_terms.py.
//
// Completions are independent once tokens are counted: each leaves its sums in scratch memory, and
// they are added in order at the end, so that results do not depend on the number of threads.
#include <algorithm>
#include <cmath>
#include <limits>

#include "../kernels.h"
#include "parallel.h"
#include "simd.h"

namespace vcr1::cpu::VCR1_ISA {
namespace {

using namespace vcr1::grpo;

constexpr int kBlock = 256;  // tokens worked on at a time, in the first-level cache
constexpr double kVespoFloor = -18.420680743952367;  // log 1e-8
constexpr double kVespoCeiling = 20.0;

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
class Kernel {
 public:
  explicit Kernel(const GrpoLossArgs& args) : a_(args), k_(args.kinds), v_(args.values) {}

  void run(int num_threads) {
    const int64_t grain =
        std::max<int64_t>(1, 4096 * a_.sequences / std::max<int64_t>(1, a_.tokens));
    parallel_for(a_.sequences, grain, num_threads, [&](int64_t begin, int64_t end) {
      for (int64_t b = begin; b < end; ++b) count(b);
    });
    for (const int i : {int{kNumTokens}, int{kNumSequences}, int{kEntropyWeight}})
      totals_[i] = total(i);
    set_batch_weight();
    parallel_for(a_.sequences, grain, num_threads, [&](int64_t begin, int64_t end) {
      for (int64_t b = begin; b < end; ++b) completion(b);
    });
    finish();
  }

 private:
  const T* logps() const { return static_cast<const T*>(a_.logps); }
  const T* old() const { return static_cast<const T*>(a_.old_logps); }
  double* sums(int64_t b) const { return a_.scratch + b * kScratch; }

  void range(int64_t b, int64_t& begin, int64_t& end) const {
    begin = b * a_.columns;
    end = begin + a_.columns;
    if (a_.offsets == nullptr) return;
    begin = std::clamp<int64_t>(a_.offsets[b], 0, a_.tokens);
    end = std::clamp<int64_t>(a_.offsets[b + 1], begin, a_.tokens);
  }

  void count(int64_t b) const {
    double* const out = sums(b);
    std::fill(out, out + kScratch, 0.0);
    out[kRatioMin] = std::numeric_limits<double>::infinity();
    out[kRatioMax] = -out[kRatioMin];
    int64_t begin, end;
    range(b, begin, end);
    const T* const weights = static_cast<const T*>(a_.token_weights);
    int64_t tokens = 0;
    for (int64_t i = begin; i < end; ++i) {
      const bool counts = a_.mask == nullptr || a_.mask[i];
      tokens += counts;
      if (weights != nullptr && counts) out[kEntropyWeight] += weights[i];
    }
    if (weights == nullptr) out[kEntropyWeight] = static_cast<double>(tokens);
    out[kNumTokens] = static_cast<double>(tokens);
    out[kNumSequences] = tokens > 0;
  }

  double total(int index) const {
    double out = 0.0;
    for (int64_t b = 0; b < a_.sequences; ++b) out += sums(b)[index];
    return out;
  }

  void set_batch_weight() {
    const bool tokens = k_.aggregation == kTokenMean || k_.aggregation == kNumItems;
    double count = k_.exclude_empty ? totals_[kNumSequences] : static_cast<double>(a_.sequences);
    if (tokens) count = totals_[kNumTokens];
    if (k_.aggregation == kNumItems && v_.num_items != 0.0) count = v_.num_items;
    if (!tokens && v_.num_sequences != 0.0) count = v_.num_sequences;
    if (a_.denominator != nullptr) count = *static_cast<const T*>(a_.denominator);
    batch_weight_ = 1.0 / std::max(count, 1.0);
    if (k_.aggregation == kMaxLength) batch_weight_ /= v_.max_length;
    entropy_weight_ = totals_[kEntropyWeight] > 0.0 ? 1.0 / totals_[kEntropyWeight] : 1.0;
  }

  void completion(int64_t b) const {
    int64_t begin, end;
    range(b, begin, end);
    Completion c{};
    c.sums = sums(b);
    c.tokens = c.sums[kNumTokens];
    c.weight = batch_weight_;
    if (k_.aggregation == kSequenceMean) c.weight /= std::max(c.tokens, 1.0);
    if (a_.weights != nullptr) c.weight = static_cast<const T*>(a_.weights)[b];
    T* const grad = static_cast<T*>(a_.grad_logps);
    T* const grad_entropy = static_cast<T*>(a_.grad_entropy);
    if (c.tokens == 0.0) {
      std::fill(grad + begin, grad + end, T{0});
      if (grad_entropy != nullptr) std::fill(grad_entropy + begin, grad_entropy + end, T{0});
      return;
    }
    Block<T> block;
    if (shares_statistics()) statistics(begin, end, block, c);
    for (int64_t i = begin; i < end; i += kBlock) {
      const int n = static_cast<int>(std::min<int64_t>(kBlock, end - i));
      load_tokens(b, i, n, block);
      ratios(c, n, block);
      factors(i, c, n, block);
      policy(c, n, block);
      kl(i, n, block);
      combine(i, c, n, block);
      metrics(c, n, block);
      if (a_.entropy != nullptr) entropy(i, c, n, block);
    }
    if (k_.level != kSequence) return;
    const T each = static_cast<T>(c.grad_s / c.tokens);
    for (int64_t i = begin; i < end; i += kBlock) {
      const int n = static_cast<int>(std::min<int64_t>(kBlock, end - i));
      load_tokens(b, i, n, block);
      for (int j = 0; j < n; ++j) grad[i + j] += block.counts[j] ? each * block.unclamped[j] : T{0};
    }
  }

  bool shares_statistics() const {
    return k_.level != kToken || k_.loss == kVespo || std::isfinite(v_.off_policy_threshold) ||
           k_.rollout >= kSequenceTruncate;
  }

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

  // Sums over the completion, before any token can be weighed.
  void statistics(int64_t begin, int64_t end, Block<T>& t, Completion& c) const {
    const int64_t b = (c.sums - a_.scratch) / kScratch;
    double log_ratio = 0.0, bounded = 0.0, gap = 0.0, drift = 0.0, log_weight = 0.0;
    const auto blocks = [&](auto&& fn) {
      for (int64_t i = begin; i < end; i += kBlock) {
        const int n = static_cast<int>(std::min<int64_t>(kBlock, end - i));
        load_tokens(b, i, n, t);
        fn(i, n);
      }
    };
    blocks([&](int64_t first, int n) {
      log_ratio += sum(t.log_ratio, t.counts, n);
      for (int j = 0; j < n; ++j) {
        bounded += clamp(double{t.log_ratio[j]}, -20.0, 20.0);
        if (!t.counts[j]) continue;
        const T shift = a_.rollout_logps != nullptr ? t.gap[j] : T{0};
        const T before = a_.old_logps != nullptr ? old()[first + j] : t.logp[j];
        gap += shift;
        drift += double{before} - shift - t.logp[j];
      }
    });
    c.log_ratio = log_ratio / c.tokens;
    c.off_policy = drift / c.tokens > v_.off_policy_threshold;
    c.correction = 1.0;
    if (k_.rollout >= kSequenceTruncate) {
      const double tested =
          static_cast<T>(std::exp(k_.rollout == kSequenceIcepop ? gap / c.tokens : gap));
      c.dropped = tested < v_.rollout_min || tested > v_.rollout_max;
      c.correction = k_.rollout == kSequenceTruncate ? clamp(tested, v_.rollout_min, v_.rollout_max)
                     : c.dropped                     ? 0.0
                                                     : tested;
    }
    if (k_.loss != kVespo) return;
    if (k_.rollout == kSequenceTruncate || k_.rollout == kSequenceMask) {
      log_weight = clamp(std::log(c.correction), kVespoFloor, kVespoCeiling);
    } else if (k_.rollout != kNone) {
      blocks([&](int64_t, int n) {
        rollout(c, n, t);
        for (int j = 0; j < n; ++j)
          if (t.counts[j])
            log_weight += clamp(std::log(double{t.weight[j]}), kVespoFloor, kVespoCeiling);
      });
    }
    const double log_w = clamp(bounded + log_weight, kVespoFloor, kVespoCeiling);
    const auto phi = [&](double k, double lambda) {
      lambda = std::max(lambda, 1e-4);
      return std::exp(lambda + k * log_w - lambda * std::exp(log_w));
    };
    c.phi_pos = phi(v_.vespo_k_pos, v_.vespo_lambda_pos);
    c.phi_neg = phi(v_.vespo_k_neg, v_.vespo_lambda_neg);
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
      exp_all(t.scratch, t.scratch, n);
      for (int j = 0; j < n; ++j) {
        const T gate = 1 / (1 + t.scratch[j]);
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

  void combine(int64_t first, Completion& c, int n, Block<T>& t) const {
    T* const grad = static_cast<T*>(a_.grad_logps) + first;
    const T weight = static_cast<T>(c.weight), beta = static_cast<T>(v_.beta);
    T* const loss = t.scratch;
    for (int j = 0; j < n; ++j) {
      const T correction = k_.kl_bias_correction ? t.ratio[j] : T{1};
      const T kl_weight = beta * (k_.rollout_after_kl && k_.loss != kVespo ? t.weight[j] : T{1});
      T through = t.factor[j] * t.d_ratio[j];
      if (k_.kl_bias_correction) through += kl_weight * t.kl[j];
      const T direct = t.factor[j] * t.d_logp[j] + kl_weight * t.d_kl[j] * correction;
      t.policy[j] *= t.factor[j] * weight;
      loss[j] = t.policy[j] + weight * kl_weight * t.kl[j] * correction;
      t.d_ratio[j] = weight * through * t.ratio[j];  // dloss/ds
      const T own = k_.level == kToken      ? t.d_ratio[j] * t.unclamped[j]
                    : k_.level == kSequence ? T{0}
                                            : t.d_ratio[j];
      grad[j] = t.counts[j] ? weight * direct + own : T{0};
    }
    c.sums[kLossSum] += sum(loss, t.counts, n);
    c.sums[kPolicyLoss] += sum(t.policy, t.counts, n);
    if (k_.level == kSequence) c.grad_s += sum(t.d_ratio, t.counts, n);
  }

  void entropy(int64_t first, const Completion& c, int n, Block<T>& t) const {
    const T* const values = static_cast<const T*>(a_.entropy) + first;
    c.sums[kEntropyMean] += sum(values, t.counts, n);
    if (a_.grad_entropy == nullptr) return;
    const T* const token_weights = static_cast<const T*>(a_.token_weights);
    T* const grad = static_cast<T*>(a_.grad_entropy) + first;
    const double each = k_.entropy_token_mean ? entropy_weight_ : c.weight;
    const T scale = static_cast<T>(-v_.entropy_coef * each);
    for (int j = 0; j < n; ++j) {
      const T weight = token_weights != nullptr && t.counts[j] ? token_weights[first + j] : T{1};
      grad[j] = t.counts[j] ? scale * weight : T{0};
      t.scratch[j] = t.counts[j] ? grad[j] * values[j] : T{0};
    }
    c.sums[kLossSum] += sum(t.scratch, t.counts, n);
  }

  void metrics(const Completion& c, int n, Block<T>& t) const {
    double* const out = c.sums;
    out[kRatioMean] += sum(t.ratio, t.counts, n);
    T lowest = static_cast<T>(out[kRatioMin]), highest = static_cast<T>(out[kRatioMax]);
    for (int j = 0; j < n; ++j) {
      lowest = t.counts[j] && t.ratio[j] < lowest ? t.ratio[j] : lowest;
      highest = t.counts[j] && t.ratio[j] > highest ? t.ratio[j] : highest;
      t.scratch[j] = t.token_ratio[j] - 1 - t.log_ratio[j];
    }
    out[kRatioMin] = lowest;
    out[kRatioMax] = highest;
    out[kApproxKl] += sum(t.scratch, t.counts, n);
    const T low = static_cast<T>(v_.ratio_low), high = static_cast<T>(v_.ratio_high);
    const T delta = static_cast<T>(v_.delta);
    int below = 0, above = 0, over = 0;
    for (int j = 0; j < n; ++j) {  // the advantage is 0 outside the mask
      below += t.ratio[j] < low && t.advantage[j] < 0;
      above += t.ratio[j] > high && t.advantage[j] > 0;
      over += t.ratio[j] > delta && t.advantage[j] < 0;
    }
    const bool clips = k_.loss != kSapo && k_.loss != kVespo;
    out[kClipLow] += clips ? below : 0;
    out[kClipHigh] += clips ? above : 0;
    out[kClipRegion] += clips ? below + above : 0;
    out[kClipDelta] += over;
    if (a_.ref_logps != nullptr) out[kKlMean] += sum(t.kl, t.counts, n);
    if (a_.rollout_logps == nullptr) return;
    out[kRolloutWeight] += sum(t.weight, t.counts, n);
    out[kRolloutClipped] += sum(t.clipped, t.counts, n);
    exp_all(t.gap, t.scratch, n);
    for (int j = 0; j < n; ++j) t.scratch[j] = t.scratch[j] - 1 - t.gap[j];
    out[kRolloutKl] += sum(t.scratch, t.counts, n);
    for (int j = 0; j < n; ++j) {
      t.scratch[j] = std::abs(t.gap[j]);
      out[kGapMax] = std::max<double>(out[kGapMax], t.scratch[j]);
    }
    out[kGapMean] += sum(t.scratch, t.counts, n);
  }

  void finish() const {
    T* const out = static_cast<T*>(a_.metrics);
    const double tokens = std::max(totals_[kNumTokens], 1.0);
    for (int i = 0; i < kMetrics; ++i) out[i] = static_cast<T>(total(i) / tokens);
    for (const int i : {int{kNumTokens}, int{kNumSequences}, int{kPolicyLoss}})
      out[i] = static_cast<T>(total(i));
    double lowest = std::numeric_limits<double>::infinity(), highest = -lowest, gap = 0.0;
    for (int64_t b = 0; b < a_.sequences; ++b) {
      lowest = std::min(lowest, sums(b)[kRatioMin]);
      highest = std::max(highest, sums(b)[kRatioMax]);
      gap = std::max(gap, sums(b)[kGapMax]);
    }
    const bool empty = totals_[kNumTokens] == 0.0;
    out[kRatioMin] = static_cast<T>(empty ? 0.0 : lowest);
    out[kRatioMax] = static_cast<T>(empty ? 0.0 : highest);
    out[kGapMax] = static_cast<T>(gap);
    *static_cast<T*>(a_.loss) = static_cast<T>(total(kLossSum));
  }

  const GrpoLossArgs& a_;
  const Kinds& k_;
  const Values& v_;
  double totals_[kScratch] = {};
  double batch_weight_ = 0.0, entropy_weight_ = 0.0;
};

}  // namespace

void grpo_loss(const GrpoLossArgs& args, int num_threads) {
  if (args.dtype == DType::kFloat64)
    Kernel<double>(args).run(num_threads);
  else
    Kernel<float>(args).run(num_threads);
}

}  // namespace vcr1::cpu::VCR1_ISA

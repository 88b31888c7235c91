// The GRPO loss, its gradient and its metrics in one pass over the tokens. The maths, with these
// names, is in vcr1_fast/ops/grpo/reference.py.
//
// Completions are independent once tokens are counted: each leaves its sums in scratch memory, and
// they are added in order at the end, so that results do not depend on the number of threads.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <type_traits>

#include "../kernels.h"
#include "grpo_clipped.h"
#include "grpo_terms.h"
#include "pages.h"
#include "parallel.h"

namespace vcr1::cpu::VCR1_ISA {
namespace {

template <typename T>
class Kernel : Terms<T> {
 public:
  using Terms<T>::Terms;

  void run(int num_threads) {
    const bool clipped = fits_clipped(a_);
    parallel_for(a_.sequences, grain(1 << 20), num_threads, [&](int64_t begin, int64_t end) {
      for (int64_t b = begin; b < end; ++b) count(b);
    });
    for (const int i : {int{kNumTokens}, int{kNumSequences}, int{kEntropyWeight}})
      totals_[i] = total(i);
    batch_ = batch_of<T>(a_, totals_[kNumTokens], totals_[kNumSequences], totals_[kEntropyWeight]);
    zero_uncovered();
    const int64_t tokens = clipped ? 1 << 16 : 1 << 14;
    const T* const grad = static_cast<const T*>(a_.grad_logps);
    const bool fresh = a_.tokens > 1 << 18 && untouched(grad + a_.tokens / 2);
    parallel_for(a_.sequences, grain(tokens), num_threads, [&](int64_t begin, int64_t end) {
      if (fresh) populate_gradient(begin, end);
      Block<T> block;
      for (int64_t b = begin; b < end; ++b) completion(b, clipped, block);
    });
    finish();
  }

 private:
  using Terms<T>::a_, Terms<T>::p_, Terms<T>::take, Terms<T>::load_tokens;
  using Terms<T>::ratios, Terms<T>::rollout, Terms<T>::factors, Terms<T>::policy, Terms<T>::kl;

  // Completions of about `tokens` tokens: a piece of work that takes several times as long as
  // waking a thread for it.
  int64_t grain(int64_t tokens) const {
    return std::max<int64_t>(1, tokens * a_.sequences / std::max<int64_t>(1, a_.tokens));
  }

  // Page by page the system's work would take as long as ours.
  void populate_gradient(int64_t begin, int64_t end) const {
    int64_t first, last, unused;
    range(begin, first, unused);
    range(end - 1, unused, last);
    T* const grad = static_cast<T*>(a_.grad_logps);
    populate(grad + first, (last - first) * sizeof(T));
  }

  double* sums(int64_t b) const { return a_.scratch + b * kScratch; }

  void range(int64_t b, int64_t& begin, int64_t& end) const { token_range(a_, b, begin, end); }

  // Tokens in no completion.
  void zero_uncovered() const {
    int64_t first, last;
    covered_range(a_, first, last);
    for (void* const out : {a_.grad_logps, a_.grad_entropy}) {
      T* const grad = static_cast<T*>(out);
      if (grad == nullptr) continue;
      std::fill(grad, grad + first, T{0});
      std::fill(grad + last, grad + a_.tokens, T{0});
    }
  }

  static int64_t count_true(const bool* x, int64_t n) {
    int64_t out = 0, i = 0;
    for (; i + 8 <= n; i += 8) {
      uint64_t eight;
      std::memcpy(&eight, x + i, 8);
      out += eight * 0x0101010101010101u >> 56;  // the sum of its bytes
    }
    for (; i < n; ++i) out += x[i];
    return out;
  }

  void count(int64_t b) const {
    double* const out = sums(b);
    std::fill(out, out + kScratch, 0.0);
    out[kRatioMin] = std::numeric_limits<double>::infinity();
    out[kRatioMax] = -out[kRatioMin];
    int64_t begin, end;
    range(b, begin, end);
    const T* const weights = static_cast<const T*>(a_.token_weights);
    int64_t tokens = end - begin;
    if (a_.mask != nullptr) tokens = count_true(a_.mask + begin, tokens);
    if (weights != nullptr)
      for (int64_t i = begin; i < end; ++i)
        if (a_.mask == nullptr || a_.mask[i]) out[kEntropyWeight] += weights[i];
    if (weights == nullptr) out[kEntropyWeight] = static_cast<double>(tokens);
    out[kNumTokens] = static_cast<double>(tokens);
    out[kNumSequences] = tokens > 0;
  }

  double total(int index) const {
    double out = 0.0;
    for (int64_t b = 0; b < a_.sequences; ++b) out += sums(b)[index];
    return out;
  }

  // Calls fn(first token, tokens, padded) for each loaded block of a completion.
  template <typename Fn>
  void blocks(int64_t b, int64_t begin, int64_t end, Block<T>& t, Fn&& fn) const {
    for (int64_t i = begin; i < end; i += kBlock) {
      const int valid = static_cast<int>(std::min<int64_t>(kBlock, end - i));
      const int n = load_tokens(b, i, valid, t);
      fn(i, valid, n);
    }
  }

  void completion(int64_t b, bool clipped, Block<T>& t) const {
    int64_t begin, end;
    range(b, begin, end);
    Sums c{};
    c.sums = sums(b);
    c.tokens = c.sums[kNumTokens];
    c.weight = token_weight<T>(a_, batch_, b, c.tokens);
    T* const grad = static_cast<T*>(a_.grad_logps);
    T* const grad_entropy = static_cast<T*>(a_.grad_entropy);
    if (c.tokens == 0.0) {
      std::fill(grad + begin, grad + end, T{0});
      if (grad_entropy != nullptr) std::fill(grad_entropy + begin, grad_entropy + end, T{0});
      return;
    }
    if constexpr (std::is_same_v<T, float>) {
      if (clipped) return in_registers(b, begin, end, c);
    }
    if (shares_statistics(a_)) statistics(b, begin, end, t, c);
    blocks(b, begin, end, t, [&](int64_t first, int valid, int n) {
      ratios(c, n, t);
      factors(first, c, valid, n, t);
      policy(c, n, t);
      kl(first, valid, n, t);
      combine(first, c, valid, n, t);
      metrics(c, n, t);
      if (a_.entropy != nullptr) entropy(first, c, valid, n, t);
    });
    if (p_.level != kSequence) return;
    const T each = static_cast<T>(c.grad_s / c.tokens);
    blocks(b, begin, end, t, [&](int64_t first, int valid, int) {
      T* const out = grad + first;
      for (int j = 0; j < valid; ++j) {
        const T own = each * t.unclamped[j];
        out[j] += t.counts[j] != 0 ? own : T{0};
      }
    });
  }

  void in_registers(int64_t b, int64_t begin, int64_t end, const Sums& c) const {
    const double bonus = entropy_scale(c);
    const bool cispo = p_.loss_type == kCispo;
    if (a_.ref_logps == nullptr) {
      if (cispo)
        Clipped<true, false>(a_, b, c, bonus).run(begin, end, c.sums);
      else
        Clipped<false, false>(a_, b, c, bonus).run(begin, end, c.sums);
    } else if (cispo) {
      Clipped<true, true>(a_, b, c, bonus).run(begin, end, c.sums);
    } else {
      Clipped<false, true>(a_, b, c, bonus).run(begin, end, c.sums);
    }
  }

  // The gradient of a token's entropy, but for its weight.
  double entropy_scale(const Sums& c) const { return grpo::entropy_scale(p_, batch_, c.weight); }

  // Sums over the completion, before any token can be weighed.
  void statistics(int64_t b, int64_t begin, int64_t end, Block<T>& t, Sums& c) const {
    Statistics totals{};
    blocks(b, begin, end, t, [&](int64_t, int, int n) {
      totals.log_ratio += sum(t.log_ratio, n);
      if (p_.loss_type == kVespo) {
        for (int j = 0; j < n; ++j) t.scratch[j] = clamp(t.log_ratio[j], -20.0, 20.0);
        totals.bounded += sum(t.scratch, n);
      }
      for (int j = 0; j < n; ++j) t.scratch[j] = t.raw[j] - t.logp[j];
      totals.drift += sum(t.scratch, n);
      if (a_.rollout_logps != nullptr) totals.gap += sum(t.gap, n);
    });
    totals.drift -= totals.gap;
    set_statistics<T>(a_, totals, c);
    if (p_.loss_type != kVespo) return;
    double log_weight = 0.0;
    if (corrects_whole(p_)) {
      log_weight = vespo_log(c.correction);
    } else if (p_.rollout_correction != kNone) {
      blocks(b, begin, end, t, [&](int64_t, int valid, int n) {
        rollout(c, n, t);
        for (int j = 0; j < valid; ++j)
          if (t.counts[j] != 0) log_weight += vespo_log(double{t.weight[j]});
      });
    }
    set_vespo(p_, totals.bounded, log_weight, c);
  }

  void combine(int64_t first, Sums& c, int valid, int n, Block<T>& t) const {
    const T weight = static_cast<T>(c.weight), beta = static_cast<T>(p_.beta);
    const bool token = p_.level == kToken, whole = p_.level == kSequence;
    const Parameters p = p_;  // a copy: stores to the block cannot alias it
    T* const loss = t.scratch;
    T* const d_s = t.raw;
    T* const out = t.d_logp;
    for (int j = 0; j < n; ++j) {
      const bool counts = t.counts[j] != 0;
      const Part<T> part = grpo::combine(p, weight, beta, t.factor[j], t.weight[j], t.ratio[j],
                                         Policy<T>{t.policy[j], t.d_ratio[j], t.d_logp[j]},
                                         KlTerm<T>{t.kl[j], t.d_kl[j]});
      const T clipped = token ? part.d_s * t.unclamped[j] : part.d_s;
      const T own = whole ? T{0} : clipped;
      t.policy[j] = counts ? part.policy : T{0};
      loss[j] = counts ? part.loss : T{0};
      d_s[j] = counts ? part.d_s : T{0};
      out[j] = counts ? part.direct + own : T{0};
    }
    std::copy(out, out + valid, static_cast<T*>(a_.grad_logps) + first);
    c.sums[kLossSum] += sum(loss, n);
    c.sums[kPolicyLoss] += sum(t.policy, n);
    if (whole) c.grad_s += sum(d_s, n);
  }

  void entropy(int64_t first, const Sums& c, int valid, int n, Block<T>& t) const {
    T* const values = t.raw;
    take(a_.entropy, first, t.counts, valid, n, values);
    c.sums[kEntropyMean] += sum(values, n);
    if (a_.grad_entropy == nullptr) return;
    const T scale = static_cast<T>(entropy_scale(c));
    T* const grad = t.scratch;
    std::copy(t.counts, t.counts + n, grad);
    if (a_.token_weights != nullptr) take(a_.token_weights, first, t.counts, valid, n, grad);
    for (int j = 0; j < n; ++j) {
      grad[j] *= scale;
      values[j] *= grad[j];
    }
    std::copy(grad, grad + valid, static_cast<T*>(a_.grad_entropy) + first);
    c.sums[kLossSum] += sum(values, n);
  }

  void metrics(const Sums& c, int n, Block<T>& t) const {
    constexpr T kInf = std::numeric_limits<T>::infinity();
    double* const out = c.sums;
    T* const x = t.scratch;
    for (int j = 0; j < n; ++j) {
      x[j] = t.counts[j] != 0 ? t.ratio[j] : T{0};
      t.d_ratio[j] = t.counts[j] != 0 ? t.ratio[j] : -kInf;
      t.d_logp[j] = t.counts[j] != 0 ? -t.ratio[j] : -kInf;
    }
    out[kRatioMean] += sum(x, n);
    out[kRatioMax] = std::max<double>(out[kRatioMax], largest(t.d_ratio, n));
    out[kRatioMin] = std::min<double>(out[kRatioMin], -largest(t.d_logp, n));
    for (int j = 0; j < n; ++j) x[j] = t.token_ratio[j] - 1 - t.log_ratio[j];
    out[kApproxKl] += sum(x, n);
    const T low = static_cast<T>(p_.ratio_low), high = static_cast<T>(p_.ratio_high);
    const T delta = static_cast<T>(p_.delta);
    // The advantage is 0 outside the mask.
    if (p_.loss_type != kSapo && p_.loss_type != kVespo) {
      for (int j = 0; j < n; ++j) {
        t.d_ratio[j] = (t.ratio[j] < low) & (t.advantage[j] < 0) ? T{1} : T{0};
        t.d_logp[j] = (t.ratio[j] > high) & (t.advantage[j] > 0) ? T{1} : T{0};
      }
      const double below = sum(t.d_ratio, n), above = sum(t.d_logp, n);
      out[kClipLow] += below;
      out[kClipHigh] += above;
      out[kClipRegion] += below + above;
    }
    if (std::isfinite(p_.delta)) {
      for (int j = 0; j < n; ++j) x[j] = (t.ratio[j] > delta) & (t.advantage[j] < 0) ? T{1} : T{0};
      out[kClipDelta] += sum(x, n);
    }
    if (a_.ref_logps != nullptr) out[kKlMean] += sum(t.kl, n);
    if (a_.rollout_logps == nullptr) return;
    for (int j = 0; j < n; ++j) {
      x[j] = t.counts[j] != 0 ? t.weight[j] : T{0};
      t.raw[j] = t.counts[j] != 0 ? t.clipped[j] : T{0};
    }
    out[kRolloutWeight] += sum(x, n);
    out[kRolloutClipped] += sum(t.raw, n);
    exp_all(t.gap, x, n);
    for (int j = 0; j < n; ++j) {
      x[j] = x[j] - 1 - t.gap[j];
      t.raw[j] = std::abs(t.gap[j]);
    }
    out[kRolloutKl] += sum(x, n);
    out[kGapMax] = std::max<double>(out[kGapMax], largest(t.raw, n));
    out[kGapMean] += sum(t.raw, n);
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

  double totals_[kScratch] = {};
  Batch batch_{};
};

}  // namespace

void grpo_loss(const GrpoLossArgs& args, int num_threads) {
  if (args.dtype == DType::kFloat64)
    Kernel<double>(args).run(num_threads);
  else
    Kernel<float>(args).run(num_threads);
}

}  // namespace vcr1::cpu::VCR1_ISA

// The GRPO loss, its gradient and its metrics in one pass over the tokens. The maths, with these
// names, is in vcr1_fast/ops/grpo_reference.py and grpo_terms.py.
//
// Completions are independent once tokens are counted: each leaves its sums in scratch memory, and
// they are added in order at the end, so that results do not depend on the number of threads.
#include <algorithm>
#include <cmath>
#include <limits>

#include "../kernels.h"
#include "grpo_terms.h"
#include "parallel.h"

namespace vcr1::cpu::VCR1_ISA {
namespace {

template <typename T>
class Kernel : Terms<T> {
 public:
  using Terms<T>::Terms;

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
  using Terms<T>::a_, Terms<T>::k_, Terms<T>::v_, Terms<T>::old, Terms<T>::load_tokens;
  using Terms<T>::ratios, Terms<T>::rollout, Terms<T>::factors, Terms<T>::policy, Terms<T>::kl;

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
    Sums c{};
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
    if (shares_statistics(a_)) statistics(begin, end, block, c);
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

  // Sums over the completion, before any token can be weighed.
  void statistics(int64_t begin, int64_t end, Block<T>& t, Sums& c) const {
    const int64_t b = (c.sums - a_.scratch) / kScratch;
    Statistics sums{};
    const auto blocks = [&](auto&& fn) {
      for (int64_t i = begin; i < end; i += kBlock) {
        const int n = static_cast<int>(std::min<int64_t>(kBlock, end - i));
        load_tokens(b, i, n, t);
        fn(i, n);
      }
    };
    blocks([&](int64_t first, int n) {
      sums.log_ratio += sum(t.log_ratio, t.counts, n);
      for (int j = 0; j < n; ++j) {
        sums.bounded += clamp(double{t.log_ratio[j]}, -20.0, 20.0);
        if (!t.counts[j]) continue;
        const T shift = a_.rollout_logps != nullptr ? t.gap[j] : T{0};
        const T before = a_.old_logps != nullptr ? old()[first + j] : t.logp[j];
        sums.gap += shift;
        sums.drift += double{before} - shift - t.logp[j];
      }
    });
    set_statistics<T>(a_, sums, c);
    if (k_.loss != kVespo) return;
    double log_weight = 0.0;
    if (corrects_whole(k_)) {
      log_weight = vespo_log(c.correction);
    } else if (k_.rollout != kNone) {
      blocks([&](int64_t, int n) {
        rollout(c, n, t);
        for (int j = 0; j < n; ++j)
          if (t.counts[j]) log_weight += vespo_log(double{t.weight[j]});
      });
    }
    set_vespo(v_, sums.bounded, log_weight, c);
  }

  void combine(int64_t first, Sums& c, int n, Block<T>& t) const {
    T* const grad = static_cast<T*>(a_.grad_logps) + first;
    const T weight = static_cast<T>(c.weight), beta = static_cast<T>(v_.beta);
    T* const loss = t.scratch;
    for (int j = 0; j < n; ++j) {
      const Part<T> part = grpo::combine(k_, weight, beta, t.factor[j], t.weight[j], t.ratio[j],
                                         Policy<T>{t.policy[j], t.d_ratio[j], t.d_logp[j]},
                                         KlTerm<T>{t.kl[j], t.d_kl[j]});
      t.policy[j] = part.policy;
      loss[j] = part.loss;
      t.d_ratio[j] = part.d_s;
      const T own = k_.level == kToken      ? part.d_s * t.unclamped[j]
                    : k_.level == kSequence ? T{0}
                                            : part.d_s;
      grad[j] = t.counts[j] ? part.direct + own : T{0};
    }
    c.sums[kLossSum] += sum(loss, t.counts, n);
    c.sums[kPolicyLoss] += sum(t.policy, t.counts, n);
    if (k_.level == kSequence) c.grad_s += sum(t.d_ratio, t.counts, n);
  }

  void entropy(int64_t first, const Sums& c, int n, Block<T>& t) const {
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

  void metrics(const Sums& c, int n, Block<T>& t) const {
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

// The options of the GRPO loss as vcr1_fast/ops/grpo_config.py encodes them (KINDS and VALUES), and
// the order of its metrics (METRICS of grpo_reference.py). Absent bounds are infinite, counts 0.
#pragma once

#include <cstdint>

namespace vcr1::grpo {

enum Loss : int64_t { kGrpo, kBnpo, kDrGrpo, kDapo, kCispo, kSapo, kLuspo, kVespo };
enum Level : int64_t { kToken, kSequence, kSequenceToken };
enum Kl : int64_t { kK1, kK2, kK3, kAbs };
enum Aggregation : int64_t { kSequenceMean, kTokenMean, kSequenceSum, kMaxLength, kNumItems };
enum Rollout : int64_t {
  kNone,
  kTokenTruncate,
  kTokenMask,
  kTokenIcepop,
  kSequenceTruncate,
  kSequenceMask,
  kSequenceIcepop,
};

struct Kinds {
  int64_t loss, level, kl, aggregation, rollout, entropy_token_mean, kl_bias_correction,
      kl_straight_through, rollout_after_kl, exclude_empty;
};

struct Values {
  double ratio_low, ratio_high, delta, beta, kl_input_clamp, kl_output_clamp, log_ratio_clamp,
      sapo_tau_pos, sapo_tau_neg, vespo_k_pos, vespo_lambda_pos, vespo_k_neg, vespo_lambda_neg,
      rollout_min, rollout_max, off_policy_threshold, entropy_coef, max_length, num_items,
      num_sequences;
};

enum Metric {
  kNumTokens,
  kNumSequences,
  kPolicyLoss,
  kKlMean,
  kEntropyMean,
  kRatioMean,
  kRatioMin,
  kRatioMax,
  kApproxKl,
  kClipLow,
  kClipHigh,
  kClipRegion,
  kClipDelta,
  kVespoPhi,
  kOffPolicyKept,
  kGapMean,
  kGapMax,
  kRolloutKl,
  kRolloutWeight,
  kRolloutClipped,
  kMetrics,
};

// Doubles of scratch memory a completion: its metrics' sums, its loss and its entropy weight. CUDA
// kernels keep there too what the second one needs of a completion, to weigh it.
enum {
  kLossSum = kMetrics,
  kEntropyWeight,
  kEntropySum,
  kGradS,
  kLogRatio,
  kPhiPos,
  kPhiNeg,
  kCorrection,
  kFlags,
  kScratch,
};

}  // namespace vcr1::grpo

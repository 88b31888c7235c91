// The options of the GRPO loss: LossParameters of vcr1_fast/ops/grpo/config.py, field by field.
// csrc/bindings/grpo_loss.cpp fills it by name. Absent bounds are infinite, absent counts 0. Also
// the order of the loss's metrics (METRICS of vcr1_fast/ops/grpo/reference.py).
#pragma once

#include <cstdint>

namespace vcr1::grpo {

enum Loss { kGrpo, kBnpo, kDrGrpo, kDapo, kCispo, kSapo, kLuspo, kVespo };
enum Level { kToken, kSequence, kSequenceToken };
enum Kl { kK1, kK2, kK3, kAbs };
enum Aggregation { kSequenceMean, kTokenMean, kSequenceSum, kMaxLength, kNumItems };
enum Rollout {  // by sequence from kSequenceTruncate on
  kNone,
  kTokenTruncate,
  kTokenMask,
  kTokenIcepop,
  kSequenceTruncate,
  kSequenceMask,
  kSequenceIcepop,
};

struct Parameters {
  Loss loss_type;
  Level level;
  Kl kl;
  Aggregation aggregation;
  Rollout rollout_correction;
  bool entropy_token_mean, kl_bias_correction, kl_straight_through, rollout_after_kl, exclude_empty;
  double ratio_low, ratio_high, delta, beta, kl_input_clamp, kl_output_clamp, log_ratio_clamp;
  double sapo_tau_pos, sapo_tau_neg;
  double vespo_k_pos, vespo_lambda_pos, vespo_k_neg, vespo_lambda_neg;
  double rollout_min, rollout_max, off_policy_threshold;
  double entropy_coef, max_length, num_items, num_sequences;
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

// Doubles of scratch memory per completion: its metrics' sums, its loss and its entropy weight. The
// first CUDA kernel also leaves there what the second one needs to weight the completion.
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

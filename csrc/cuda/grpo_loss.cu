// The GRPO loss, its gradient and its metrics in two launches. The maths, with these names, is in
// vcr1_fast/ops/grpo/reference.py; a token's terms are those of the CPU kernel.
//
// A token's weight may depend on all completions' lengths, but it is only a factor: the first
// kernel adds up each completion as if that factor were 1, the second finds it and writes
// gradients, and its first block the loss and the metrics. Sums are taken in a fixed order: bits
// repeat. A team of threads takes a completion, a warp where completions are short.
#include <algorithm>

#include "grpo_token.cuh"

namespace vcr1::cuda {
namespace {

// Sums over the completion that its tokens cannot be weighed without.
template <typename T, int kTeam>
__device__ inline void statistics(const GrpoLossArgs& a, const Team<kTeam>& team, Completion& c,
                                  double& entropy_weight) {
  double sums[6] = {};
  const bool shares = shares_statistics(a);
  team.for_tokens([&](int64_t i) {
    if (a.mask != nullptr && !a.mask[i]) return;
    sums[0] += 1.0;
    sums[1] += a.token_weights != nullptr ? static_cast<const T*>(a.token_weights)[i] : T{1};
    if (!shares) return;
    const Token<T> t = load_token<T>(a, team.sequence, i);
    sums[2] += t.log_ratio;
    sums[3] += clamp(double{t.log_ratio}, -20.0, 20.0);
    sums[4] += t.gap;
    sums[5] += double{t.before} - t.gap - t.logp;
  });
  team_reduce<Add, kTeam>(sums);
  c.tokens = sums[0];
  entropy_weight = sums[1];
  if (!shares || c.tokens == 0.0) return;
  set_statistics<T>(a, {sums[2], sums[3], sums[4], sums[5]}, c);
  if (a.parameters.loss_type != kVespo) return;
  double log_weight[1] = {};
  if (corrects_whole(a.parameters)) {
    log_weight[0] = vespo_log(c.correction);
  } else if (a.parameters.rollout_correction != kNone) {
    team.for_tokens([&](int64_t i) {
      const Token<T> t = load_token<T>(a, team.sequence, i);
      if (t.counts) log_weight[0] += vespo_log(double{rollout_correction(a, c, t.gap).weight});
    });
    team_reduce<Add, kTeam>(log_weight);
  }
  set_vespo(a.parameters, sums[3], log_weight[0], c);
}

template <typename T>
__device__ inline void add_metrics(const GrpoLossArgs& a, const Evaluated<T>& e,
                                   double (&sums)[kScratch]) {
  const Token<T>& t = e.token;
  sums[kRatioMean] += e.ratio;
  sums[kApproxKl] += e.token_ratio - 1 - t.log_ratio;
  const Parameters& p = a.parameters;
  const bool low = e.ratio < static_cast<T>(p.ratio_low) && t.advantage < 0;
  const bool high = e.ratio > static_cast<T>(p.ratio_high) && t.advantage > 0;
  const bool clips = p.loss_type != kSapo && p.loss_type != kVespo;
  sums[kClipLow] += clips && low;
  sums[kClipHigh] += clips && high;
  sums[kClipRegion] += clips && (low || high);
  sums[kClipDelta] += e.ratio > static_cast<T>(p.delta) && t.advantage < 0;
  sums[kVespoPhi] += e.phi;
  sums[kOffPolicyKept] += e.kept;
  sums[kKlMean] += e.kl.value;
  if (a.rollout_logps == nullptr) return;
  sums[kRolloutWeight] += e.correction.weight;
  sums[kRolloutClipped] += e.correction.clipped;
  sums[kRolloutKl] += std::exp(t.gap) - 1 - t.gap;
  sums[kGapMean] += std::abs(t.gap);
}

// Each completion's sums, with tokens that weigh 1.
template <typename T, int kTeam>
__global__ void __launch_bounds__(kBlock) sums_kernel(const __grid_constant__ GrpoLossArgs a) {
  const Team<kTeam> team(a);
  const int64_t b = team.sequence;
  if (b >= a.sequences) return;  // whole teams; a block of one team never
  Completion c{};
  double entropy_weight;
  statistics<T>(a, team, c, entropy_weight);
  double sums[kScratch] = {}, least[1] = {HUGE_VAL}, most[2] = {-HUGE_VAL, 0.0};
  team.for_tokens([&](int64_t i) {
    if (a.mask != nullptr && !a.mask[i]) return;
    const Evaluated<T> e = evaluate(a, c, load_token<T>(a, b, i), i, T{1});
    sums[kLossSum] += e.part.loss;
    sums[kPolicyLoss] += e.part.policy;
    sums[kGradS] += e.part.d_s;
    add_metrics(a, e, sums);
    least[0] = Min::apply(e.ratio, least[0]);
    most[0] = Max::apply(e.ratio, most[0]);
    most[1] = Max::apply(std::abs(e.token.gap), most[1]);
    if (a.entropy == nullptr) return;
    const T value = static_cast<const T*>(a.entropy)[i];
    sums[kEntropyMean] += value;
    sums[kEntropySum] +=
        a.token_weights != nullptr ? value * static_cast<const T*>(a.token_weights)[i] : value;
  });
  team_reduce<Add, kTeam>(sums);
  team_reduce<Min, kTeam>(least);
  team_reduce<Max, kTeam>(most);
  sums[kNumTokens] = c.tokens;
  sums[kNumSequences] = c.tokens > 0.0;
  sums[kEntropyWeight] = entropy_weight;
  sums[kRatioMin] = least[0];
  sums[kRatioMax] = most[0];
  sums[kGapMax] = most[1];
  sums[kLogRatio] = c.log_ratio;
  sums[kPhiPos] = c.phi_pos;
  sums[kPhiNeg] = c.phi_neg;
  sums[kCorrection] = c.correction;
  sums[kFlags] = c.dropped + 2 * c.off_policy;
  if (team.thread != 0) return;
#pragma unroll
  for (int k = 0; k < kScratch; ++k) scratch(a, k, b) = sums[k];
}

// The loss and the metrics, by one block.
template <typename T>
__device__ inline void finish(const GrpoLossArgs& a, const Batch& batch) {
  double sums[kMetrics + 1] = {}, least[1] = {HUGE_VAL}, most[2] = {-HUGE_VAL, 0.0};
  for (int64_t b = threadIdx.x; b < a.sequences; b += kBlock) {
    if (scratch(a, kNumTokens, b) == 0.0) continue;
    const double weight = weight_of<T>(a, batch, b);
#pragma unroll
    for (int k = 0; k < kMetrics; ++k)
      sums[k] += k == kPolicyLoss ? weight * scratch(a, k, b) : scratch(a, k, b);
    sums[kLossSum] += weight * scratch(a, kLossSum, b);
    if (a.grad_entropy != nullptr)
      sums[kLossSum] += entropy_scale(a.parameters, batch, weight) * scratch(a, kEntropySum, b);
    least[0] = Min::apply(scratch(a, kRatioMin, b), least[0]);
    most[0] = Max::apply(scratch(a, kRatioMax, b), most[0]);
    most[1] = Max::apply(scratch(a, kGapMax, b), most[1]);
  }
  team_reduce<Add, kBlock>(sums);
  team_reduce<Min, kBlock>(least);
  team_reduce<Max, kBlock>(most);
  if (threadIdx.x != 0) return;
  const double tokens = batch.tokens > 1.0 ? batch.tokens : 1.0;
  const bool empty = batch.tokens == 0.0;
  T* const out = static_cast<T*>(a.metrics);
#pragma unroll
  for (int k = 0; k < kMetrics; ++k) {
    const bool total = k == kNumTokens || k == kNumSequences || k == kPolicyLoss;
    out[k] = static_cast<T>(total ? sums[k] : sums[k] / tokens);
  }
  out[kRatioMin] = static_cast<T>(empty ? 0.0 : least[0]);
  out[kRatioMax] = static_cast<T>(empty ? 0.0 : most[0]);
  out[kGapMax] = static_cast<T>(most[1]);
  *static_cast<T*>(a.loss) = static_cast<T>(sums[kLossSum]);
}

template <typename T, int kTeam>
__global__ void __launch_bounds__(kBlock) gradient_kernel(const __grid_constant__ GrpoLossArgs a) {
  const Batch batch = batch_weights<T>(a, blockIdx.x == 0);
  if (blockIdx.x == 0) finish<T>(a, batch);
  T* const grad = static_cast<T*>(a.grad_logps);
  T* const grad_entropy = static_cast<T*>(a.grad_entropy);
  for_uncovered(a, [&](int64_t i) {
    grad[i] = T{0};
    if (grad_entropy != nullptr) grad_entropy[i] = T{0};
  });
  const Team<kTeam> team(a);
  const int64_t b = team.sequence;
  if (b >= a.sequences) return;
  Completion c{};
  c.tokens = scratch(a, kNumTokens, b);
  c.weight = weight_of<T>(a, batch, b);
  c.log_ratio = scratch(a, kLogRatio, b);
  c.phi_pos = scratch(a, kPhiPos, b);
  c.phi_neg = scratch(a, kPhiNeg, b);
  c.correction = scratch(a, kCorrection, b);
  const int flags = static_cast<int>(scratch(a, kFlags, b));
  c.dropped = flags & 1;
  c.off_policy = flags & 2;
  const T weight = static_cast<T>(c.weight);
  const T each =
      static_cast<T>(c.weight * scratch(a, kGradS, b) / (c.tokens > 1.0 ? c.tokens : 1.0));
  const T scale = static_cast<T>(entropy_scale(a.parameters, batch, c.weight));
  team.for_tokens([&](int64_t i) {
    const bool counts = a.mask == nullptr || a.mask[i];
    T value{0}, entropy_value{0};
    if (counts) {
      const Evaluated<T> e = evaluate(a, c, load_token<T>(a, b, i), i, weight);
      const Level level = a.parameters.level;
      const T own = level == kToken      ? e.part.d_s * e.token.unclamped
                    : level == kSequence ? each * e.token.unclamped
                                         : e.part.d_s;
      value = e.part.direct + own;
      entropy_value =
          a.token_weights != nullptr ? scale * static_cast<const T*>(a.token_weights)[i] : scale;
    }
    grad[i] = value;
    if (grad_entropy != nullptr) grad_entropy[i] = entropy_value;
  });
}

template <typename T>
void run(const GrpoLossArgs& args, void* stream) {
  for_team(args, [&](auto team) {
    constexpr int kTeam = decltype(team)::value;
    const unsigned grid = grid_for<kTeam>("grpo_loss", args);
    const auto sums = sums_kernel<T, kTeam>;
    const auto gradient = gradient_kernel<T, kTeam>;
    if (grid > 0) launch("grpo_loss", sums, {grid, kBlock}, stream, args);
    launch("grpo_loss", gradient, {std::max(grid, 1u), kBlock}, stream, args);
  });
}

}  // namespace

void grpo_loss(const GrpoLossArgs& args, void* stream) {
  if (args.dtype == DType::kFloat64)
    run<double>(args, stream);
  else
    run<float>(args, stream);
}

}  // namespace vcr1::cuda

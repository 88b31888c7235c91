// The tokens of the GRPO loss one by one: see csrc/cuda/grpo_tokens.cu. A head's row of logits
// takes thousands of times as long as its token here, so nothing is vectorised.
#include <algorithm>

#include "../grpo_token.h"
#include "parallel.h"

namespace vcr1::cpu::VCR1_ISA {
namespace {

using namespace vcr1::grpo;

template <typename T>
void weigh(const GrpoTokensArgs& a, int num_threads) {
  const GrpoLossArgs& given = a.loss;
  const auto for_completions = [&](auto&& fn) {
    const int64_t grain = (int64_t{1} << 14) * given.sequences / std::max<int64_t>(1, given.tokens);
    parallel_for(given.sequences, std::max<int64_t>(1, grain), num_threads,
                 [&](int64_t first, int64_t last) {
                   for (int64_t b = first; b < last; ++b) fn(b, given.scratch + b * kScratch);
                 });
  };
  for_completions([&](int64_t b, double* scratch) {
    double sums[3] = {};
    int64_t begin, end;
    token_range(given, b, begin, end);
    for (int64_t i = begin; i < end; ++i) add_counts<T>(a, b, i, sums);
    const Completion c = counted<T>(a, sums);
    scratch[kNumTokens] = c.tokens;
    scratch[kEntropyWeight] = sums[1];
    scratch[kCorrection] = c.correction;
    scratch[kFlags] = c.dropped;
  });
  double tokens = 0.0, sequences = 0.0, entropy_weight = 0.0;
  for (int64_t b = 0; b < given.sequences; ++b) {
    const double* const scratch = given.scratch + b * kScratch;
    tokens += scratch[kNumTokens];
    sequences += scratch[kNumTokens] > 0.0;
    entropy_weight += scratch[kEntropyWeight];
  }
  const Batch batch = batch_of<T>(given, tokens, sequences, entropy_weight);
  for_completions([&](int64_t b, const double* scratch) {
    Completion c{};
    c.weight = token_weight<T>(given, batch, b, scratch[kNumTokens]);
    c.correction = scratch[kCorrection];
    c.dropped = scratch[kFlags] != 0.0;
    const double scale = entropy_scale(given.parameters, batch, c.weight);
    int64_t begin, end;
    token_range(given, b, begin, end);
    for (int64_t i = begin; i < end; ++i) write_token<T>(a, c, scale, b, i);
  });
  int64_t first, last;
  covered_range(given, first, last);
  for (int64_t i = 0; i < first; ++i) write_nothing<T>(a, i);
  for (int64_t i = last; i < given.tokens; ++i) write_nothing<T>(a, i);
}

template <typename T>
void differentiate(const GrpoLossArgs& a, int num_threads) {
  parallel_for(a.tokens, 1 << 12, num_threads, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      static_cast<T*>(a.grad_logps)[i] = token_gradient<T>(a, i);
  });
}

}  // namespace

void grpo_tokens(const GrpoTokensArgs& args, int num_threads) {
  if (args.loss.dtype == DType::kFloat64)
    weigh<double>(args, num_threads);
  else
    weigh<float>(args, num_threads);
}

void grpo_token_gradients(const GrpoLossArgs& args, int num_threads) {
  if (args.dtype == DType::kFloat64)
    differentiate<double>(args, num_threads);
  else
    differentiate<float>(args, num_threads);
}

void grpo_pack(const GrpoPackArgs& args, int num_threads) {
  parallel_for(args.count, 1 << 13, num_threads, [&](int64_t begin, int64_t end) {
    for (int k = 0; k < args.columns; ++k)
      for (int64_t i = begin; i < end; ++i) pack_element(args.vectors[k], args.rows[i], i);
  });
  for (int64_t b = 0; b <= args.sequences; ++b) args.packed_offsets[b] = packed_offset(args, b);
}

}  // namespace vcr1::cpu::VCR1_ISA

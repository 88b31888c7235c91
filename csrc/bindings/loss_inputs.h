// The tensors of a GRPO loss, a LossInputs of vcr1_fast/ops/grpo/reference.py.
#pragma once

#include "bindings.h"
#include "named_tensors.h"

namespace vcr1 {

// Where the completions are: rows of (B, T), or segments of packed (N,).
inline void set_completions(GrpoLossArgs& args, const Tensor& logps,
                            const std::optional<Tensor>& offsets) {
  args.tokens = logps.numel();
  if (!offsets) {
    VCR1_CHECK(logps.ndim() == 2, "logps: expected (B, T), or (N,) with cu_seqlens, got ",
               logps.ndim(), " dimensions");
    args.sequences = logps.size(0);
    args.columns = logps.size(1);
    return;
  }
  args.sequences = offsets->numel() - 1;
  VCR1_CHECK(offsets->same_device(logps) && args.sequences >= 0,
             "cu_seqlens: expected (B + 1,) on the log-probs' device");
  args.offsets = offsets->dense<int64_t>("cu_seqlens");
  if (!offsets->on_cpu()) return;  // reading them would wait for the GPU: the kernel clamps them
  for (int64_t b = 0; b <= args.sequences; ++b) {
    const int64_t before = b > 0 ? args.offsets[b - 1] : 0;
    VCR1_CHECK(args.offsets[b] >= before && args.offsets[b] <= args.tokens,
               "cu_seqlens must rise within 0 to ", args.tokens, ", the number of tokens; got ",
               args.offsets[b], " after ", before);
  }
}

inline void set_advantages(GrpoLossArgs& args, const Tensor& logps, const Tensor& advantages) {
  // A packed vector of N = B values counts as (B,); (N, 1) is one per token in any case.
  const bool column = advantages.ndim() == 2 && advantages.size(1) == 1;
  const bool per_sequence = advantages.numel() == args.sequences &&
                            (advantages.ndim() == 1 || (column && args.offsets == nullptr));
  args.token_advantages = !per_sequence;
  args.advantages =
      dense_as(advantages, logps, per_sequence ? args.sequences : args.tokens, "advantages");
}

inline Tensor required(const py::object& tuple, const char* name) {
  const auto tensor = named_tensor(tuple, name);
  VCR1_CHECK(tensor.has_value(), name, ": expected a tensor, got None");
  return *tensor;
}

// Constants of the tokens, and the count that the loss divides by.
inline void set_tokens(GrpoLossArgs& args, const Tensor& like, const py::object& inputs) {
  const auto in = [&](const char* name, int64_t numel) {
    return dense_as(named_tensor(inputs, name), like, numel, name);
  };
  args.old_logps = in("old_logps", args.tokens);
  args.ref_logps = in("ref_logps", args.tokens);
  args.rollout_logps = in("rollout_logps", args.tokens);
  args.token_weights = in("token_weights", args.tokens);
  args.denominator = in("denominator", 1);
  args.mask = dense<bool>(named_tensor(inputs, "mask"), args.tokens, like, "mask");
}

}  // namespace vcr1

// Python bindings of grpo_loss.
#include "grpo_options.h"

using vcr1::dense;
using vcr1::dense_as;

VCR1_BINDINGS(grpo_loss, m) {
  m.attr("grpo_loss_scratch") = int{vcr1::grpo::kScratch};
  m.def(
      "grpo_loss",
      [](const std::vector<std::optional<Tensor>>& inputs, const std::vector<int64_t>& kinds,
         const std::vector<double>& values, const std::vector<Tensor>& outputs, int num_threads) {
        VCR1_CHECK(inputs.size() == 11 && inputs[0] && inputs[2], "inputs: expected 11 tensors");
        VCR1_CHECK(outputs.size() == 5, "outputs: expected 5 tensors, got ", outputs.size());
        const Tensor& logps = *inputs[0];
        const auto& offsets = inputs[8];
        const int64_t tokens = logps.numel();
        VCR1_CHECK(logps.dtype() == vcr1::DType::kFloat32 || logps.dtype() == vcr1::DType::kFloat64,
                   "logps: expected float32 or float64, got ", vcr1::name_of(logps.dtype()));
        vcr1::GrpoLossArgs args{};
        args.dtype = logps.dtype();
        args.tokens = tokens;
        args.sequences = offsets ? offsets->numel() - 1 : logps.size(0);
        args.columns = offsets ? 0 : logps.size(1);
        const int64_t sequences = args.sequences;
        if (offsets) {
          VCR1_CHECK(offsets->same_device(logps) && sequences >= 0,
                     "cu_seqlens: expected (B + 1,) on the log-probs' device");
          args.offsets = offsets->dense<int64_t>("cu_seqlens");
          // On a GPU the values are not at hand: the kernel keeps them within the tokens.
          for (int64_t b = 0; offsets->on_cpu() && b <= sequences; ++b) {
            const int64_t before = b > 0 ? args.offsets[b - 1] : 0;
            VCR1_CHECK(args.offsets[b] >= before && args.offsets[b] <= tokens,
                       "cu_seqlens must rise within 0 to ", tokens, ", the number of tokens; got ",
                       args.offsets[b], " after ", before);
          }
        }
        args.logps = dense_as(inputs[0], logps, tokens, "logps");
        args.old_logps = dense_as(inputs[1], logps, tokens, "old_logps");
        const Tensor& advantages = *inputs[2];
        const bool per_sequence = advantages.numel() == sequences &&
                                  (offsets || advantages.ndim() == 1 ||
                                   (advantages.ndim() == 2 && advantages.size(1) == 1));
        args.token_advantages = !per_sequence;
        args.advantages =
            dense_as(inputs[2], logps, per_sequence ? sequences : tokens, "advantages");
        args.mask = dense<bool>(inputs[3], tokens, logps, "mask");
        args.ref_logps = dense_as(inputs[4], logps, tokens, "ref_logps");
        args.entropy = dense_as(inputs[5], logps, tokens, "entropy");
        args.rollout_logps = dense_as(inputs[6], logps, tokens, "rollout_logps");
        args.token_weights = dense_as(inputs[7], logps, tokens, "token_weights");
        args.weights = dense_as(inputs[9], logps, sequences, "weights");
        args.denominator = dense_as(inputs[10], logps, 1, "denominator");
        args.kinds = vcr1::fields_from<vcr1::grpo::Kinds>(kinds, "kinds");
        args.values = vcr1::fields_from<vcr1::grpo::Values>(values, "values");
        const auto out = [&](int index, int64_t numel, const char* name) {
          return const_cast<void*>(dense_as(outputs[index], logps, numel, name));
        };
        args.loss = out(0, 1, "loss");
        args.grad_logps = out(1, tokens, "grad_logps");
        const bool with_entropy = args.entropy != nullptr && args.values.entropy_coef != 0;
        args.grad_entropy = out(2, with_entropy ? tokens : 0, "grad_entropy");
        if (!with_entropy) args.grad_entropy = nullptr;
        args.metrics = out(3, vcr1::grpo::kMetrics, "metrics");
        args.scratch =
            dense<double>(outputs[4], sequences * vcr1::grpo::kScratch, logps, "scratch");
        VCR1_LAUNCH(grpo_loss, logps, args, num_threads);
      },
      py::arg("inputs"), py::arg("kinds"), py::arg("values"), py::arg("outputs"),
      py::arg("num_threads"));
}

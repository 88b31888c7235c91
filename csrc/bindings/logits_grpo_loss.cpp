// Python bindings of logits_grpo_loss, which has a kernel on CUDA only.
#include "grpo_options.h"
#include "logits.h"

using vcr1::dense;

VCR1_BINDINGS(logits_grpo_loss, m) {
  m.def(
      "logits_grpo_loss",
      [](const Tensor& logits, const Tensor& labels, const std::optional<Tensor>& mask,
         const std::optional<Tensor>& row_temperature, double temperature,
         const std::vector<std::optional<Tensor>>& tokens, const std::vector<int64_t>& kinds,
         const std::vector<double>& values, const std::optional<Tensor>& grad_entropy,
         const std::vector<std::optional<Tensor>>& outputs) {
        VCR1_CHECK(logits.on_cuda(), "logits: expected a CUDA tensor");
        VCR1_CHECK(tokens.size() == 6 && tokens[1] && tokens[5],
                   "tokens: expected old log-probs, advantages, reference and rollout log-probs, "
                   "token weights and weights");
        VCR1_CHECK(outputs.size() == 5 && outputs[0] && outputs[2] && outputs[3] && outputs[4],
                   "outputs: expected 5 tensors");
        vcr1::LogitsGrpoLossArgs args{};
        auto& forward = args.forward;
        forward.in =
            vcr1::gather_logprobs_input(logits, labels, mask, row_temperature, temperature);
        const int64_t rows = forward.in.rows;
        VCR1_CHECK(forward.in.k == 1, "labels: expected one a row, got ", forward.in.k);
        forward.logps = dense<float>(outputs[0], rows, logits, "logps");
        forward.entropy = dense<float>(outputs[1], rows, logits, "entropy");
        forward.lse = dense<float>(outputs[2], rows, logits, "lse");
        forward.stats = dense<float>(outputs[3], rows * 3, logits, "stats");
        const Tensor& grad = *outputs[4];
        VCR1_CHECK(grad.dtype() == logits.dtype() && grad.same_device(logits) &&
                       grad.ndim() == logits.ndim(),
                   "grad: expected the dtype, device and shape of the logits");
        for (int i = 0; i < grad.ndim(); ++i)
          VCR1_CHECK(grad.size(i) == logits.size(i), "grad: expected the shape of the logits");
        args.grad = grad.raw();
        args.grad_layout = vcr1::row_layout(grad, "grad");
        args.grad_entropy = dense<float>(grad_entropy, rows, logits, "grad_entropy");
        VCR1_CHECK(args.grad_entropy == nullptr || forward.entropy != nullptr,
                   "grad_entropy: needs entropy");
        auto& loss = args.tokens;
        loss.dtype = vcr1::DType::kFloat32;
        loss.sequences = loss.tokens = rows;
        loss.columns = 1;
        loss.token_advantages = true;
        const char* const names[] = {"old_logps",     "advantages",    "ref_logps",
                                     "rollout_logps", "token_weights", "weights"};
        const void** const fields[] = {&loss.old_logps,     &loss.advantages,    &loss.ref_logps,
                                       &loss.rollout_logps, &loss.token_weights, &loss.weights};
        for (int i = 0; i < 6; ++i) *fields[i] = dense<float>(tokens[i], rows, logits, names[i]);
        loss.kinds = vcr1::fields_from<vcr1::grpo::Kinds>(kinds, "kinds");
        loss.values = vcr1::fields_from<vcr1::grpo::Values>(values, "values");
        if (rows == 0 || forward.in.vocab == 0) return;
        VCR1_LAUNCH_CUDA(logits_grpo_loss, logits, args);
      },
      py::arg("logits"), py::arg("labels"), py::arg("mask"), py::arg("row_temperature"),
      py::arg("temperature"), py::arg("tokens"), py::arg("kinds"), py::arg("values"),
      py::arg("grad_entropy"), py::arg("outputs"));
}

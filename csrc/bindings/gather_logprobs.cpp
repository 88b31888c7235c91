// Python bindings of gather_logprobs.
#include "logits.h"

using vcr1::dense;

VCR1_BINDINGS(gather_logprobs, m) {
  m.def(
      "gather_logprobs",
      [](const Tensor& logits, const Tensor& labels, const std::optional<Tensor>& mask,
         const std::optional<Tensor>& row_temperature, double temperature, const Tensor& logps,
         const std::optional<Tensor>& entropy, const Tensor& lse, const Tensor& stats,
         int num_threads) {
        vcr1::GatherLogprobsForward args{};
        args.in = vcr1::gather_logprobs_input(logits, labels, mask, row_temperature, temperature);
        const auto& in = args.in;
        args.logps = dense<float>(logps, in.rows * in.k, logits, "logps");
        args.entropy = dense<float>(entropy, in.rows, logits, "entropy");
        args.lse = dense<float>(lse, in.rows, logits, "lse");
        args.stats = dense<float>(stats, in.rows * 3, logits, "stats");
        if (in.rows == 0) return;
        VCR1_LAUNCH(gather_logprobs, logits, args, num_threads);
      },
      py::arg("logits"), py::arg("labels"), py::arg("mask"), py::arg("row_temperature"),
      py::arg("temperature"), py::arg("logps"), py::arg("entropy"), py::arg("lse"),
      py::arg("stats"), py::arg("num_threads"));
  m.def(
      "gather_logprobs_backward",
      [](const Tensor& logits, const Tensor& labels, const Tensor& logps, const Tensor& stats,
         const std::optional<Tensor>& mask, const std::optional<Tensor>& row_temperature,
         double temperature, const Tensor& grad_logps, const std::optional<Tensor>& grad_entropy,
         const std::optional<Tensor>& grad_lse, const Tensor& grad, int num_threads) {
        vcr1::GatherLogprobsBackward args{};
        args.in = vcr1::gather_logprobs_input(logits, labels, mask, row_temperature, temperature);
        const auto& in = args.in;
        args.logps = dense<float>(logps, in.rows * in.k, logits, "logps");
        args.stats = dense<float>(stats, in.rows * 3, logits, "stats");
        args.grad_logps = dense<float>(grad_logps, in.rows * in.k, logits, "grad_logps");
        args.grad_entropy = dense<float>(grad_entropy, in.rows, logits, "grad_entropy");
        args.grad_lse = dense<float>(grad_lse, in.rows, logits, "grad_lse");
        VCR1_CHECK(grad.dtype() == in.dtype, "grad: expected ", vcr1::name_of(in.dtype), ", got ",
                   vcr1::name_of(grad.dtype()));
        VCR1_CHECK(grad.same_device(logits), "grad: is on another device than the logits");
        VCR1_CHECK(grad.ndim() == logits.ndim(), "grad: expected the shape of the logits");
        for (int i = 0; i < grad.ndim(); ++i)
          VCR1_CHECK(grad.size(i) == logits.size(i), "grad: expected the shape of the logits");
        args.grad = grad.raw();
        args.grad_layout = vcr1::row_layout(grad, "grad");
        if (in.rows == 0 || in.vocab == 0) return;
        VCR1_LAUNCH(gather_logprobs_backward, logits, args, num_threads);
      },
      py::arg("logits"), py::arg("labels"), py::arg("logps"), py::arg("stats"), py::arg("mask"),
      py::arg("row_temperature"), py::arg("temperature"), py::arg("grad_logps"),
      py::arg("grad_entropy"), py::arg("grad_lse"), py::arg("grad"), py::arg("num_threads"));
}

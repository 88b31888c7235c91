// Python bindings of logits_grpo_loss, which has a kernel on CUDA only.
#include "logits.h"
#include "named_tensors.h"

using vcr1::dense;
using vcr1::named_tensor;

namespace {

// Of `tokens`, a LossInputs of flat vectors with one value per row; it has no log-probs yet.
void set_tokens(vcr1::GrpoLossArgs& args, const Tensor& logits, const py::object& tokens,
                int64_t rows) {
  const auto in = [&](const char* name) -> const void* {
    return dense<float>(named_tensor(tokens, name), rows, logits, name);
  };
  args.dtype = vcr1::DType::kFloat32;
  args.sequences = args.tokens = rows;  // completions of one token each
  args.columns = 1;
  args.token_advantages = true;
  args.old_logps = in("old_logps");
  args.advantages = in("advantages");
  args.ref_logps = in("ref_logps");
  args.rollout_logps = in("rollout_logps");
  args.token_weights = in("token_weights");
  args.weights = in("weights");
  VCR1_CHECK(args.advantages != nullptr, "advantages: expected a tensor, got None");
  VCR1_CHECK(args.weights != nullptr, "weights: expected a tensor, got None");
}

// Of `outputs`, a LogitsOutputs.
void set_outputs(vcr1::LogitsGrpoLossArgs& args, const Tensor& logits, const py::object& outputs) {
  auto& forward = args.forward;
  const int64_t rows = forward.in.rows;
  const auto out = [&](const char* name, int64_t numel, bool optional) {
    float* const data = dense<float>(named_tensor(outputs, name), numel, logits, name);
    VCR1_CHECK(data != nullptr || optional, name, ": expected a tensor, got None");
    return data;
  };
  forward.logps = out("logps", rows, false);
  forward.entropy = out("entropy", rows, true);
  forward.lse = out("lse", rows, false);
  forward.stats = out("stats", rows * 3, false);
  args.grad_entropy = out("grad_entropy", rows, true);
  VCR1_CHECK(args.grad_entropy == nullptr || forward.entropy != nullptr,
             "grad_entropy: needs entropy");
  const auto grad = named_tensor(outputs, "grad");
  VCR1_CHECK(grad.has_value(), "grad: expected a tensor, got None");
  VCR1_CHECK(
      grad->dtype() == logits.dtype() && grad->same_device(logits) && grad->ndim() == logits.ndim(),
      "grad: expected the dtype, device and shape of the logits");
  for (int i = 0; i < grad->ndim(); ++i)
    VCR1_CHECK(grad->size(i) == logits.size(i), "grad: expected the shape of the logits");
  args.grad = grad->raw();
  args.grad_layout = vcr1::row_layout(*grad, "grad");
}

void logits_grpo_loss(const Tensor& logits, const Tensor& labels, const std::optional<Tensor>& mask,
                      const std::optional<Tensor>& row_temperature, double temperature,
                      const py::object& tokens, const vcr1::grpo::Parameters& parameters,
                      const py::object& outputs) {
  VCR1_CHECK(logits.on_cuda(), "logits: expected a CUDA tensor");
  vcr1::LogitsGrpoLossArgs args{};
  args.forward.in = vcr1::gather_logprobs_input(logits, labels, mask, row_temperature, temperature);
  VCR1_CHECK(args.forward.in.k == 1, "labels: expected one per row, got ", args.forward.in.k);
  args.tokens.parameters = parameters;
  set_tokens(args.tokens, logits, tokens, args.forward.in.rows);
  set_outputs(args, logits, outputs);
  if (args.forward.in.rows == 0 || args.forward.in.vocab == 0) return;
  VCR1_LAUNCH_CUDA(logits_grpo_loss, logits, args);
}

}  // namespace

VCR1_BINDINGS(logits_grpo_loss, m) {
  m.def("logits_grpo_loss", &logits_grpo_loss, py::arg("logits"), py::arg("labels"),
        py::arg("mask"), py::arg("row_temperature"), py::arg("temperature"), py::arg("tokens"),
        py::arg("parameters"), py::arg("outputs"));
}

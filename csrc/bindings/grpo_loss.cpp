// Python bindings of grpo_loss, and its parameters as a class, which logits_grpo_loss takes too.
//
// Nothing is passed by position: parameters come as keywords, tensors as a NamedTuple whose fields
// are read by name (LossInputs and LossOutputs of vcr1_fast/ops/grpo).
#include <string>
#include <utility>

#include "bindings.h"
#include "loss_inputs.h"

using vcr1::dense;
using vcr1::dense_as;
using vcr1::named_tensor;
using vcr1::required;
using vcr1::grpo::Parameters;

namespace {

template <typename E>
using Names = std::initializer_list<std::pair<const char*, E>>;

const Names<vcr1::grpo::Loss> kLossTypes = {
    {"grpo", vcr1::grpo::kGrpo},   {"bnpo", vcr1::grpo::kBnpo},   {"dr_grpo", vcr1::grpo::kDrGrpo},
    {"dapo", vcr1::grpo::kDapo},   {"cispo", vcr1::grpo::kCispo}, {"sapo", vcr1::grpo::kSapo},
    {"luspo", vcr1::grpo::kLuspo}, {"vespo", vcr1::grpo::kVespo},
};
const Names<vcr1::grpo::Level> kLevels = {
    {"token", vcr1::grpo::kToken},
    {"sequence", vcr1::grpo::kSequence},
    {"sequence_token", vcr1::grpo::kSequenceToken},
};
const Names<vcr1::grpo::Kl> kKlKinds = {
    {"k1", vcr1::grpo::kK1},
    {"k2", vcr1::grpo::kK2},
    {"k3", vcr1::grpo::kK3},
    {"abs", vcr1::grpo::kAbs},
};
const Names<vcr1::grpo::Aggregation> kAggregations = {
    {"sequence_mean", vcr1::grpo::kSequenceMean}, {"token_mean", vcr1::grpo::kTokenMean},
    {"sequence_sum", vcr1::grpo::kSequenceSum},   {"max_length", vcr1::grpo::kMaxLength},
    {"num_items", vcr1::grpo::kNumItems},
};
const Names<vcr1::grpo::Rollout> kRolloutCorrections = {
    {"none", vcr1::grpo::kNone},
    {"token_truncate", vcr1::grpo::kTokenTruncate},
    {"token_mask", vcr1::grpo::kTokenMask},
    {"token_icepop", vcr1::grpo::kTokenIcepop},
    {"sequence_truncate", vcr1::grpo::kSequenceTruncate},
    {"sequence_mask", vcr1::grpo::kSequenceMask},
    {"sequence_icepop", vcr1::grpo::kSequenceIcepop},
};

// Keyword arguments, each of which must be read exactly once.
class Fields {
 public:
  explicit Fields(const py::kwargs& given) : given_(given) {}

  template <typename T>
  void read(const char* name, T& out) {
    out = take(name).cast<T>();
  }
  template <typename E>
  void read(const char* name, E& out, const Names<E>& names) {
    const auto text = take(name).cast<std::string>();
    for (const auto& [known, value] : names)
      if (text == known) {
        out = value;
        return;
      }
    vcr1::fail<std::invalid_argument>("GrpoParameters: unknown ", name, " '", text, "'");
  }
  void finish() const {
    VCR1_CHECK(read_ == given_.size(), "GrpoParameters: expected ", read_, " fields, got ",
               given_.size());
  }

 private:
  py::object take(const char* name) {
    VCR1_CHECK(given_.contains(name), "GrpoParameters: ", name, " is missing");
    ++read_;
    return given_[name];
  }

  const py::kwargs& given_;
  size_t read_ = 0;
};

Parameters parameters_from(const py::kwargs& given) {
  Fields fields(given);
  Parameters p{};
  fields.read("loss_type", p.loss_type, kLossTypes);
  fields.read("level", p.level, kLevels);
  fields.read("kl", p.kl, kKlKinds);
  fields.read("aggregation", p.aggregation, kAggregations);
  fields.read("rollout_correction", p.rollout_correction, kRolloutCorrections);
  // The macro keeps a name and its field from drifting apart.
#define VCR1_READ(name) fields.read(#name, p.name)
  VCR1_READ(entropy_token_mean);
  VCR1_READ(kl_bias_correction);
  VCR1_READ(kl_straight_through);
  VCR1_READ(rollout_after_kl);
  VCR1_READ(exclude_empty);
  VCR1_READ(ratio_low);
  VCR1_READ(ratio_high);
  VCR1_READ(delta);
  VCR1_READ(beta);
  VCR1_READ(kl_input_clamp);
  VCR1_READ(kl_output_clamp);
  VCR1_READ(log_ratio_clamp);
  VCR1_READ(sapo_tau_pos);
  VCR1_READ(sapo_tau_neg);
  VCR1_READ(vespo_k_pos);
  VCR1_READ(vespo_lambda_pos);
  VCR1_READ(vespo_k_neg);
  VCR1_READ(vespo_lambda_neg);
  VCR1_READ(rollout_min);
  VCR1_READ(rollout_max);
  VCR1_READ(off_policy_threshold);
  VCR1_READ(entropy_coef);
  VCR1_READ(max_length);
  VCR1_READ(num_items);
  VCR1_READ(num_sequences);
#undef VCR1_READ
  fields.finish();
  return p;
}

void grpo_loss(const py::object& inputs, const Parameters& parameters, const py::object& outputs,
               int num_threads) {
  const Tensor logps = required(inputs, "logps");
  VCR1_CHECK(logps.dtype() == vcr1::DType::kFloat32 || logps.dtype() == vcr1::DType::kFloat64,
             "logps: expected float32 or float64, got ", vcr1::name_of(logps.dtype()));
  vcr1::GrpoLossArgs args{};
  args.parameters = parameters;
  args.dtype = logps.dtype();
  args.logps = logps.raw();
  VCR1_CHECK(logps.is_contiguous(), "logps: expected a contiguous tensor");
  vcr1::set_completions(args, logps, named_tensor(inputs, "cu_seqlens"));
  vcr1::set_advantages(args, logps, required(inputs, "advantages"));
  vcr1::set_tokens(args, logps, inputs);
  args.entropy = dense_as(named_tensor(inputs, "entropy"), logps, args.tokens, "entropy");
  args.weights = dense_as(named_tensor(inputs, "weights"), logps, args.sequences, "weights");
  const auto out = [&](const char* name, int64_t numel) {
    return const_cast<void*>(dense_as(required(outputs, name), logps, numel, name));
  };
  args.loss = out("loss", 1);
  args.grad_logps = out("grad_logps", args.tokens);
  args.metrics = out("metrics", vcr1::grpo::kMetrics);
  if (args.entropy != nullptr && parameters.entropy_coef != 0)
    args.grad_entropy = out("grad_entropy", args.tokens);
  args.scratch = dense<double>(required(outputs, "scratch"), args.sequences * vcr1::grpo::kScratch,
                               logps, "scratch");
  VCR1_LAUNCH(grpo_loss, logps, args, num_threads);
}

}  // namespace

VCR1_BINDINGS(grpo_loss, m) {
  m.attr("grpo_loss_scratch") = int{vcr1::grpo::kScratch};
  py::class_<Parameters>(m, "GrpoParameters", "LossParameters of vcr1_fast/ops/grpo/config.py.")
      .def(py::init(&parameters_from));
  m.def("grpo_loss", &grpo_loss, py::arg("inputs"), py::arg("parameters"), py::arg("outputs"),
        py::arg("num_threads"));
}

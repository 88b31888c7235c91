// Python bindings of grpo_tokens, and of copy_rows, which has a kernel on CUDA only.
#include "loss_inputs.h"

using vcr1::dense;
using vcr1::dense_as;
using vcr1::named_tensor;
using vcr1::required;
using vcr1::grpo::Parameters;

namespace {

vcr1::GrpoLossArgs without_logps(const py::object& inputs, const Parameters& parameters,
                                 const Tensor& like) {
  VCR1_CHECK(like.dtype() == vcr1::DType::kFloat32 || like.dtype() == vcr1::DType::kFloat64,
             "weights: expected float32 or float64, got ", vcr1::name_of(like.dtype()));
  vcr1::GrpoLossArgs args{};
  args.parameters = parameters;
  args.dtype = like.dtype();
  vcr1::set_completions(args, like, named_tensor(inputs, "cu_seqlens"));
  vcr1::set_advantages(args, like, required(inputs, "advantages"));
  vcr1::set_tokens(args, like, inputs);
  return args;
}

void grpo_tokens(const py::object& inputs, const Parameters& parameters, const py::object& outputs,
                 const Tensor& scratch, int num_threads) {
  const Tensor weights = required(outputs, "weights");
  vcr1::GrpoTokensArgs args{};
  args.loss = without_logps(inputs, parameters, weights);
  const int64_t tokens = args.loss.tokens;
  args.loss.scratch =
      dense<double>(scratch, args.loss.sequences * vcr1::grpo::kScratch, weights, "scratch");
  args.keep = dense<bool>(required(outputs, "keep"), tokens, weights, "keep");
  const auto out = [&](const char* name) {
    return const_cast<void*>(dense_as(named_tensor(outputs, name), weights, tokens, name));
  };
  args.weights = out("weights");
  required(outputs, "advantages");
  args.advantages = out("advantages");
  args.grad_entropy = out("grad_entropy");
  args.rollout_logps = out("rollout_logps");
  VCR1_LAUNCH(grpo_tokens, weights, args, num_threads);
}

void grpo_token_gradients(const Tensor& logps, const py::object& inputs,
                          const Parameters& parameters, const Tensor& grad_logps, int num_threads) {
  vcr1::GrpoLossArgs args{};
  args.parameters = parameters;
  args.dtype = logps.dtype();
  VCR1_CHECK(args.dtype == vcr1::DType::kFloat32 || args.dtype == vcr1::DType::kFloat64,
             "logps: expected float32 or float64, got ", vcr1::name_of(args.dtype));
  args.sequences = args.tokens = logps.numel();
  args.columns = 1;
  args.token_advantages = true;
  args.logps = dense_as(logps, logps, args.tokens, "logps");
  args.advantages = dense_as(required(inputs, "advantages"), logps, args.tokens, "advantages");
  args.weights = dense_as(required(inputs, "weights"), logps, args.tokens, "weights");
  vcr1::set_tokens(args, logps, inputs);
  args.grad_logps = const_cast<void*>(dense_as(grad_logps, logps, args.tokens, "grad_logps"));
  if (args.tokens == 0) return;
  VCR1_LAUNCH(grpo_token_gradients, logps, args, num_threads);
}

int element_size(const Tensor& x) {
  const int size = vcr1::size_of(x.dtype());
  VCR1_CHECK(size == 1 || size == 4 || size == 8,
             "vectors: expected bool, int64, float32 or float64, got ", vcr1::name_of(x.dtype()));
  return size;
}

void grpo_pack(const Tensor& rows, const std::vector<Tensor>& vectors,
               const std::vector<Tensor>& packed, const std::optional<Tensor>& offsets,
               int64_t length, const Tensor& packed_offsets, int num_threads) {
  vcr1::GrpoPackArgs args{};
  args.count = rows.numel();
  args.rows = dense<int64_t>(rows, args.count, rows, "rows");
  VCR1_CHECK(vectors.size() == packed.size() && vectors.size() <= args.kMaxVectors,
             "vectors: expected as many as packed ones, and at most ", args.kMaxVectors, ", got ",
             vectors.size());
  for (size_t i = 0; i < vectors.size(); ++i) {
    const Tensor &from = vectors[i], &to = packed[i];
    VCR1_CHECK(from.dtype() == to.dtype() && from.same_device(rows) && to.same_device(rows),
               "vectors: expected the dtype and the device of the packed ones");
    VCR1_CHECK(from.is_contiguous() && to.is_contiguous() && to.numel() == args.count,
               "vectors: expected contiguous ones, packed to ", args.count, " elements");
    args.vectors[i] = {from.raw(), to.raw(), element_size(from)};
  }
  args.columns = static_cast<int>(vectors.size());
  args.sequences = packed_offsets.numel() - 1;
  VCR1_CHECK(args.sequences >= 0, "packed_offsets: expected (B + 1,)");
  args.length = length;
  args.offsets = dense<int64_t>(offsets, args.sequences + 1, rows, "offsets");
  args.packed_offsets = dense<int64_t>(packed_offsets, args.sequences + 1, rows, "packed_offsets");
  VCR1_LAUNCH(grpo_pack, rows, args, num_threads);
}

void copy_rows(const Tensor& from, const Tensor& rows, const Tensor& to, bool scatter) {
  VCR1_CHECK(from.on_cuda() && from.ndim() == 2 && to.ndim() == 2 && from.dtype() == to.dtype() &&
                 from.size(1) == to.size(1) && to.same_device(from) && to.is_contiguous(),
             "copy_rows: expected two matrices of one width and dtype on one CUDA device");
  vcr1::CopyRowsArgs args{};
  args.from = from.raw();
  args.to = to.raw();
  args.count = rows.numel();
  args.rows = dense<int64_t>(rows, args.count, from, "rows");
  args.total = scatter ? to.size(0) : from.size(0);
  const int64_t element = vcr1::size_of(from.dtype());
  args.row_bytes = from.size(1) * element;
  VCR1_CHECK(from.size(1) <= 1 || from.stride(1) == 1, "from: expected stride 1 along rows");
  args.stride = from.stride(0) * element;
  args.scatter = scatter;
  VCR1_CHECK((scatter ? from.size(0) : to.size(0)) == args.count && element % 2 == 0 &&
                 (!scatter || from.is_contiguous()),
             "copy_rows: expected ", args.count, " rows");
  if (to.numel() == 0) return;
  if (args.stride % args.row_bytes != 0 && args.count <= 1) args.stride = args.row_bytes;
  VCR1_LAUNCH_CUDA(copy_rows, from, args);
}

}  // namespace

VCR1_BINDINGS(grpo_tokens, m) {
  m.def("grpo_tokens", &grpo_tokens, py::arg("inputs"), py::arg("parameters"), py::arg("outputs"),
        py::arg("scratch"), py::arg("num_threads"));
  m.def("grpo_token_gradients", &grpo_token_gradients, py::arg("logps"), py::arg("inputs"),
        py::arg("parameters"), py::arg("grad_logps"), py::arg("num_threads"));
  m.def("grpo_pack", &grpo_pack, py::arg("rows"), py::arg("vectors"), py::arg("packed"),
        py::arg("offsets"), py::arg("length"), py::arg("packed_offsets"), py::arg("num_threads"));
  m.def("copy_rows", &copy_rows, py::arg("from_"), py::arg("rows"), py::arg("to"),
        py::arg("scatter"),
        "to[i] = from[rows[i]], or to[rows[i]] = from[i] among zeros; rows ascend.");
}

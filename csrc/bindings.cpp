// Python bindings: check, allocate nothing, pick CPU or CUDA. The only file that knows pybind11,
// with bindings_*.cpp and tensor.h. One bind_<op>() an op.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cmath>
#include <cstring>
#include <optional>
#include <vector>

#include "cpu/isa.h"
#include "cpu/parallel.h"
#include "kernels.h"
#include "tensor.h"

namespace py = pybind11;
using vcr1::Tensor;

// bindings_attention.cpp
void bind_attention(py::module_& m);

// bindings_memory.cpp
void bind_memory(py::module_& m);

// bindings_video.cpp
void bind_iou(py::module_& m);
void bind_resize(py::module_& m);

#ifdef VCR1_CUDA
// bindings_cuda_video.cpp
void bind_cuda_iou(py::module_& m);
void bind_cuda_resize(py::module_& m);
#endif

namespace {

template <typename Args>
void launch_cpu(const char* op, const Tensor& on, void (*fn)(const Args&, int), const Args& args,
                int num_threads) {
  VCR1_CHECK(on.on_cpu(), op, ": this build has no kernel for the tensors' device");
  const py::gil_scoped_release released;
  fn(args, num_threads);
}

// Runs the launcher `op` where tensor `on` lives. A CUDA launch is asynchronous and keeps the GIL.
#ifdef VCR1_CUDA
#define VCR1_LAUNCH(op, on, args, num_threads)                 \
  do {                                                         \
    if ((on).on_cuda()) {                                      \
      const vcr1::DeviceGuard guard(#op, (on).device_index()); \
      vcr1::cuda::op(args, (on).stream());                     \
    } else {                                                   \
      launch_cpu(#op, on, &vcr1::cpu::op, args, num_threads);  \
    }                                                          \
  } while (false)
#else
#define VCR1_LAUNCH(op, on, args, num_threads) \
  launch_cpu(#op, on, &vcr1::cpu::op, args, num_threads)
#endif

void bind_runtime(py::module_& m) {
#ifdef VCR1_CUDA
  m.attr("has_cuda") = true;
#else
  m.attr("has_cuda") = false;
#endif
  m.def(
      "cpu_isa", [] { return vcr1::cpu::name_of(vcr1::cpu::isa()); },
      "Instruction set of the CPU kernels in use.");
  m.def(
      "choose_cpu_isa", [](const std::string& name) { vcr1::cpu::choose_isa(name); },
      py::arg("name"),
      "Use the kernels compiled for 'baseline', 'avx2', 'avx512', 'avx512vbmi' or 'auto'.");
  m.def(
      "use_team",
      [](std::uintptr_t address) {
        vcr1::cpu::use_team(reinterpret_cast<vcr1::cpu::TeamFn>(address));
      },
      py::arg("address"), "Run CPU kernels by the GOMP_parallel at this address; 0: our own pool.");
  m.def("tensor_protocol", &Tensor::protocol, "How tensors are read: 'dlpack' or 'attributes'.");
  m.def(
      "describe",
      [](const Tensor& tensor) {
        py::list shape, strides;
        for (int i = 0; i < tensor.ndim(); ++i) {
          shape.append(tensor.size(i));
          strides.append(tensor.stride(i));
        }
        return py::make_tuple(vcr1::name_of(tensor.dtype()), py::tuple(shape), py::tuple(strides),
                              reinterpret_cast<std::uintptr_t>(tensor.raw()));
      },
      py::arg("tensor"), "(dtype, shape, strides, address) as the kernels see a tensor.");
}

// The leading dimensions of `tensor` (all but the last), merged where their strides allow.
vcr1::RowLayout row_layout(const Tensor& tensor, const char* name) {
  VCR1_CHECK(tensor.ndim() >= 1, name, ": expected at least 1 dimension");
  VCR1_CHECK(tensor.size(-1) <= 1 || tensor.stride(-1) == 1, name,
             ": expected stride 1 along the last dimension, got ", tensor.stride(-1));
  vcr1::RowLayout out;
  for (int i = 0; i < tensor.ndim() - 1; ++i) {
    const int last = out.ndim - 1;
    if (last >= 0 && out.stride[last] == tensor.size(i) * tensor.stride(i)) {
      out.size[last] *= tensor.size(i);
      out.stride[last] = tensor.stride(i);
    } else {
      out.size[out.ndim] = tensor.size(i);
      out.stride[out.ndim] = tensor.stride(i);
      ++out.ndim;
    }
  }
  return out;
}

// A dense tensor of exactly `numel` elements on the device of `like`, or null for None.
template <typename T>
T* dense(const std::optional<Tensor>& tensor, int64_t numel, const Tensor& like, const char* name) {
  if (!tensor) return nullptr;
  VCR1_CHECK(tensor->numel() == numel, name, ": expected ", numel, " elements, got ",
             tensor->numel());
  VCR1_CHECK(tensor->same_device(like), name, ": is on another device than the logits");
  return tensor->dense<T>(name);
}

vcr1::GatherLogprobsInput gather_logprobs_input(const Tensor& logits, const Tensor& labels,
                                                const std::optional<Tensor>& mask,
                                                const std::optional<Tensor>& row_temperature,
                                                double temperature) {
  const auto dtype = logits.dtype();
  VCR1_CHECK(dtype == vcr1::DType::kFloat32 || dtype == vcr1::DType::kBFloat16 ||
                 dtype == vcr1::DType::kFloat16,
             "logits: expected float32, bfloat16 or float16, got ", vcr1::name_of(dtype));
  VCR1_CHECK(labels.ndim() == logits.ndim(), "labels: expected ", logits.ndim(),
             " dimensions, got ", labels.ndim());
  vcr1::GatherLogprobsInput in{};
  in.dtype = dtype;
  in.logits = logits.raw();
  in.layout = row_layout(logits, "logits");
  in.vocab = logits.size(-1);
  in.rows = 1;
  for (int i = 0; i < logits.ndim() - 1; ++i) in.rows *= logits.size(i);
  in.k = labels.size(-1);
  in.labels = dense<int64_t>(labels, in.rows * in.k, logits, "labels");
  in.mask = dense<bool>(mask, in.rows, logits, "mask");
  in.row_temperature = dense<float>(row_temperature, in.rows, logits, "row_temperature");
  in.temperature = static_cast<float>(temperature);
  if (logits.on_cpu()) {  // On a GPU the values are not at hand: a bad label gives NaN there.
    for (int64_t row = 0; row < in.rows; ++row) {
      if (in.mask != nullptr && !in.mask[row]) continue;
      for (int64_t i = row * in.k; i < (row + 1) * in.k; ++i)
        VCR1_CHECK(in.labels[i] >= 0 && in.labels[i] < in.vocab, "labels: row ", row, " holds ",
                   in.labels[i], ", outside a vocabulary of ", in.vocab);
      if (in.row_temperature != nullptr)
        VCR1_CHECK(in.row_temperature[row] > 0 && std::isfinite(in.row_temperature[row]),
                   "temperature: row ", row, " holds ", in.row_temperature[row],
                   ", expected a positive number");
    }
  }
  return in;
}

void bind_gather_logprobs(py::module_& m) {
  m.def(
      "gather_logprobs",
      [](const Tensor& logits, const Tensor& labels, const std::optional<Tensor>& mask,
         const std::optional<Tensor>& row_temperature, double temperature, const Tensor& logps,
         const std::optional<Tensor>& entropy, const Tensor& lse, const Tensor& stats,
         int num_threads) {
        vcr1::GatherLogprobsForward args{};
        args.in = gather_logprobs_input(logits, labels, mask, row_temperature, temperature);
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
        args.in = gather_logprobs_input(logits, labels, mask, row_temperature, temperature);
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
        args.grad_layout = row_layout(grad, "grad");
        if (in.rows == 0 || in.vocab == 0) return;
        VCR1_LAUNCH(gather_logprobs_backward, logits, args, num_threads);
      },
      py::arg("logits"), py::arg("labels"), py::arg("logps"), py::arg("stats"), py::arg("mask"),
      py::arg("row_temperature"), py::arg("temperature"), py::arg("grad_logps"),
      py::arg("grad_entropy"), py::arg("grad_lse"), py::arg("grad"), py::arg("num_threads"));
}

// The enumerators of grpo_loss.h follow the order of these fields; all are 8 bytes wide.
template <typename Fields, typename T>
Fields fields_from(const std::vector<T>& values, const char* name) {
  static_assert(sizeof(Fields) % sizeof(T) == 0);
  VCR1_CHECK(values.size() * sizeof(T) == sizeof(Fields), name, ": expected ",
             sizeof(Fields) / sizeof(T), " values, got ", values.size());
  Fields out;
  std::memcpy(&out, values.data(), sizeof(Fields));
  return out;
}

const void* dense_as(const std::optional<Tensor>& tensor, const Tensor& like, int64_t numel,
                     const char* name) {
  if (!tensor) return nullptr;
  VCR1_CHECK(tensor->dtype() == like.dtype(), name, ": expected ", vcr1::name_of(like.dtype()),
             ", got ", vcr1::name_of(tensor->dtype()));
  VCR1_CHECK(tensor->numel() == numel, name, ": expected ", numel, " elements, got ",
             tensor->numel());
  VCR1_CHECK(tensor->is_contiguous(), name, ": expected a contiguous tensor");
  VCR1_CHECK(tensor->same_device(like), name, ": is on another device than the log-probs");
  return tensor->raw();
}

void bind_grpo_loss(py::module_& m) {
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
        args.kinds = fields_from<vcr1::grpo::Kinds>(kinds, "kinds");
        args.values = fields_from<vcr1::grpo::Values>(values, "values");
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

#ifdef VCR1_CUDA
void bind_logits_grpo_loss(py::module_& m) {
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
        forward.in = gather_logprobs_input(logits, labels, mask, row_temperature, temperature);
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
        args.grad_layout = row_layout(grad, "grad");
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
        loss.kinds = fields_from<vcr1::grpo::Kinds>(kinds, "kinds");
        loss.values = fields_from<vcr1::grpo::Values>(values, "values");
        if (rows == 0 || forward.in.vocab == 0) return;
        const vcr1::DeviceGuard guard("logits_grpo_loss", logits.device_index());
        vcr1::cuda::logits_grpo_loss(args, logits.stream());
      },
      py::arg("logits"), py::arg("labels"), py::arg("mask"), py::arg("row_temperature"),
      py::arg("temperature"), py::arg("tokens"), py::arg("kinds"), py::arg("values"),
      py::arg("grad_entropy"), py::arg("outputs"));
}
#endif

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Native kernels of vcr1_fast.";
  bind_runtime(m);
  bind_attention(m);
  bind_memory(m);
  bind_gather_logprobs(m);
  bind_iou(m);
  bind_grpo_loss(m);
#ifdef VCR1_CUDA
  bind_logits_grpo_loss(m);
#endif
  bind_resize(m);
#ifdef VCR1_CUDA
  bind_cuda_iou(m);
  bind_cuda_resize(m);
#endif
}

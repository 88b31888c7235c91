// Python bindings of attention within packs; bindings.cpp makes the module.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <vector>

#include "kernels.h"
#include "tensor.h"

namespace py = pybind11;
using vcr1::Tensor;

namespace {

// (rows, heads, dim) of the queries' dtype.
vcr1::HeadsView heads_view(const Tensor& tensor, const vcr1::GroupAttentionInput& in, int64_t heads,
                           const char* name) {
  const auto [rows, own_heads, dim] = tensor.shape<3>(name);
  VCR1_CHECK(tensor.on_cpu(), name, ": expected a CPU tensor");
  VCR1_CHECK(tensor.dtype() == in.dtype, name, ": expected ", vcr1::name_of(in.dtype), ", got ",
             vcr1::name_of(tensor.dtype()));
  VCR1_CHECK(rows == in.rows && own_heads == heads && dim == in.dim, name, ": expected (", in.rows,
             ", ", heads, ", ", in.dim, "), got (", rows, ", ", own_heads, ", ", dim, ")");
  VCR1_CHECK(dim <= 1 || tensor.stride(2) == 1, name,
             ": expected stride 1 along the last dimension, got ", tensor.stride(2));
  return {tensor.raw(), tensor.stride(0), tensor.stride(1)};
}

// Memory of the kernel's own precision: fp64 for fp64, else fp32.
void* exact(const Tensor& tensor, const vcr1::GroupAttentionInput& in, int64_t numel,
            const char* name) {
  VCR1_CHECK(tensor.on_cpu() && tensor.numel() >= numel, name, ": expected ", numel,
             " elements on the CPU, got ", tensor.numel());
  if (in.dtype == vcr1::DType::kFloat64) return tensor.dense<double>(name);
  return tensor.dense<float>(name);
}

// inputs: query, key, value. The parts must rise, and stay within the rows.
vcr1::GroupAttentionInput attention_input(const std::vector<Tensor>& inputs, const Tensor& parts,
                                          double scale, const Tensor& scratch, int64_t tasks) {
  const Tensor &query = inputs.at(0), &key = inputs.at(1), &value = inputs.at(2);
  vcr1::GroupAttentionInput in{};
  in.dtype = query.dtype();
  VCR1_CHECK(in.dtype == vcr1::DType::kFloat64 || in.dtype == vcr1::DType::kFloat32 ||
                 in.dtype == vcr1::DType::kBFloat16 || in.dtype == vcr1::DType::kFloat16,
             "query: expected float64, float32, bfloat16 or float16, got ",
             vcr1::name_of(in.dtype));
  const auto shape = query.shape<3>("query");
  in.rows = shape[0];
  in.heads = shape[1];
  in.dim = shape[2];
  in.kv_heads = key.shape<3>("key")[1];
  VCR1_CHECK(in.kv_heads > 0 && in.heads % in.kv_heads == 0, "heads: ", in.heads,
             " of the queries are no multiple of ", in.kv_heads, " of the keys");
  VCR1_CHECK(in.dim > 0 && in.dim <= vcr1::kGroupAttentionMaxDim, "query: expected heads of 1 to ",
             int{vcr1::kGroupAttentionMaxDim}, ", got ", in.dim);
  in.query = heads_view(query, in, in.heads, "query");
  in.key = heads_view(key, in, in.kv_heads, "key");
  in.value = heads_view(value, in, in.kv_heads, "value");
  in.scale = scale;
  const auto [count, columns] = parts.shape<2>("parts");
  VCR1_CHECK(parts.on_cpu() && columns == 4, "parts: expected (n, 4) on the CPU, got ", columns,
             " columns");
  in.parts = reinterpret_cast<const vcr1::GroupAttentionPart*>(parts.dense<int64_t>("parts"));
  in.num_parts = count;
  int64_t at = 0;
  for (int64_t i = 0; i < count; ++i) {
    const auto [row, end, prefix, prefix_end] = in.parts[i];
    VCR1_CHECK(row >= at && end > row && end <= in.rows, "parts: expected rising queries within ",
               in.rows, ", got ", row, " to ", end, " at ", i);
    VCR1_CHECK(prefix >= 0 && prefix_end >= prefix && prefix_end <= row,
               "parts: expected a prefix before query ", row, ", got ", prefix, " to ", prefix_end,
               " at ", i);
    at = end;
  }
  const int64_t size = (in.dim + vcr1::kDimMultiple - 1) / vcr1::kDimMultiple * vcr1::kDimMultiple;
  in.scratch = exact(scratch, in, 2 * in.kv_heads * in.rows * size * (1 + tasks), "scratch");
  return in;
}

}  // namespace

void bind_attention(py::module_& m) {
  m.attr("group_attention_dim_multiple") = int{vcr1::kDimMultiple};
  m.def(
      "group_attention",
      [](const std::vector<Tensor>& inputs, const Tensor& parts, double scale, const Tensor& out,
         const Tensor& lse, const Tensor& scratch, int num_threads) {
        vcr1::GroupAttentionForward args{};
        args.in = attention_input(inputs, parts, scale, scratch, 0);
        args.out = heads_view(out, args.in, args.in.heads, "out");
        args.lse = exact(lse, args.in, args.in.heads * args.in.rows, "lse");
        const py::gil_scoped_release released;
        vcr1::cpu::group_attention(args, num_threads);
      },
      py::arg("inputs"), py::arg("parts"), py::arg("scale"), py::arg("out"), py::arg("lse"),
      py::arg("scratch"), py::arg("num_threads"));
  m.def(
      "group_attention_backward",
      [](const std::vector<Tensor>& inputs, const Tensor& parts, double scale, const Tensor& out,
         const Tensor& lse, const Tensor& grad, const std::vector<Tensor>& grads,
         const Tensor& scratch, int64_t tasks, int num_threads) {
        VCR1_CHECK(tasks > 0, "tasks: expected at least 1, got ", tasks);
        vcr1::GroupAttentionBackward args{};
        args.in = attention_input(inputs, parts, scale, scratch, tasks);
        args.out = heads_view(out, args.in, args.in.heads, "out");
        args.grad = heads_view(grad, args.in, args.in.heads, "grad");
        args.lse = exact(lse, args.in, args.in.heads * args.in.rows, "lse");
        args.grad_query = heads_view(grads.at(0), args.in, args.in.heads, "grad_query");
        args.grad_key = heads_view(grads.at(1), args.in, args.in.kv_heads, "grad_key");
        args.grad_value = heads_view(grads.at(2), args.in, args.in.kv_heads, "grad_value");
        args.tasks = tasks;
        const py::gil_scoped_release released;
        vcr1::cpu::group_attention_backward(args, num_threads);
      },
      py::arg("inputs"), py::arg("parts"), py::arg("scale"), py::arg("out"), py::arg("lse"),
      py::arg("grad"), py::arg("grads"), py::arg("scratch"), py::arg("tasks"),
      py::arg("num_threads"));
}

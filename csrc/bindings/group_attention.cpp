// Python bindings of group_attention.
#include <algorithm>

#include "bindings.h"

namespace {

// (rows, heads, dim) of the queries' dtype.
vcr1::HeadsView heads_view(const Tensor& tensor, const vcr1::GroupAttentionInput& in, int64_t rows,
                           int64_t heads, const char* name) {
  const auto [own_rows, own_heads, dim] = tensor.shape<3>(name);
  VCR1_CHECK(tensor.on_cpu(), name, ": expected a CPU tensor");
  VCR1_CHECK(tensor.dtype() == in.dtype, name, ": expected ", vcr1::name_of(in.dtype), ", got ",
             vcr1::name_of(tensor.dtype()));
  VCR1_CHECK(own_rows == rows && own_heads == heads && dim == in.dim, name, ": expected (", rows,
             ", ", heads, ", ", in.dim, "), got (", own_rows, ", ", own_heads, ", ", dim, ")");
  VCR1_CHECK(tensor.numel() == 0 || dim == 1 || tensor.stride(2) == 1, name,
             ": expected stride 1 along the last dimension, got ", tensor.stride(2));
  return {tensor.raw(), tensor.stride(0), tensor.stride(1)};
}

// The blocks of queries that one piece of work takes: as many as fit, of parts that follow one
// another behind the same prefix.
std::vector<vcr1::GroupAttentionBlock> blocks_of(const vcr1::GroupAttentionPart* parts, int64_t n) {
  std::vector<vcr1::GroupAttentionBlock> blocks;
  for (int64_t first = 0, last; first < n; first = last + 1) {
    const auto& [row, end, prefix, prefix_end] = parts[first];
    last = first;
    while (last + 1 < n && prefix_end > prefix && parts[last + 1].row == parts[last].end &&
           parts[last + 1].prefix == prefix && parts[last + 1].prefix_end == prefix_end)
      ++last;
    int64_t part = first;
    for (int64_t at = row; at < parts[last].end; at += vcr1::kGroupAttentionRows) {
      while (parts[part].end <= at) ++part;
      blocks.push_back(
          {at, std::min<int64_t>(vcr1::kGroupAttentionRows, parts[last].end - at), part});
    }
  }
  return blocks;
}

// Memory of the kernel's own precision: fp64 for fp64, else fp32.
void* accumulators(const Tensor& tensor, const vcr1::GroupAttentionInput& in, int64_t numel,
                   const char* name) {
  VCR1_CHECK(tensor.on_cpu() && tensor.numel() >= numel, name, ": expected ", numel,
             " elements on the CPU, got ", tensor.numel());
  if (in.dtype == vcr1::DType::kFloat64) return tensor.dense<double>(name);
  return tensor.dense<float>(name);
}

void* log_sums(const Tensor& lse, const vcr1::GroupAttentionInput& in) {
  const auto [heads, rows] = lse.shape<2>("lse");
  VCR1_CHECK(heads == in.heads && rows == in.rows, "lse: expected (", in.heads, ", ", in.rows,
             "), got (", heads, ", ", rows, ")");
  return accumulators(lse, in, heads * rows, "lse");
}

// Checks that the parts rise and stay within the rows. The result points to `blocks`, which are
// filled from them.
vcr1::GroupAttentionInput attention_input(const Tensor& query, const Tensor& key,
                                          const Tensor& value,
                                          const std::optional<Tensor>& prefix_key,
                                          const std::optional<Tensor>& prefix_value,
                                          const Tensor& parts, double scale, const Tensor& scratch,
                                          int64_t tasks,
                                          std::vector<vcr1::GroupAttentionBlock>& blocks) {
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
  in.query = heads_view(query, in, in.rows, in.heads, "query");
  in.key = heads_view(key, in, in.rows, in.kv_heads, "key");
  in.value = heads_view(value, in, in.rows, in.kv_heads, "value");
  VCR1_CHECK(prefix_key.has_value() == prefix_value.has_value(),
             "prefix_key, prefix_value: expected both or neither");
  if (prefix_key) {
    in.prefix_rows = prefix_key->shape<3>("prefix_key")[0];
    in.prefix_key = heads_view(*prefix_key, in, in.prefix_rows, in.kv_heads, "prefix_key");
    in.prefix_value = heads_view(*prefix_value, in, in.prefix_rows, in.kv_heads, "prefix_value");
  }
  in.scale = scale;
  const auto [count, columns] = parts.shape<2>("parts");
  VCR1_CHECK(parts.on_cpu() && columns == 4, "parts: expected (n, 4) on the CPU, got ", columns,
             " columns");
  in.parts = reinterpret_cast<const vcr1::GroupAttentionPart*>(parts.dense<int64_t>("parts"));
  int64_t at = 0;
  for (int64_t i = 0; i < count; ++i) {
    const auto [row, end, prefix, prefix_end] = in.parts[i];
    VCR1_CHECK(row >= at && end > row && end <= in.rows, "parts: expected rising queries within ",
               in.rows, ", got ", row, " to ", end, " at ", i);
    const int64_t limit = prefix_key ? in.prefix_rows : row;
    VCR1_CHECK(prefix >= 0 && prefix_end >= prefix && prefix_end <= limit,
               "parts: expected a prefix before ", prefix_key ? "its row " : "query ", limit,
               ", got ", prefix, " to ", prefix_end, " at ", i);
    at = end;
  }
  blocks = blocks_of(in.parts, count);
  in.blocks = blocks.data();
  in.num_blocks = static_cast<int64_t>(blocks.size());
  in.scratch = accumulators(
      scratch, in,
      vcr1::group_attention_scratch(in.prefix_rows + in.rows, in.kv_heads, in.dim, tasks),
      "scratch");
  return in;
}

}  // namespace

VCR1_BINDINGS(group_attention, m) {
  m.def("group_attention_scratch", &vcr1::group_attention_scratch, py::arg("rows"),
        py::arg("kv_heads"), py::arg("dim"), py::arg("tasks"));
  m.def(
      "group_attention",
      [](const Tensor& query, const Tensor& key, const Tensor& value,
         const std::optional<Tensor>& prefix_key, const std::optional<Tensor>& prefix_value,
         const Tensor& parts, double scale, const Tensor& out, const Tensor& lse,
         const Tensor& scratch, int num_threads) {
        vcr1::GroupAttentionForward args{};
        std::vector<vcr1::GroupAttentionBlock> blocks;
        args.in = attention_input(query, key, value, prefix_key, prefix_value, parts, scale,
                                  scratch, 0, blocks);
        args.out = heads_view(out, args.in, args.in.rows, args.in.heads, "out");
        args.lse = log_sums(lse, args.in);
        vcr1::launch_cpu("group_attention", out, &vcr1::cpu::group_attention, args, num_threads);
      },
      py::arg("query"), py::arg("key"), py::arg("value"), py::arg("prefix_key"),
      py::arg("prefix_value"), py::arg("parts"), py::arg("scale"), py::arg("out"), py::arg("lse"),
      py::arg("scratch"), py::arg("num_threads"));
  m.def(
      "group_attention_backward",
      [](const Tensor& query, const Tensor& key, const Tensor& value,
         const std::optional<Tensor>& prefix_key, const std::optional<Tensor>& prefix_value,
         const Tensor& parts, double scale, const Tensor& out, const Tensor& lse,
         const Tensor& grad, const Tensor& grad_query, const Tensor& grad_key,
         const Tensor& grad_value, const std::optional<Tensor>& grad_prefix_key,
         const std::optional<Tensor>& grad_prefix_value, const Tensor& scratch, int64_t tasks,
         int num_threads) {
        VCR1_CHECK(tasks > 0 && tasks <= 1024, "tasks: expected 1 to 1024, got ", tasks);
        vcr1::GroupAttentionBackward args{};
        std::vector<vcr1::GroupAttentionBlock> blocks;
        args.in = attention_input(query, key, value, prefix_key, prefix_value, parts, scale,
                                  scratch, tasks, blocks);
        const int64_t rows = args.in.rows, prefix_rows = args.in.prefix_rows;
        const int64_t heads = args.in.heads, kv_heads = args.in.kv_heads;
        args.out = heads_view(out, args.in, rows, heads, "out");
        args.grad = heads_view(grad, args.in, rows, heads, "grad");
        args.lse = log_sums(lse, args.in);
        args.grad_query = heads_view(grad_query, args.in, rows, heads, "grad_query");
        args.grad_key = heads_view(grad_key, args.in, rows, kv_heads, "grad_key");
        args.grad_value = heads_view(grad_value, args.in, rows, kv_heads, "grad_value");
        VCR1_CHECK(grad_prefix_key.has_value() == prefix_key.has_value() &&
                       grad_prefix_value.has_value() == prefix_key.has_value(),
                   "grad_prefix_key, grad_prefix_value: expected both with a prefix, else neither");
        if (prefix_key) {
          args.grad_prefix_key =
              heads_view(*grad_prefix_key, args.in, prefix_rows, kv_heads, "grad_prefix_key");
          args.grad_prefix_value =
              heads_view(*grad_prefix_value, args.in, prefix_rows, kv_heads, "grad_prefix_value");
        }
        args.tasks = tasks;
        vcr1::launch_cpu("group_attention_backward", out, &vcr1::cpu::group_attention_backward,
                         args, num_threads);
      },
      py::arg("query"), py::arg("key"), py::arg("value"), py::arg("prefix_key"),
      py::arg("prefix_value"), py::arg("parts"), py::arg("scale"), py::arg("out"), py::arg("lse"),
      py::arg("grad"), py::arg("grad_query"), py::arg("grad_key"), py::arg("grad_value"),
      py::arg("grad_prefix_key"), py::arg("grad_prefix_value"), py::arg("scratch"),
      py::arg("tasks"), py::arg("num_threads"));
}

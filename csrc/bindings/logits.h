// Logits, labels and temperatures, as gather_logprobs and logits_grpo_loss take them.
#pragma once

#include <cmath>

#include "bindings.h"

namespace vcr1 {

inline GatherLogprobsInput gather_logprobs_input(const Tensor& logits, const Tensor& labels,
                                                 const std::optional<Tensor>& mask,
                                                 const std::optional<Tensor>& row_temperature,
                                                 double temperature) {
  const auto dtype = logits.dtype();
  VCR1_CHECK(dtype == DType::kFloat32 || dtype == DType::kBFloat16 || dtype == DType::kFloat16,
             "logits: expected float32, bfloat16 or float16, got ", name_of(dtype));
  VCR1_CHECK(labels.ndim() == logits.ndim(), "labels: expected ", logits.ndim(),
             " dimensions, got ", labels.ndim());
  GatherLogprobsInput in{};
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

}  // namespace vcr1

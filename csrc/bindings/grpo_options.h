// The options of the GRPO loss, as grpo_loss and logits_grpo_loss take them.
#pragma once

#include <cstring>

#include "bindings.h"

namespace vcr1 {

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

}  // namespace vcr1

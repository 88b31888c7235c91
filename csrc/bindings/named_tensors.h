// Tensors that come as one Python NamedTuple, read by the names of its fields.
#pragma once

#include "bindings.h"

namespace vcr1 {

// The tensor in field `name` of a NamedTuple; nothing for None. The tuple, an argument of the bound
// function, keeps the tensor alive during the call.
inline std::optional<Tensor> named_tensor(const py::object& tuple, const char* name) {
  const py::object field = tuple.attr(name);
  if (field.is_none()) return std::nullopt;
  if (!Tensor::is_tensor(field))
    throw py::type_error(std::string(name) + ": expected a tensor, got " +
                         py::str(py::type::of(field)).cast<std::string>());
  return Tensor::borrow(field);
}

}  // namespace vcr1

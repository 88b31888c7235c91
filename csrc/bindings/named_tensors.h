// Tensors that come as one Python NamedTuple, read by the names of its fields.
#pragma once

#include <unordered_map>

#include "bindings.h"

namespace vcr1 {

// The Python string of a literal. Interned once: making and hashing sixteen names would take a
// fiftieth of a small call. By address, so the same text may be there twice. Needs the GIL.
inline py::handle interned(const char* literal) {
  static auto* const known = new std::unordered_map<const char*, PyObject*>();
  PyObject*& name = (*known)[literal];
  if (name == nullptr) name = PyUnicode_InternFromString(literal);
  if (name == nullptr) throw py::error_already_set();
  return name;
}

// The tensor in field `name` of a NamedTuple; nothing for None. The tuple, an argument of the bound
// function, keeps the tensor alive during the call.
inline std::optional<Tensor> named_tensor(const py::object& tuple, const char* name) {
  const py::object field = py::getattr(tuple, interned(name));
  if (field.is_none()) return std::nullopt;
  if (!Tensor::is_tensor(field))
    throw py::type_error(std::string(name) + ": expected a tensor, got " +
                         py::str(py::type::of(field)).cast<std::string>());
  return Tensor::borrow(field);
}

}  // namespace vcr1

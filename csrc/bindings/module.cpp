// The extension module vcr1_fast._C: all bindings that the files beside this one register.
#include <algorithm>
#include <string_view>

#include "bindings.h"

namespace vcr1 {

std::vector<Binding>& bindings() {
  // Within the function: it exists before the first static RegisterBinding of another file runs.
  static std::vector<Binding> all;
  return all;
}

}  // namespace vcr1

PYBIND11_MODULE(_C, m) {
  m.doc() = "Native kernels of vcr1_fast.";
  auto& all = vcr1::bindings();
  // The linker orders static constructors as it likes, but a class must be bound before a function
  // that takes it, and signatures must not depend on the build: resize_frames < video_patches.
  std::sort(all.begin(), all.end(), [](const vcr1::Binding& a, const vcr1::Binding& b) {
    return std::string_view(a.stem) < std::string_view(b.stem);
  });
  for (const vcr1::Binding& binding : all) binding.bind(m);
}

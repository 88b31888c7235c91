// Python bindings of multiply, which has a kernel on CUDA only.
#include <algorithm>

#include "bindings.h"

using namespace vcr1;

VCR1_BINDINGS(multiply, m) {
  m.def(
      "multiply",
      [](const Tensor& x, const Tensor& factor) {
        VCR1_CHECK(x.on_cuda() && factor.same_device(x),
                   "x and factor: expected tensors on one CUDA device");
        VCR1_CHECK(factor.numel() == 1, "factor: expected one number, got ", factor.numel());
        MultiplyArgs args{};
        args.dtype = x.dtype();
        VCR1_CHECK(args.dtype == DType::kFloat64 || args.dtype == DType::kFloat32 ||
                       args.dtype == DType::kBFloat16 || args.dtype == DType::kFloat16,
                   "x: expected float64, float32, bfloat16 or float16, got ", name_of(args.dtype));
        args.factor_dtype = factor.dtype();
        VCR1_CHECK(args.factor_dtype == DType::kFloat64 || args.factor_dtype == DType::kFloat32,
                   "factor: expected float64 or float32, got ", name_of(args.factor_dtype));
        args.x = x.raw();
        args.factor = factor.raw();
        args.rows = 1;
        if (x.is_contiguous()) {
          args.columns = x.numel();
        } else {
          args.layout = row_layout(x, "x");
          args.columns = x.size(-1);
          args.rows = x.numel() / std::max<int64_t>(args.columns, 1);
        }
        if (x.numel() == 0) return;
        VCR1_LAUNCH_CUDA(multiply, x, args);
      },
      py::arg("x"), py::arg("factor"),
      "x *= factor, one number on the GPU; where it is 1, x is neither read nor written.");
}

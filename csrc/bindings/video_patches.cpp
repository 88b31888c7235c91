// Python bindings of video_patches.
#include "resize_plan.h"

using namespace vcr1;

namespace {

// Patches (N, 1176), dense.
template <typename VideoPatchesArgs>
void set_patches(VideoPatchesArgs& args, const Tensor& frames, const Tensor& out,
                 const std::array<float, 3>& offset, const std::array<float, 3>& scale) {
  const int64_t height = args.resize.vertical.n_out, width = args.resize.horizontal.n_out;
  VCR1_CHECK(height % 28 == 0 && width % 28 == 0, "size: expected multiples of 28, got ", height,
             " x ", width);
  const int64_t n = (args.resize.n_frames + 1) / 2 * (height / 14) * (width / 14);
  const auto [rows, values] = out.shape<2>("out");
  VCR1_CHECK(rows == n && values == 1176 && out.is_contiguous(), "out: expected contiguous ", n,
             " x 1176, got ", rows, " x ", values);
  VCR1_CHECK(frames.same_device(out), "out: expected memory beside the frames");
  args.out = out.raw();
  args.out_dtype = out.dtype();
  VCR1_CHECK(args.out_dtype == DType::kFloat32 || args.out_dtype == DType::kBFloat16 ||
                 args.out_dtype == DType::kFloat16,
             "out: expected float32, bfloat16 or float16, got ", name_of(args.out_dtype));
  for (int c = 0; c < 3; ++c) {
    args.offset[c] = offset[c];
    args.scale[c] = scale[c];
  }
}

}  // namespace

VCR1_BINDINGS(video_patches, m) {
  using Channels = std::array<float, 3>;
  constexpr const char* kDoc =
      "frames (T, H, W, 3) to out (N, 1176), normalised as (x - offset) / scale.";
  m.def(
      "video_patches",
      [](const Tensor& frames, const Tensor& out, const ResizePlan& plan, Channels offset,
         Channels scale, const Tensor& scratch, int num_threads) {
        cpu::VideoPatchesArgs args{};
        args.resize = plan.args(frames, scratch, num_threads);
        set_patches(args, frames, out, offset, scale);
        launch_cpu("video_patches", frames, &cpu::video_patches, args, num_threads);
      },
      py::arg("frames"), py::arg("out"), py::arg("plan"), py::arg("offset"), py::arg("scale"),
      py::arg("scratch"), py::arg("num_threads"), kDoc);
  m.def(
      "video_patches",
      [](const Tensor& frames, const Tensor& out, const CudaResizePlan& plan, Channels offset,
         Channels scale) {
        cuda::VideoPatchesArgs args{};
        args.resize = plan.args(frames);
        set_patches(args, frames, out, offset, scale);
        VCR1_LAUNCH_CUDA(video_patches, frames, args);
      },
      py::arg("frames"), py::arg("out"), py::arg("plan"), py::arg("offset"), py::arg("scale"),
      kDoc);
}

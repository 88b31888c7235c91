// Python bindings of video_patches.
#include "resize_plan.h"

using namespace vcr1;

namespace {

#define VCR1_IS_SHAPE(p, m, t) (layout.patch == p && layout.merge == m && layout.temporal == t) ||
#define VCR1_SHAPE_NAME(p, m, t) " (" #p ", " #m ", " #t ")"

PatchLayout patch_layout(int patch, int merge, int temporal, const std::array<float, 3>& offset,
                         const std::array<float, 3>& scale) {
  PatchLayout layout{patch, merge, temporal, {}, {}};
  VCR1_CHECK(VCR1_PATCH_SHAPES(VCR1_IS_SHAPE) false, "layout: no kernel is compiled for (patch, ",
             "merge, temporal) = (", patch, ", ", merge, ", ", temporal, "), only for",
             VCR1_PATCH_SHAPES(VCR1_SHAPE_NAME), "; VCR1_BACKEND=reference takes any");
  for (int c = 0; c < 3; ++c) {
    layout.offset[c] = offset[c];
    layout.scale[c] = scale[c];
  }
  return layout;
}

// Sets patches (N, 3 * temporal * patch * patch), dense.
template <typename VideoPatchesArgs>
void set_patches(VideoPatchesArgs& args, const Tensor& frames, const Tensor& out,
                 const PatchLayout& layout) {
  const int64_t height = args.resize.vertical.n_out, width = args.resize.horizontal.n_out;
  const int64_t patch = layout.patch, temporal = layout.temporal, token = patch * layout.merge;
  VCR1_CHECK(height % token == 0 && width % token == 0, "size: expected multiples of ", token,
             ", got ", height, " x ", width);
  const int64_t groups = (args.resize.n_frames + temporal - 1) / temporal;
  const int64_t n = groups * (height / patch) * (width / patch);
  const int64_t expected = 3 * temporal * patch * patch;
  const auto [rows, values] = out.shape<2>("out");
  VCR1_CHECK(rows == n && values == expected && out.is_contiguous(), "out: expected contiguous ", n,
             " x ", expected, ", got ", rows, " x ", values);
  VCR1_CHECK(frames.same_device(out), "out: expected memory beside the frames");
  args.out = out.raw();
  args.out_dtype = out.dtype();
  VCR1_CHECK(args.out_dtype == DType::kFloat32 || args.out_dtype == DType::kBFloat16 ||
                 args.out_dtype == DType::kFloat16,
             "out: expected float32, bfloat16 or float16, got ", name_of(args.out_dtype));
  args.patches = layout;
}

}  // namespace

VCR1_BINDINGS(video_patches, m) {
  using Channels = std::array<float, 3>;
  constexpr const char* kDoc =
      "frames (T, H, W, 3) to out (N, 3 * temporal * patch * patch), normalised as (x - offset) / "
      "scale.";
  m.def(
      "video_patches",
      [](const Tensor& frames, const Tensor& out, const ResizePlan& plan, int patch, int merge,
         int temporal, const Channels& offset, const Channels& scale, const Tensor& scratch,
         int num_threads) {
        cpu::VideoPatchesArgs args{};
        args.resize = plan.args(frames, scratch, num_threads);
        set_patches(args, frames, out, patch_layout(patch, merge, temporal, offset, scale));
        launch_cpu("video_patches", frames, &cpu::video_patches, args, num_threads);
      },
      py::arg("frames"), py::arg("out"), py::arg("plan"), py::arg("patch"), py::arg("merge"),
      py::arg("temporal"), py::arg("offset"), py::arg("scale"), py::arg("scratch"),
      py::arg("num_threads"), kDoc);
  m.def(
      "video_patches",
      [](const Tensor& frames, const Tensor& out, const CudaResizePlan& plan, int patch, int merge,
         int temporal, const Channels& offset, const Channels& scale) {
        cuda::VideoPatchesArgs args{};
        args.resize = plan.args(frames);
        set_patches(args, frames, out, patch_layout(patch, merge, temporal, offset, scale));
        // A tile that cut a patch in two would leave values unwritten.
        VCR1_CHECK(!plan.is_matrix() || (args.resize.vertical.tile % patch == 0 &&
                                         args.resize.horizontal.tile % patch == 0),
                   "plan: its tiles of ", args.resize.vertical.tile, " x ",
                   args.resize.horizontal.tile, " are no whole patches of ", patch);
        VCR1_LAUNCH_CUDA(video_patches, frames, args);
      },
      py::arg("frames"), py::arg("out"), py::arg("plan"), py::arg("patch"), py::arg("merge"),
      py::arg("temporal"), py::arg("offset"), py::arg("scale"), kDoc);
}

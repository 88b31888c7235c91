// Python bindings of resize_frames, and of the plans of a resize.
#include "resize_plan.h"

using namespace vcr1;

namespace {

// Resized frames (T, h, w, 3) of any strides: float32 where the fp32 passes are not rounded.
template <typename ResizeFramesArgs>
void set_resized(ResizeFramesArgs& args, const Tensor& frames, const Tensor& out, bool is_float) {
  const auto [n, height, width, channels] = out.shape<4>("out");
  const auto& resize = args.resize;
  VCR1_CHECK(n == resize.n_frames && height == resize.vertical.n_out &&
                 width == resize.horizontal.n_out && channels == 3,
             "out: expected ", resize.n_frames, " x ", resize.vertical.n_out, " x ",
             resize.horizontal.n_out, " x 3, got ", n, " x ", height, " x ", width, " x ",
             channels);
  VCR1_CHECK(frames.same_device(out), "out: expected memory beside the frames");
  args.out = is_float ? static_cast<void*>(out.data<float>("out"))
                      : static_cast<void*>(out.data<uint8_t>("out"));
  args.out_frame_stride = out.stride(0);
  args.out_row_stride = out.stride(1);
  args.out_column_stride = out.stride(2);
  args.out_channel_stride = out.stride(3);
}

}  // namespace

VCR1_BINDINGS(resize_frames, m) {
  py::class_<AxisTables>(m, "ResizeAxis", "Filter tables of one axis.")
      .def(py::init([](int n_in, int n_out, int bits, py::object first, py::object weights,
                       int tile, int groups, int steps, int span, int reach) {
             for (const py::object& tensor : {first, weights})
               VCR1_CHECK(Tensor::is_tensor(tensor), "first and weights: expected tensors");
             return AxisTables{n_in, n_out, bits, first, weights, tile, groups, steps, span, reach};
           }),
           py::kw_only(), py::arg("n_in"), py::arg("n_out"), py::arg("bits"), py::arg("first"),
           py::arg("weights"), py::arg("tile") = 0, py::arg("groups") = 0, py::arg("steps") = 0,
           py::arg("span") = 0, py::arg("reach") = 0);
  py::class_<ResizePlan>(m, "ResizePlan", "Tables of one resize, for any number of frames.")
      .def(py::init<const std::string&, const AxisTables&, const AxisTables&>(), py::kw_only(),
           py::arg("mode"), py::arg("vertical"), py::arg("horizontal"))
      .def_property_readonly("scratch_bytes", &ResizePlan::scratch_bytes,
                             "Scratch memory that one thread needs.");
  py::class_<CudaResizePlan>(m, "CudaResizePlan", "Tables of one resize on one device.")
      .def(py::init<const std::string&, const AxisTables&, const AxisTables&>(), py::kw_only(),
           py::arg("method"), py::arg("vertical"), py::arg("horizontal"))
      .def_property_readonly("shared_bytes", &CudaResizePlan::shared_bytes,
                             "Shared memory that a block needs, without its look-up table.");
  m.def(
      "resize_frames",
      [](const Tensor& frames, const Tensor& out, const ResizePlan& plan, const Tensor& scratch,
         int num_threads) {
        cpu::ResizeFramesArgs args{};
        args.resize = plan.args(frames, scratch, num_threads);
        set_resized(args, frames, out, args.resize.mode == cpu::ResizeMode::kFloat);
        launch_cpu("resize_frames", frames, &cpu::resize_frames, args, num_threads);
      },
      py::arg("frames"), py::arg("out"), py::arg("plan"), py::arg("scratch"),
      py::arg("num_threads"), "frames (T, H, W, 3) to out (T, h, w, 3), both with any strides.");
  m.def(
      "resize_frames",
      [](const Tensor& frames, const Tensor& out, const CudaResizePlan& plan) {
        cuda::ResizeFramesArgs args{};
        args.resize = plan.args(frames);
        set_resized(args, frames, out, args.resize.method == cuda::ResizeMethod::kFloat);
        VCR1_LAUNCH_CUDA(resize_frames, frames, args);
      },
      py::arg("frames"), py::arg("out"), py::arg("plan"),
      "frames (T, H, W, 3) to out (T, h, w, 3), both with any strides.");
}

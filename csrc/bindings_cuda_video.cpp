// Python bindings of the video ops on CUDA; bindings.cpp makes the module.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <map>
#include <string>

#include "kernels.h"
#include "tensor.h"

namespace py = pybind11;
using vcr1::Tensor;
using vcr1::cuda::ResizeMethod;

namespace {

// The tables of one resize on one device, which it keeps alive.
class CudaResizePlan {
 public:
  using Objects = std::array<py::object, 2>;
  using Numbers = std::array<int, 6>;  // tile, bits, groups, steps or taps, span, reach

  CudaResizePlan(const std::string& method, std::array<std::array<int, 2>, 2> sizes, Objects first,
                 Objects weights, std::array<Numbers, 2> numbers)
      : first_(first), weights_(weights) {
    const std::map<std::string, ResizeMethod> methods = {
        {"copy", ResizeMethod::kCopy},         {"matrix16", ResizeMethod::kMatrix16},
        {"matrix22", ResizeMethod::kMatrix22}, {"int", ResizeMethod::kInt},
        {"float", ResizeMethod::kFloat},       {"float_rounded", ResizeMethod::kFloatRounded}};
    const auto found = methods.find(method);
    VCR1_CHECK(found != methods.end(), "method: unknown ", method);
    args_.method = found->second;
    set_axis(args_.vertical, 0, sizes[0], numbers[0]);
    set_axis(args_.horizontal, 1, sizes[1], numbers[1]);
    if (is_matrix()) {
      VCR1_CHECK(args_.horizontal.groups <= 4, "tile: expected at most 64 columns, got ",
                 args_.horizontal.tile);
      vcr1::cuda::plan_shared(args_);
    }
  }

  int shared_bytes() const { return args_.shared_bytes; }

  vcr1::cuda::ResizeArgs args(const Tensor& frames) const {
    vcr1::cuda::ResizeArgs out = args_;
    const auto [n, height, width, channels] = frames.shape<4>("frames");
    VCR1_CHECK(frames.on_cuda() && Tensor::borrow(first_[0]).same_device(frames),
               "frames and tables: expected one CUDA device");
    VCR1_CHECK(n > 0, "frames: there are none");
    VCR1_CHECK(height == args_.vertical.n_in && width == args_.horizontal.n_in && channels == 3,
               "frames: expected ", args_.vertical.n_in, " x ", args_.horizontal.n_in, " x 3, got ",
               height, " x ", width, " x ", channels);
    out.frames = frames.data<uint8_t>("frames");
    out.n_frames = n;
    out.frame_stride = frames.stride(0);
    out.row_stride = frames.stride(1);
    out.column_stride = frames.stride(2);
    out.channel_stride = frames.stride(3);
    return out;
  }

 private:
  bool is_matrix() const {
    return args_.method == ResizeMethod::kMatrix16 || args_.method == ResizeMethod::kMatrix22;
  }

  void set_axis(vcr1::cuda::ResizeAxis& axis, int index, std::array<int, 2> size,
                const Numbers& numbers) {
    axis.n_in = size[0];
    axis.n_out = size[1];
    axis.tile = numbers[0];
    axis.bits = numbers[1];
    axis.groups = numbers[2];
    axis.taps = axis.steps = numbers[3];
    axis.span = numbers[4];
    axis.reach = numbers[5];
    const Tensor first = Tensor::borrow(first_[index]), weights = Tensor::borrow(weights_[index]);
    VCR1_CHECK(first.same_device(weights), "tables: expected one device");
    axis.first = first.dense<int32_t>("first");
    if (is_matrix()) {
      const int64_t tiles = (axis.n_out + axis.tile - 1) / axis.tile;
      const int planes = args_.method == ResizeMethod::kMatrix16 ? 2 : 3;
      axis.weights = weights.dense<uint8_t>("weights");
      VCR1_CHECK(axis.tile > 0 && axis.groups == (axis.tile + 15) / 16 &&
                     first.numel() == tiles * (2 + 2 * axis.groups) &&
                     weights.numel() == tiles * axis.groups * axis.steps * planes * 512,
                 "tables: ", first.numel(), " and ", weights.numel(), " values do not fit ",
                 axis.n_out, " outputs in tiles of ", axis.tile);
      return;
    }
    if (args_.method == ResizeMethod::kInt) {
      axis.weights = weights.dense<int32_t>("weights");
    } else if (args_.method != ResizeMethod::kCopy) {
      axis.weights = weights.dense<float>("weights");
    } else {
      VCR1_CHECK(axis.n_in == axis.n_out, "copy: sizes differ, ", axis.n_in, " and ", axis.n_out);
    }
    VCR1_CHECK(first.numel() == axis.n_out &&
                   weights.numel() == static_cast<int64_t>(axis.n_out) * axis.taps,
               "tables: expected ", axis.n_out, " rows of ", axis.taps, ", got ", first.numel(),
               " and ", weights.numel(), " values");
  }

  vcr1::cuda::ResizeArgs args_{};
  Objects first_, weights_;
};

void resize_frames(const Tensor& frames, const Tensor& out, const CudaResizePlan& plan) {
  vcr1::cuda::ResizeFramesArgs args{};
  args.resize = plan.args(frames);
  const auto [n, height, width, channels] = out.shape<4>("out");
  VCR1_CHECK(out.same_device(frames) && n == args.resize.n_frames &&
                 height == args.resize.vertical.n_out && width == args.resize.horizontal.n_out &&
                 channels == 3,
             "out: expected memory beside the frames of ", args.resize.n_frames, " x ",
             args.resize.vertical.n_out, " x ", args.resize.horizontal.n_out, " x 3, got ", n,
             " x ", height, " x ", width, " x ", channels);
  args.out = args.resize.method == ResizeMethod::kFloat
                 ? static_cast<void*>(out.data<float>("out"))
                 : static_cast<void*>(out.data<uint8_t>("out"));
  args.out_frame_stride = out.stride(0);
  args.out_row_stride = out.stride(1);
  args.out_column_stride = out.stride(2);
  args.out_channel_stride = out.stride(3);
  const vcr1::DeviceGuard guard("resize_frames", frames.device_index());
  vcr1::cuda::resize_frames(args, frames.stream());
}

void video_patches(const Tensor& frames, const Tensor& out, const CudaResizePlan& plan,
                   std::array<float, 3> offset, std::array<float, 3> scale) {
  vcr1::cuda::VideoPatchesArgs args{};
  args.resize = plan.args(frames);
  const int height = args.resize.vertical.n_out, width = args.resize.horizontal.n_out;
  VCR1_CHECK(height % 28 == 0 && width % 28 == 0, "size: expected multiples of 28, got ", height,
             " x ", width);
  const int64_t n = (args.resize.n_frames + 1) / 2 * (height / 14) * (width / 14);
  const auto [rows, values] = out.shape<2>("out");
  VCR1_CHECK(out.same_device(frames) && rows == n && values == 1176 && out.is_contiguous(),
             "out: expected contiguous memory beside the frames of ", n, " x 1176, got ", rows,
             " x ", values);
  args.out = out.raw();
  args.out_dtype = out.dtype();
  VCR1_CHECK(args.out_dtype == vcr1::DType::kFloat32 || args.out_dtype == vcr1::DType::kBFloat16 ||
                 args.out_dtype == vcr1::DType::kFloat16,
             "out: expected float32, bfloat16 or float16, got ", vcr1::name_of(args.out_dtype));
  for (int c = 0; c < 3; ++c) {
    args.offset[c] = offset[c];
    args.scale[c] = scale[c];
  }
  const vcr1::DeviceGuard guard("video_patches", frames.device_index());
  vcr1::cuda::video_patches(args, frames.stream());
}

// Spans (n, 2) or boxes (n, 4), and the memory for their results.
void box_iou(const Tensor& a, const Tensor& b, const Tensor& out, const std::string& kind,
             bool pairwise, bool torchvision) {
  using vcr1::IouKind;
  const std::map<std::string, IouKind> kinds = {{"span", IouKind::kSpan},
                                                {"iou", IouKind::kIou},
                                                {"giou", IouKind::kGiou},
                                                {"diou", IouKind::kDiou},
                                                {"ciou", IouKind::kCiou}};
  const auto found = kinds.find(kind);
  VCR1_CHECK(found != kinds.end(), "kind: unknown ", kind);
  const auto [n, width] = a.shape<2>("a");
  const auto [m, width_b] = b.shape<2>("b");
  const int64_t expected = found->second == IouKind::kSpan ? 2 : 4;
  VCR1_CHECK(width == expected && width_b == expected, "a and b: expected ", expected,
             " columns, got ", width, " and ", width_b);
  VCR1_CHECK(pairwise || n == m, "a and b: expected as many boxes, got ", n, " and ", m);
  VCR1_CHECK(n > 0 && m > 0 && out.numel() == (pairwise ? n * m : n), "out: got ", out.numel(),
             " elements for ", n, " and ", m, " boxes");
  VCR1_CHECK(a.on_cuda() && b.same_device(a) && out.same_device(a),
             "a, b, out: expected one CUDA device");
  vcr1::BoxIouArgs args{
      a.dtype(), found->second, pairwise, torchvision, nullptr, nullptr, nullptr, n, m};
  if (args.dtype == vcr1::DType::kFloat64) {
    args.a = a.dense<double>("a");
    args.b = b.dense<double>("b");
    args.out = out.dense<double>("out");
  } else {
    args.a = a.dense<float>("a");
    args.b = b.dense<float>("b");
    args.out = out.dense<float>("out");
  }
  const vcr1::DeviceGuard guard("box_iou", a.device_index());
  vcr1::cuda::box_iou(args, a.stream());
}

void track_iou(const Tensor& pred, const Tensor& target, const Tensor& lengths, const Tensor& out) {
  const auto [batch, steps, four] = pred.shape<3>("pred");
  VCR1_CHECK(four == 4 && target.numel() == pred.numel() && lengths.numel() == batch &&
                 out.numel() == batch && batch > 0,
             "pred: expected (B, L, 4), got ", batch, " x ", steps, " x ", four,
             " beside a target of ", target.numel(), " values");
  VCR1_CHECK(pred.on_cuda() && target.same_device(pred) && lengths.same_device(pred) &&
                 out.same_device(pred),
             "pred, target, lengths, out: expected one CUDA device");
  vcr1::TrackIouArgs args{};
  args.dtype = pred.dtype();
  args.lengths = lengths.dense<int64_t>("lengths");
  args.batch = batch;
  args.steps = steps;
  if (args.dtype == vcr1::DType::kFloat64) {
    args.pred = pred.dense<double>("pred");
    args.target = target.dense<double>("target");
    args.out = out.dense<double>("out");
  } else {
    args.pred = pred.dense<float>("pred");
    args.target = target.dense<float>("target");
    args.out = out.dense<float>("out");
  }
  const vcr1::DeviceGuard guard("track_iou", pred.device_index());
  vcr1::cuda::track_iou(args, pred.stream());
}

void interval_set_iou(const Tensor& pred, const Tensor& pred_offsets, const Tensor& target,
                      const Tensor& target_offsets, double empty, const Tensor& out) {
  vcr1::IntervalSetIouArgs args{};
  args.n = out.numel();
  VCR1_CHECK(
      args.n > 0 && pred_offsets.numel() == args.n + 1 && target_offsets.numel() == args.n + 1,
      "offsets: expected ", args.n + 1, " values, got ", pred_offsets.numel(), " and ",
      target_offsets.numel());
  for (const Tensor* tensor : {&pred_offsets, &target, &target_offsets, &out})
    VCR1_CHECK(pred.on_cuda() && tensor->same_device(pred), "expected one CUDA device");
  args.pred = pred.dense<double>("pred");
  args.target = target.dense<double>("target");
  args.pred_offsets = pred_offsets.dense<int64_t>("pred_offsets");
  args.target_offsets = target_offsets.dense<int64_t>("target_offsets");
  args.out = out.dense<double>("out");
  args.empty = empty;
  args.p = pred.numel() / 2;
  args.q = target.numel() / 2;
  const vcr1::DeviceGuard guard("interval_set_iou", pred.device_index());
  vcr1::cuda::interval_set_iou(args, pred.stream());
}

}  // namespace

void bind_cuda_iou(py::module_& m) {
  m.def("box_iou_cuda", &box_iou, py::arg("a"), py::arg("b"), py::arg("out"), py::arg("kind"),
        py::arg("pairwise"), py::arg("torchvision"), "Rows (N, 4) and (M, 4) to out.");
  m.def("track_iou_cuda", &track_iou, py::arg("pred"), py::arg("target"), py::arg("lengths"),
        py::arg("out"), "Mean IoU of tracks (B, L, 4) to out (B,).");
  m.def("interval_set_iou_cuda", &interval_set_iou, py::arg("pred"), py::arg("pred_offsets"),
        py::arg("target"), py::arg("target_offsets"), py::arg("empty"), py::arg("out"),
        "Sets of float64 spans, merged in place, to out (N,).");
}

void bind_cuda_resize(py::module_& m) {
  py::class_<CudaResizePlan>(m, "CudaResizePlan", "Tables of one resize on one device.")
      .def(py::init<const std::string&, std::array<std::array<int, 2>, 2>, CudaResizePlan::Objects,
                    CudaResizePlan::Objects, std::array<CudaResizePlan::Numbers, 2>>(),
           py::arg("method"), py::arg("sizes"), py::arg("first"), py::arg("weights"),
           py::arg("numbers"))
      .def_property_readonly("shared_bytes", &CudaResizePlan::shared_bytes,
                             "Shared memory that a block needs, look-up table not counted.");
  m.def("resize_frames_cuda", &resize_frames, py::arg("frames"), py::arg("out"), py::arg("plan"),
        "frames (T, H, W, 3) to out (T, h, w, 3), both with any strides.");
  m.def("video_patches_cuda", &video_patches, py::arg("frames"), py::arg("out"), py::arg("plan"),
        py::arg("offset"), py::arg("scale"),
        "frames (T, H, W, 3) to out (N, 1176), normalised as (x - offset) / scale.");
}

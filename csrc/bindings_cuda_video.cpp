// Python bindings of the video ops on CUDA; bindings.cpp makes the module.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <map>
#include <string>

#include "bindings_shared.h"

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
    VCR1_CHECK(frames.on_cuda() && Tensor::borrow(first_[0]).same_device(frames),
               "frames and tables: expected one CUDA device");
    vcr1::set_frames(out, frames);
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
  VCR1_CHECK(out.same_device(frames), "out: expected memory beside the frames");
  vcr1::set_resized(args, out, args.resize.method == ResizeMethod::kFloat);
  const vcr1::DeviceGuard guard("resize_frames", frames.device_index());
  vcr1::cuda::resize_frames(args, frames.stream());
}

void video_patches(const Tensor& frames, const Tensor& out, const CudaResizePlan& plan,
                   std::array<float, 3> offset, std::array<float, 3> scale) {
  vcr1::cuda::VideoPatchesArgs args{};
  args.resize = plan.args(frames);
  VCR1_CHECK(out.same_device(frames), "out: expected memory beside the frames");
  vcr1::set_patches(args, out);
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
  const vcr1::IouKind of = vcr1::iou_kind(kind);
  const auto [n, width] = a.shape<2>("a");
  const auto [m, width_b] = b.shape<2>("b");
  const int64_t expected = of == vcr1::IouKind::kSpan ? 2 : 4;
  VCR1_CHECK(width == expected && width_b == expected, "a and b: expected ", expected,
             " columns, got ", width, " and ", width_b);
  VCR1_CHECK(n > 0 && m > 0, "a and b: expected boxes, got ", n, " and ", m);
  VCR1_CHECK(a.on_cuda() && b.same_device(a) && out.same_device(a),
             "a, b, out: expected one CUDA device");
  auto args = vcr1::box_iou_args(a, b, out, n, m, pairwise);
  args.kind = of;
  args.torchvision = torchvision;
  const vcr1::DeviceGuard guard("box_iou", a.device_index());
  vcr1::cuda::box_iou(args, a.stream());
}

void track_iou(const Tensor& pred, const Tensor& target, const Tensor& lengths, const Tensor& out) {
  VCR1_CHECK(pred.on_cuda() && target.same_device(pred) && lengths.same_device(pred) &&
                 out.same_device(pred),
             "pred, target, lengths, out: expected one CUDA device");
  const auto args = vcr1::track_iou_args(pred, target, lengths, out);
  VCR1_CHECK(args.batch > 0, "pred: there are no tracks");
  const vcr1::DeviceGuard guard("track_iou", pred.device_index());
  vcr1::cuda::track_iou(args, pred.stream());
}

void interval_set_iou(const Tensor& pred, const Tensor& pred_offsets, const Tensor& target,
                      const Tensor& target_offsets, double empty, const Tensor& out) {
  for (const Tensor* tensor : {&pred_offsets, &target, &target_offsets, &out})
    VCR1_CHECK(pred.on_cuda() && tensor->same_device(pred), "expected one CUDA device");
  const auto args =
      vcr1::interval_set_iou_args(pred, pred_offsets, target, target_offsets, empty, out);
  VCR1_CHECK(args.n > 0, "out: there are no sets");
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

// Python bindings of the video ops; bindings.cpp makes the module.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <map>
#include <string>
#include <vector>

#include "bindings_shared.h"
#include "cpu/resize_gather_tables.h"

namespace py = pybind11;
using vcr1::Tensor;

namespace {

// The tables of one resize, and the plan of its scratch memory: made once per pair of sizes.
class ResizePlan {
 public:
  // mode: "copy", "int16", "int22", "float" or "float_rounded"; tables as ResizeAxis describes.
  ResizePlan(const std::string& mode, std::array<int64_t, 2> size_in,
             std::array<int64_t, 2> size_out, std::array<Tensor, 2> first,
             std::array<Tensor, 2> weights, std::array<int, 2> bits) {
    using vcr1::cpu::ResizeMode;
    const std::map<std::string, ResizeMode> modes = {{"copy", ResizeMode::kCopy},
                                                     {"int16", ResizeMode::kInt16},
                                                     {"int22", ResizeMode::kInt22},
                                                     {"float", ResizeMode::kFloat},
                                                     {"float_rounded", ResizeMode::kFloatRounded}};
    const auto found = modes.find(mode);
    VCR1_CHECK(found != modes.end(), "mode: unknown ", mode);
    args_.mode = found->second;
    set_axis(args_.vertical, 0, size_in[0], size_out[0], first[0], weights[0], bits[0]);
    set_axis(args_.horizontal, 1, size_in[1], size_out[1], first[1], weights[1], bits[1]);
    if (args_.mode == ResizeMode::kInt16 || args_.mode == ResizeMode::kInt22)
      args_.gather =
          gather_.build(args_.horizontal, args_.vertical, args_.mode == ResizeMode::kInt22);
    vcr1::cpu::plan_scratch(args_);
  }

  int64_t scratch_bytes() const { return args_.layout.total; }

  vcr1::cpu::ResizeArgs args(const Tensor& frames, const Tensor& scratch, int num_threads) const {
    vcr1::cpu::ResizeArgs out = args_;
    VCR1_CHECK(frames.on_cpu() && scratch.on_cpu(), "frames and scratch: expected CPU tensors");
    vcr1::set_frames(out, frames);
    VCR1_CHECK(num_threads > 0, "num_threads: expected at least 1, got ", num_threads);
    VCR1_CHECK(scratch.numel() >= num_threads * scratch_bytes(), "scratch: expected ",
               num_threads * scratch_bytes(), " bytes, got ", scratch.numel());
    out.scratch = scratch.dense<uint8_t>("scratch");
    return out;
  }

 private:
  void set_axis(vcr1::cpu::ResizeAxis& axis, int index, int64_t n_in, int64_t n_out,
                const Tensor& first, const Tensor& weights, int bits) {
    using vcr1::cpu::ResizeMode;
    axis.n_in = n_in;
    axis.n_out = n_out;
    axis.bits = bits;
    if (args_.mode == ResizeMode::kCopy) {
      VCR1_CHECK(n_in == n_out, "copy: sizes differ, ", n_in, " and ", n_out);
      return;
    }
    const bool is_int = args_.mode == ResizeMode::kInt16 || args_.mode == ResizeMode::kInt22;
    const int64_t parts = args_.mode == ResizeMode::kInt22 ? 2 : 1;
    VCR1_CHECK(first.on_cpu() && weights.on_cpu(), "tables: expected CPU tensors");
    const auto [rows, columns] = weights.shape<2>("weights");
    VCR1_CHECK(rows == n_out && first.numel() == n_out, "tables: expected ", n_out, " rows, got ",
               rows, " and ", first.numel());
    axis.taps = is_int ? columns / (2 * parts) : columns;
    const int32_t* begin = first.dense<int32_t>("first");
    first_[index].assign(begin, begin + n_out);
    const int64_t lines = is_int ? (n_in + 1) / 2 : n_in;
    for (int64_t i = 0; i < n_out; ++i)
      VCR1_CHECK(begin[i] >= 0 && begin[i] < lines && (i == 0 || begin[i] >= begin[i - 1]),
                 "first: expected rising values below ", lines, ", got ", begin[i], " at ", i);
    const auto* bytes =
        static_cast<const char*>(is_int ? static_cast<void*>(weights.dense<int16_t>("weights"))
                                        : static_cast<void*>(weights.dense<float>("weights")));
    weights_[index].assign(bytes, bytes + weights.numel() * (is_int ? 2 : 4));
    axis.first = first_[index].data();
    axis.weights = weights_[index].data();
  }

  vcr1::cpu::ResizeArgs args_{};
  std::array<std::vector<int32_t>, 2> first_;
  std::array<std::vector<char>, 2> weights_;
  vcr1::cpu::GatherMemory gather_;
};

}  // namespace

void bind_resize(py::module_& m) {
  // Not copyable or movable from Python: args_ points into the vectors.
  py::class_<ResizePlan>(m, "ResizePlan", "Tables of one resize, for any number of frames.")
      .def(py::init<const std::string&, std::array<int64_t, 2>, std::array<int64_t, 2>,
                    std::array<Tensor, 2>, std::array<Tensor, 2>, std::array<int, 2>>(),
           py::arg("mode"), py::arg("size_in"), py::arg("size_out"), py::arg("first"),
           py::arg("weights"), py::arg("bits"))
      .def_property_readonly("scratch_bytes", &ResizePlan::scratch_bytes,
                             "Scratch memory that one thread needs.");
  m.def(
      "resize_frames",
      [](const Tensor& frames, const Tensor& out, const ResizePlan& plan, const Tensor& scratch,
         int num_threads) {
        vcr1::cpu::ResizeFramesArgs args{};
        args.resize = plan.args(frames, scratch, num_threads);
        VCR1_CHECK(out.on_cpu(), "out: expected a CPU tensor");
        vcr1::set_resized(args, out, args.resize.mode == vcr1::cpu::ResizeMode::kFloat);
        py::gil_scoped_release release;
        vcr1::cpu::resize_frames(args, num_threads);
      },
      py::arg("frames"), py::arg("out"), py::arg("plan"), py::arg("scratch"),
      py::arg("num_threads"), "frames (T, H, W, 3) to out (T, h, w, 3), both with any strides.");
  m.def(
      "video_patches",
      [](const Tensor& frames, const Tensor& out, const ResizePlan& plan, const Tensor& scale,
         const Tensor& scratch, int num_threads) {
        vcr1::cpu::VideoPatchesArgs args{};
        args.resize = plan.args(frames, scratch, num_threads);
        VCR1_CHECK(out.on_cpu(), "out: expected a CPU tensor");
        vcr1::set_patches(args, out);
        VCR1_CHECK(scale.on_cpu(), "scale: expected a CPU tensor");
        VCR1_CHECK(scale.numel() == 6, "scale: expected (2, 3), got ", scale.numel(), " values");
        const float* values_of = scale.dense<float>("scale");
        for (int c = 0; c < 3; ++c) {
          args.offset[c] = values_of[c];
          args.scale[c] = values_of[3 + c];
        }
        py::gil_scoped_release release;
        vcr1::cpu::video_patches(args, num_threads);
      },
      py::arg("frames"), py::arg("out"), py::arg("plan"), py::arg("scale"), py::arg("scratch"),
      py::arg("num_threads"),
      "frames (T, H, W, 3) to out (N, 1176), normalised as (x - scale[0]) / scale[1].");
}

void bind_iou(py::module_& m) {
  m.def(
      "box_iou",
      [](const Tensor& a, const Tensor& b, const Tensor& out, const std::string& kind,
         bool pairwise, bool torchvision, int num_threads) {
        VCR1_CHECK(a.on_cpu() && b.on_cpu() && out.on_cpu(), "a, b, out: expected CPU tensors");
        const vcr1::IouKind of = vcr1::iou_kind(kind);
        const auto shape_a = a.shape<2>("a"), shape_b = b.shape<2>("b");
        const int boxes =
            pairwise || of == vcr1::IouKind::kCiou ? 1 : 0;  // the dimension that counts them
        const int64_t expected = of == vcr1::IouKind::kSpan   ? 2
                                 : of == vcr1::IouKind::kCiou ? 5
                                                              : 4;
        VCR1_CHECK(shape_a[1 - boxes] == expected && shape_b[1 - boxes] == expected,
                   "a and b: expected ", expected, " numbers a box, got ", shape_a[1 - boxes],
                   " and ", shape_b[1 - boxes]);
        auto args = vcr1::box_iou_args(a, b, out, shape_a[boxes], shape_b[boxes], pairwise);
        args.kind = of;
        args.torchvision = torchvision;
        py::gil_scoped_release release;
        vcr1::cpu::box_iou(args, num_threads);
      },
      py::arg("a"), py::arg("b"), py::arg("out"), py::arg("kind"), py::arg("pairwise"),
      py::arg("torchvision"), py::arg("num_threads"),
      "Planes (4, N) and (4, M) to out, or rows (N, 4) of pairs to compare once.");
  m.def(
      "track_iou",
      [](const Tensor& pred, const Tensor& target, const Tensor& lengths, const Tensor& out,
         int num_threads) {
        VCR1_CHECK(pred.on_cpu() && target.on_cpu() && lengths.on_cpu() && out.on_cpu(),
                   "expected CPU tensors");
        const auto args = vcr1::track_iou_args(pred, target, lengths, out);
        for (int64_t i = 0; i < args.batch; ++i)
          VCR1_CHECK(args.lengths[i] >= 0 && args.lengths[i] <= args.steps,
                     "lengths: expected 0 to ", args.steps, ", got ", args.lengths[i], " at ", i);
        py::gil_scoped_release release;
        vcr1::cpu::track_iou(args, num_threads);
      },
      py::arg("pred"), py::arg("target"), py::arg("lengths"), py::arg("out"),
      py::arg("num_threads"), "Mean IoU of tracks (B, L, 4) to out (B,).");
  m.def(
      "interval_set_iou",
      [](const Tensor& pred, const Tensor& pred_offsets, const Tensor& target,
         const Tensor& target_offsets, double empty, const Tensor& out, int num_threads) {
        VCR1_CHECK(pred.on_cpu() && pred_offsets.on_cpu() && target.on_cpu() &&
                       target_offsets.on_cpu() && out.on_cpu(),
                   "expected CPU tensors");
        const auto args =
            vcr1::interval_set_iou_args(pred, pred_offsets, target, target_offsets, empty, out);
        const auto check = [&](const char* name, const int64_t* offsets, int64_t count) {
          VCR1_CHECK(offsets[0] == 0 && offsets[args.n] == count, name, " must rise from 0 to ",
                     count, ", the number of spans; got ", offsets[0], " to ", offsets[args.n]);
          for (int64_t i = 0; i < args.n; ++i)
            VCR1_CHECK(offsets[i] <= offsets[i + 1], name, " must rise from 0 to ", count,
                       ", the number of spans; got ", offsets[i], " before ", offsets[i + 1]);
        };
        check("pred_offsets", args.pred_offsets, args.p);
        check("target_offsets", args.target_offsets, args.q);
        py::gil_scoped_release release;
        vcr1::cpu::interval_set_iou(args, num_threads);
      },
      py::arg("pred"), py::arg("pred_offsets"), py::arg("target"), py::arg("target_offsets"),
      py::arg("empty"), py::arg("out"), py::arg("num_threads"),
      "Sets of float64 spans, merged in place, to out (N,).");
}

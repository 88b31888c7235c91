// Python bindings of the IoU ops.
#include <map>
#include <string>

#include "bindings.h"

using namespace vcr1;

namespace {

IouKind iou_kind(const std::string& name) {
  static const std::map<std::string, IouKind> kinds = {{"span", IouKind::kSpan},
                                                       {"iou", IouKind::kIou},
                                                       {"giou", IouKind::kGiou},
                                                       {"diou", IouKind::kDiou},
                                                       {"ciou", IouKind::kCiou}};
  const auto found = kinds.find(name);
  VCR1_CHECK(found != kinds.end(), "kind: unknown ", name);
  return found->second;
}

// Dense memory of `dtype`, which is float64 or float32: any other raises.
void* floats(const Tensor& tensor, DType dtype, const char* name) {
  if (dtype == DType::kFloat64) return tensor.dense<double>(name);
  return tensor.dense<float>(name);
}

// The number of boxes of each side is checked, and that `out` holds their pairs; a and b are (n,
// k).
BoxIouArgs box_iou_args(const Tensor& a, const Tensor& b, const Tensor& out, int64_t n, int64_t m,
                        bool pairwise) {
  VCR1_CHECK(pairwise || n == m, "a and b: expected as many boxes, got ", n, " and ", m);
  VCR1_CHECK(out.numel() == (pairwise ? n * m : n), "out: got ", out.numel(), " elements for ", n,
             " and ", m, " boxes");
  BoxIouArgs args{};
  args.dtype = a.dtype();
  args.pairwise = pairwise;
  args.a = floats(a, args.dtype, "a");
  args.b = floats(b, args.dtype, "b");
  args.out = floats(out, args.dtype, "out");
  args.n = n;
  args.m = m;
  return args;
}

TrackIouArgs track_iou_args(const Tensor& pred, const Tensor& target, const Tensor& lengths,
                            const Tensor& out) {
  const auto [batch, steps, four] = pred.shape<3>("pred");
  VCR1_CHECK(four == 4 && target.numel() == pred.numel() && lengths.numel() == batch &&
                 out.numel() == batch,
             "pred: expected (B, L, 4), got ", batch, " x ", steps, " x ", four,
             " beside a target of ", target.numel(), " values");
  TrackIouArgs args{};
  args.dtype = pred.dtype();
  args.pred = floats(pred, args.dtype, "pred");
  args.target = floats(target, args.dtype, "target");
  args.lengths = lengths.dense<int64_t>("lengths");
  args.out = floats(out, args.dtype, "out");
  args.batch = batch;
  args.steps = steps;
  return args;
}

IntervalSetIouArgs interval_set_iou_args(const Tensor& pred, const Tensor& pred_offsets,
                                         const Tensor& target, const Tensor& target_offsets,
                                         double empty, const Tensor& out) {
  IntervalSetIouArgs args{};
  args.n = out.numel();
  VCR1_CHECK(pred_offsets.numel() == args.n + 1 && target_offsets.numel() == args.n + 1,
             "offsets: expected ", args.n + 1, " values, got ", pred_offsets.numel(), " and ",
             target_offsets.numel());
  args.pred = pred.dense<double>("pred");
  args.target = target.dense<double>("target");
  args.pred_offsets = pred_offsets.dense<int64_t>("pred_offsets");
  args.target_offsets = target_offsets.dense<int64_t>("target_offsets");
  args.out = out.dense<double>("out");
  args.empty = empty;
  args.p = pred.numel() / 2;
  args.q = target.numel() / 2;
  return args;
}

// Values on a GPU are not at hand: its kernel keeps within the tensors by itself.
void check_lengths(const TrackIouArgs& args) {
  for (int64_t i = 0; i < args.batch; ++i)
    VCR1_CHECK(args.lengths[i] >= 0 && args.lengths[i] <= args.steps, "lengths: expected 0 to ",
               args.steps, ", got ", args.lengths[i], " at ", i);
}

void check_offsets(const char* name, const int64_t* offsets, int64_t n, int64_t count) {
  VCR1_CHECK(offsets[0] == 0 && offsets[n] == count, name, " must rise from 0 to ", count,
             ", the number of spans; got ", offsets[0], " to ", offsets[n]);
  for (int64_t i = 0; i < n; ++i)
    VCR1_CHECK(offsets[i] <= offsets[i + 1], name, " must rise from 0 to ", count,
               ", the number of spans; got ", offsets[i], " before ", offsets[i + 1]);
}

template <typename... Tensors>
void check_one_device(const Tensor& first, const Tensors&... others) {
  VCR1_CHECK((first.same_device(others) && ...), "iou: expected all tensors on one device");
}

}  // namespace

VCR1_BINDINGS(iou, m) {
  m.def(
      "box_iou",
      [](const Tensor& a, const Tensor& b, const Tensor& out, const std::string& kind,
         bool pairwise, bool torchvision, int num_threads) {
        check_one_device(a, b, out);
        const IouKind of = iou_kind(kind);
        const auto shape_a = a.shape<2>("a"), shape_b = b.shape<2>("b");
        const bool with_angle = a.on_cpu() && of == IouKind::kCiou;
        // The CPU kernel reads planes where one box meets many: a vector takes one coordinate of
        // several boxes.
        const int boxes = a.on_cpu() && (pairwise || with_angle) ? 1 : 0;
        const int64_t expected = of == IouKind::kSpan ? 2 : with_angle ? 5 : 4;
        VCR1_CHECK(shape_a[1 - boxes] == expected && shape_b[1 - boxes] == expected,
                   "a and b: expected ", expected, " numbers a box, got ", shape_a[1 - boxes],
                   " and ", shape_b[1 - boxes]);
        auto args = box_iou_args(a, b, out, shape_a[boxes], shape_b[boxes], pairwise);
        args.kind = of;
        args.torchvision = torchvision;
        if (out.numel() == 0) return;  // CUDA launches no empty grid
        VCR1_LAUNCH(box_iou, a, args, num_threads);
      },
      py::arg("a"), py::arg("b"), py::arg("out"), py::arg("kind"), py::arg("pairwise"),
      py::arg("torchvision"), py::arg("num_threads"),
      "CUDA: rows (N, 4) and (M, 4) to out. CPU: planes (4, N) and (4, M), or rows (N, 4) of "
      "pairs; "
      "(5, N) for ciou, atan(w / h) last.");
  m.def(
      "track_iou",
      [](const Tensor& pred, const Tensor& target, const Tensor& lengths, const Tensor& out,
         int num_threads) {
        check_one_device(pred, target, lengths, out);
        const auto args = track_iou_args(pred, target, lengths, out);
        if (pred.on_cpu()) check_lengths(args);
        if (args.batch == 0) return;
        VCR1_LAUNCH(track_iou, pred, args, num_threads);
      },
      py::arg("pred"), py::arg("target"), py::arg("lengths"), py::arg("out"),
      py::arg("num_threads"), "Mean IoU of tracks (B, L, 4) to out (B,).");
  m.def(
      "interval_set_iou",
      [](const Tensor& pred, const Tensor& pred_offsets, const Tensor& target,
         const Tensor& target_offsets, double empty, const Tensor& out, int num_threads) {
        check_one_device(pred, pred_offsets, target, target_offsets, out);
        const auto args =
            interval_set_iou_args(pred, pred_offsets, target, target_offsets, empty, out);
        if (pred.on_cpu()) {
          check_offsets("pred_offsets", args.pred_offsets, args.n, args.p);
          check_offsets("target_offsets", args.target_offsets, args.n, args.q);
        }
        if (args.n == 0) return;
        VCR1_LAUNCH(interval_set_iou, pred, args, num_threads);
      },
      py::arg("pred"), py::arg("pred_offsets"), py::arg("target"), py::arg("target_offsets"),
      py::arg("empty"), py::arg("out"), py::arg("num_threads"),
      "Sets of float64 spans, merged in place, to out (N,).");
}

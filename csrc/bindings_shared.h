// What the CPU's and CUDA's bindings of one op check and fill in alike.
#pragma once

#include <map>
#include <string>

#include "kernels.h"
#include "tensor.h"

namespace vcr1 {

inline IouKind iou_kind(const std::string& name) {
  const std::map<std::string, IouKind> kinds = {{"span", IouKind::kSpan},
                                                {"iou", IouKind::kIou},
                                                {"giou", IouKind::kGiou},
                                                {"diou", IouKind::kDiou},
                                                {"ciou", IouKind::kCiou}};
  const auto found = kinds.find(name);
  VCR1_CHECK(found != kinds.end(), "kind: unknown ", name);
  return found->second;
}

// Dense memory of `dtype`, which is float64 or float32: any other raises.
inline void* floats(const Tensor& tensor, DType dtype, const char* name) {
  if (dtype == DType::kFloat64) return tensor.dense<double>(name);
  return tensor.dense<float>(name);
}

// The number of boxes of each side is checked, and that `out` holds their pairs; a and b are (n,
// k).
inline BoxIouArgs box_iou_args(const Tensor& a, const Tensor& b, const Tensor& out, int64_t n,
                               int64_t m, bool pairwise) {
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

inline TrackIouArgs track_iou_args(const Tensor& pred, const Tensor& target, const Tensor& lengths,
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

inline IntervalSetIouArgs interval_set_iou_args(const Tensor& pred, const Tensor& pred_offsets,
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

// Frames (T, H, W, 3) of any strides, of the size that the plan `args` was made for.
template <typename ResizeArgs>
void set_frames(ResizeArgs& args, const Tensor& frames) {
  const auto [n, height, width, channels] = frames.shape<4>("frames");
  VCR1_CHECK(n > 0, "frames: there are none");
  VCR1_CHECK(height == args.vertical.n_in && width == args.horizontal.n_in && channels == 3,
             "frames: expected ", args.vertical.n_in, " x ", args.horizontal.n_in, " x 3, got ",
             height, " x ", width, " x ", channels);
  args.frames = frames.data<uint8_t>("frames");
  args.n_frames = n;
  args.frame_stride = frames.stride(0);
  args.row_stride = frames.stride(1);
  args.column_stride = frames.stride(2);
  args.channel_stride = frames.stride(3);
}

// Resized frames (T, h, w, 3) of any strides: float32 where the fp32 passes are not rounded.
template <typename ResizeFramesArgs>
void set_resized(ResizeFramesArgs& args, const Tensor& out, bool is_float) {
  const auto [n, height, width, channels] = out.shape<4>("out");
  const auto& resize = args.resize;
  VCR1_CHECK(n == resize.n_frames && height == resize.vertical.n_out &&
                 width == resize.horizontal.n_out && channels == 3,
             "out: expected ", resize.n_frames, " x ", resize.vertical.n_out, " x ",
             resize.horizontal.n_out, " x 3, got ", n, " x ", height, " x ", width, " x ",
             channels);
  args.out = is_float ? static_cast<void*>(out.data<float>("out"))
                      : static_cast<void*>(out.data<uint8_t>("out"));
  args.out_frame_stride = out.stride(0);
  args.out_row_stride = out.stride(1);
  args.out_column_stride = out.stride(2);
  args.out_channel_stride = out.stride(3);
}

// Patches (N, 1176), dense.
template <typename VideoPatchesArgs>
void set_patches(VideoPatchesArgs& args, const Tensor& out) {
  const int64_t height = args.resize.vertical.n_out, width = args.resize.horizontal.n_out;
  VCR1_CHECK(height % 28 == 0 && width % 28 == 0, "size: expected multiples of 28, got ", height,
             " x ", width);
  const int64_t n = (args.resize.n_frames + 1) / 2 * (height / 14) * (width / 14);
  const auto [rows, values] = out.shape<2>("out");
  VCR1_CHECK(rows == n && values == 1176 && out.is_contiguous(), "out: expected contiguous ", n,
             " x 1176, got ", rows, " x ", values);
  args.out = out.raw();
  args.out_dtype = out.dtype();
  VCR1_CHECK(args.out_dtype == DType::kFloat32 || args.out_dtype == DType::kBFloat16 ||
                 args.out_dtype == DType::kFloat16,
             "out: expected float32, bfloat16 or float16, got ", name_of(args.out_dtype));
}

}  // namespace vcr1

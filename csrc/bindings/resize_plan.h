// The plans of a resize, on the CPU and on CUDA, as resize_frames and video_patches take them.
#pragma once

#include <array>
#include <map>
#include <string>
#include <vector>

#include "../cpu/resize_gather_tables.h"
#include "bindings.h"

namespace vcr1 {

// One axis of a resize as vcr1_fast/ops/resize_frames.py lays it out. It keeps its tensors alive.
struct AxisTables {
  int n_in, n_out, bits;
  py::object first, weights;
  // CUDA only; see cuda::ResizeAxis.
  int tile, groups, steps, span, reach;
};

// Shift of integer weights: PIL's has 22 bits, torch's at most as many. Kernels add 1 << (bits -
// 1), and a sum of 255 * 2^22 still fits an int32.
constexpr int kMaxResizeBits = 22;

inline void check_axis(const AxisTables& axis, bool is_int) {
  VCR1_CHECK(axis.n_in > 0 && axis.n_out > 0, "n_in and n_out: expected at least 1, got ",
             axis.n_in, " and ", axis.n_out);
  VCR1_CHECK(!is_int || (axis.bits > 0 && axis.bits <= kMaxResizeBits), "bits: expected 1 to ",
             kMaxResizeBits, ", got ", axis.bits);
}

// Sets frames (T, H, W, 3) of any strides, of the size that the plan `args` was made for.
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

// The tables of one resize, and the plan of its scratch memory: made once per pair of sizes. It is
// not copied: args_ points into its vectors.
class ResizePlan {
 public:
  ResizePlan(const std::string& mode, const AxisTables& vertical, const AxisTables& horizontal) {
    using cpu::ResizeMode;
    const std::map<std::string, ResizeMode> modes = {{"copy", ResizeMode::kCopy},
                                                     {"int16", ResizeMode::kInt16},
                                                     {"int22", ResizeMode::kInt22},
                                                     {"float", ResizeMode::kFloat},
                                                     {"float_rounded", ResizeMode::kFloatRounded}};
    const auto found = modes.find(mode);
    VCR1_CHECK(found != modes.end(), "mode: unknown ", mode);
    args_.mode = found->second;
    set_axis(args_.vertical, 0, vertical);
    set_axis(args_.horizontal, 1, horizontal);
    if (is_int())
      args_.gather =
          gather_.build(args_.horizontal, args_.vertical, args_.mode == ResizeMode::kInt22);
    cpu::plan_scratch(args_);
  }
  ResizePlan(const ResizePlan&) = delete;
  ResizePlan& operator=(const ResizePlan&) = delete;

  int64_t scratch_bytes() const { return args_.layout.total; }

  cpu::ResizeArgs args(const Tensor& frames, const Tensor& scratch, int num_threads) const {
    cpu::ResizeArgs out = args_;
    VCR1_CHECK(frames.on_cpu() && scratch.on_cpu(), "frames and scratch: expected CPU tensors");
    set_frames(out, frames);
    check_threads(num_threads);
    VCR1_CHECK(scratch.numel() >= num_threads * scratch_bytes(), "scratch: expected ",
               num_threads * scratch_bytes(), " bytes, got ", scratch.numel());
    out.scratch = scratch.dense<uint8_t>("scratch");
    return out;
  }

 private:
  bool is_int() const {
    return args_.mode == cpu::ResizeMode::kInt16 || args_.mode == cpu::ResizeMode::kInt22;
  }

  void set_axis(cpu::ResizeAxis& axis, int index, const AxisTables& tables) {
    check_axis(tables, is_int());
    const int64_t n_in = tables.n_in, n_out = tables.n_out;
    axis.n_in = n_in;
    axis.n_out = n_out;
    axis.bits = tables.bits;
    if (args_.mode == cpu::ResizeMode::kCopy) {
      VCR1_CHECK(n_in == n_out, "copy: sizes differ, ", n_in, " and ", n_out);
      return;
    }
    const Tensor first = Tensor::borrow(tables.first), weights = Tensor::borrow(tables.weights);
    const int64_t parts = args_.mode == cpu::ResizeMode::kInt22 ? 2 : 1;
    VCR1_CHECK(first.on_cpu() && weights.on_cpu(), "tables: expected CPU tensors");
    const auto [rows, columns] = weights.shape<2>("weights");
    VCR1_CHECK(rows == n_out && first.numel() == n_out, "tables: expected ", n_out, " rows, got ",
               rows, " and ", first.numel());
    // Integer weights come in pairs of source lines, and by low and high halves for int22.
    const int64_t unit = is_int() ? 2 * parts : 1;
    VCR1_CHECK(columns > 0 && columns % unit == 0, "weights: expected a positive multiple of ",
               unit, " columns, got ", columns);
    axis.taps = columns / unit;
    const int32_t* begin = first.dense<int32_t>("first");
    first_[index].assign(begin, begin + n_out);
    const int64_t lines = is_int() ? (n_in + 1) / 2 : n_in;
    for (int64_t i = 0; i < n_out; ++i)
      VCR1_CHECK(begin[i] >= 0 && begin[i] < lines && (i == 0 || begin[i] >= begin[i - 1]),
                 "first: expected rising values below ", lines, ", got ", begin[i], " at ", i);
    const auto* bytes =
        static_cast<const char*>(is_int() ? static_cast<void*>(weights.dense<int16_t>("weights"))
                                          : static_cast<void*>(weights.dense<float>("weights")));
    weights_[index].assign(bytes, bytes + weights.numel() * (is_int() ? 2 : 4));
    axis.first = first_[index].data();
    axis.weights = weights_[index].data();
  }

  cpu::ResizeArgs args_{};
  std::array<std::vector<int32_t>, 2> first_;
  std::array<std::vector<char>, 2> weights_;
  cpu::GatherMemory gather_;
};

// The tables of one resize on one device, which it keeps alive.
class CudaResizePlan {
 public:
  CudaResizePlan(const std::string& method, const AxisTables& vertical,
                 const AxisTables& horizontal)
      : vertical_(vertical), horizontal_(horizontal) {
    using cuda::ResizeMethod;
    const std::map<std::string, ResizeMethod> methods = {
        {"copy", ResizeMethod::kCopy},         {"matrix16", ResizeMethod::kMatrix16},
        {"matrix22", ResizeMethod::kMatrix22}, {"int", ResizeMethod::kInt},
        {"float", ResizeMethod::kFloat},       {"float_rounded", ResizeMethod::kFloatRounded}};
    const auto found = methods.find(method);
    VCR1_CHECK(found != methods.end(), "method: unknown ", method);
    args_.method = found->second;
    set_axis(args_.vertical, vertical);
    set_axis(args_.horizontal, horizontal);
    if (!is_matrix()) return;
    // A warp a group of 16 columns, and four warps a block.
    VCR1_CHECK(args_.horizontal.groups <= 4, "tile: expected at most 64 columns, got ",
               args_.horizontal.tile);
#ifdef VCR1_CUDA
    cuda::plan_shared(args_);
#else
    fail<std::invalid_argument>("CudaResizePlan: vcr1_fast._C was built without CUDA");
#endif
  }

  int shared_bytes() const { return args_.shared_bytes; }
  bool is_matrix() const {
    return args_.method == cuda::ResizeMethod::kMatrix16 ||
           args_.method == cuda::ResizeMethod::kMatrix22;
  }

  cuda::ResizeArgs args(const Tensor& frames) const {
    cuda::ResizeArgs out = args_;
    VCR1_CHECK(frames.on_cuda() && Tensor::borrow(vertical_.first).same_device(frames) &&
                   Tensor::borrow(horizontal_.first).same_device(frames),
               "frames and tables: expected one CUDA device");
    set_frames(out, frames);
    return out;
  }

 private:
  void set_axis(cuda::ResizeAxis& axis, const AxisTables& tables) {
    using cuda::ResizeMethod;
    check_axis(tables, is_matrix() || args_.method == ResizeMethod::kInt);
    VCR1_CHECK(tables.steps > 0 || args_.method == ResizeMethod::kCopy,
               "steps: expected at least 1, got ", tables.steps);
    axis.n_in = tables.n_in;
    axis.n_out = tables.n_out;
    axis.bits = tables.bits;
    axis.tile = tables.tile;
    axis.groups = tables.groups;
    axis.taps = axis.steps = tables.steps;
    axis.span = tables.span;
    axis.reach = tables.reach;
    const Tensor first = Tensor::borrow(tables.first), weights = Tensor::borrow(tables.weights);
    VCR1_CHECK(first.same_device(weights), "tables: expected one device");
    axis.first = first.dense<int32_t>("first");
    if (is_matrix()) {
      VCR1_CHECK(axis.tile > 0, "tile: expected at least 1, got ", axis.tile);
      const int64_t tiles = (axis.n_out + axis.tile - 1) / axis.tile;
      const int planes = args_.method == ResizeMethod::kMatrix16 ? 2 : 3;
      axis.weights = weights.dense<uint8_t>("weights");
      VCR1_CHECK(axis.groups == (axis.tile + 15) / 16 &&
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

  cuda::ResizeArgs args_{};
  AxisTables vertical_, horizontal_;
};

}  // namespace vcr1

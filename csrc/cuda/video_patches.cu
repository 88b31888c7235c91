// Resized tiles, normalised, cast and cut into the patch rows of a vision encoder.
#include "resize.cuh"

namespace vcr1::cuda {
namespace {

template <typename T>
struct alignas(2 * sizeof(T)) Pair {
  T first, second;
};

// Out is float, or the bits of a half type.
template <typename Shape, typename Out>
struct PatchSink {
  static constexpr int kPatch = Shape::kPatch, kMerge = Shape::kMerge;
  static constexpr int kTemporal = Shape::kTemporal, kPlane = Shape::kPlane;
  static_assert(kPatch % 2 == 0, "write() stores pairs of neighbouring values");
  static constexpr int kTileRows = kPatch, kTileColumns = 2 * kPatch;  // of the scalar methods
  static constexpr int kTableBytes = 3 * 256 * sizeof(Out);

  Out* out;
  int64_t n_frames;
  int grid_height, grid_width;
  float offset[3], scale[3];
  bool bfloat16;  // where Out is a half type
  bool pairs;     // `out` is aligned to two values

  __device__ Out normalise(float value, int c) const {
    const float x = __fdiv_rn(__fsub_rn(value, offset[c]), scale[c]);
    if constexpr (sizeof(Out) == 4) {
      return x;
    } else {
      return bfloat16 ? __bfloat16_as_ushort(__float2bfloat16_rn(x))
                      : __half_as_ushort(__float2half_rn(x));
    }
  }
  __device__ Out convert(const void* table, int c, uint8_t value) const {
    return static_cast<const Out*>(table)[256 * c + value];
  }
  __device__ Out convert(const void*, int c, float value) const { return normalise(value, c); }

  // The results of all bytes: a look-up is shorter than the division.
  __device__ void prepare(void* table) const {
    for (int i = threadIdx.x; i < 3 * 256; i += blockDim.x)
      static_cast<Out*>(table)[i] = normalise(static_cast<float>(i % 256), i / 256);
  }

  __device__ void store(Out* to, Pair<Out> pair) const {
    if (pairs) {
      *reinterpret_cast<Pair<Out>*>(to) = pair;
    } else {
      to[0] = pair.first;
      to[1] = pair.second;
    }
  }

  // A warp takes a channel of a patch at one time, whose values lie one after another. Tiles begin
  // and end between patches.
  template <typename Value>
  __device__ void write(const Tile& tile, const TileValues<Value>& values,
                        const void* table) const {
    const int columns = tile.columns / kPatch, planes = 3 * columns * (tile.rows / kPatch);
    const int time = static_cast<int>(tile.t % kTemporal);
    // The clip's last frame also stands at the times that are missing after it.
    const int copies = tile.t + 1 == n_frames ? kTemporal - time : 1;
    for (int i = threadIdx.x / 32; i < planes; i += blockDim.x / 32) {
      const int c = i % 3, column = i / 3 % columns, row = i / 3 / columns;
      const int h = tile.y / kPatch + row, w = tile.x / kPatch + column;
      const int64_t block =
          (tile.t / kTemporal * (grid_height / kMerge) + h / kMerge) * (grid_width / kMerge) +
          w / kMerge;
      const int64_t patch = (block * kMerge + h % kMerge) * kMerge + w % kMerge;
      Out* const to = out + patch * Shape::kValues + (c * kTemporal + time) * kPlane;
      const Value* const from =
          values.data + c * values.plane + row * kPatch * values.pitch + column * kPatch;
      for (int k = threadIdx.x % 32; k < kPlane / 2; k += 32) {
        const int y = k / (kPatch / 2), x = 2 * (k % (kPatch / 2));
        const auto pair = *reinterpret_cast<const Pair<Value>*>(from + y * values.pitch + x);
        const Pair<Out> result{convert(table, c, pair.first), convert(table, c, pair.second)};
        for (int copy = 0; copy < copies; ++copy) store(to + copy * kPlane + 2 * k, result);
      }
    }
  }
};

template <typename Shape, typename Out>
void run(const VideoPatchesArgs& args, cudaStream_t stream) {
  PatchSink<Shape, Out> sink;
  sink.out = static_cast<Out*>(args.out);
  sink.n_frames = args.resize.n_frames;
  sink.grid_height = args.resize.vertical.n_out / Shape::kPatch;
  sink.grid_width = args.resize.horizontal.n_out / Shape::kPatch;
  for (int c = 0; c < 3; ++c) {
    sink.offset[c] = args.patches.offset[c];
    sink.scale[c] = args.patches.scale[c];
  }
  sink.bfloat16 = args.out_dtype == DType::kBFloat16;
  sink.pairs = reinterpret_cast<std::uintptr_t>(args.out) % (2 * sizeof(Out)) == 0;
  if (args.resize.method == ResizeMethod::kFloat)
    return launch_floats("video_patches", args.resize, sink, stream);
  launch_bytes("video_patches", args.resize, sink, stream);
}

}  // namespace

void video_patches(const VideoPatchesArgs& args, void* stream) {
  const auto on = static_cast<cudaStream_t>(stream);
  const PatchLayout& layout = args.patches;
  const bool is_float = args.out_dtype == DType::kFloat32;
#define VCR1_RUN(p, m, t)                                             \
  if (layout.patch == p && layout.merge == m && layout.temporal == t) \
    return is_float ? run<PatchShape<p, m, t>, float>(args, on)       \
                    : run<PatchShape<p, m, t>, uint16_t>(args, on);
  VCR1_PATCH_SHAPES(VCR1_RUN)
#undef VCR1_RUN
}

}  // namespace vcr1::cuda

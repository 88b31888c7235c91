// Resized frames, with any output strides; and the plan of the matrix methods' shared memory.
#include "resize.cuh"

namespace vcr1::cuda {
namespace {

template <typename Out>
struct FrameSink {
  static constexpr int kTileRows = 16, kTileColumns = 32;  // of the scalar methods
  static constexpr int kTableBytes = 16;  // none is needed, but an array must have a size

  Out* out;
  int64_t frame_stride, row_stride, column_stride, channel_stride;

  __device__ void prepare(void*) const {}

  // Neighbouring threads store neighbouring values, of pixels or of planes.
  template <typename Value>
  __device__ void write(const Tile& tile, const TileValues<Value>& values, const void*) const {
    Out* const to = out + tile.t * frame_stride + tile.y * row_stride + tile.x * column_stride;
    const bool pixels = channel_stride < column_stride;
    const int inner = pixels ? 3 : tile.columns, outer = pixels ? tile.columns : 3;
    for (int i = threadIdx.x; i < tile.rows * tile.columns * 3; i += blockDim.x) {
      const int first = i % inner, rest = i / inner, second = rest % outer, y = rest / outer;
      const int c = pixels ? first : second, x = pixels ? second : first;
      to[y * row_stride + x * column_stride + c * channel_stride] =
          static_cast<Out>(values.data[c * values.plane + y * values.pitch + x]);
    }
  }
};

template <typename Out>
FrameSink<Out> sink_of(const ResizeFramesArgs& args) {
  return {static_cast<Out*>(args.out), args.out_frame_stride, args.out_row_stride,
          args.out_column_stride, args.out_channel_stride};
}

int round_up(int value, int multiple) { return (value + multiple - 1) / multiple * multiple; }

// Rows 16 bytes times an odd number apart: the warp's reads of eight rows hit different banks.
int spread(int bytes) { return round_up(bytes, 16) | 16; }

}  // namespace

void plan_shared(ResizeArgs& args) {
  const ResizeAxis &across = args.horizontal, &down = args.vertical;
  const int width = channel_columns(args);
  // Steps may go on past the end of a row or column, over bytes that weigh nothing: into the next
  // one, or past the last.
  args.source_pitch = spread(3 * round_up(across.span, 4));
  args.strip_bytes =
      kStripRows * args.source_pitch + round_up(3 * (across.reach - across.span), 16);
  args.column_pitch = spread(down.span);
  args.source_bytes = std::max(2 * args.strip_bytes, round_up(3 * down.tile * width, 16));
  args.shared_bytes = args.source_bytes + 3 * width * args.column_pitch +
                      round_up(std::max(down.reach - args.column_pitch, 0), 16);
}

void resize_frames(const ResizeFramesArgs& args, void* stream) {
  const auto on = static_cast<cudaStream_t>(stream);
  if (args.resize.method == ResizeMethod::kFloat)
    return launch_floats("resize_frames", args.resize, sink_of<float>(args), on);
  launch_bytes("resize_frames", args.resize, sink_of<uint8_t>(args), on);
}

}  // namespace vcr1::cuda

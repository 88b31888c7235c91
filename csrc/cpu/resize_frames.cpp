// Resized frames, with any output strides.
#include "resize_rows.h"

namespace vcr1::cpu::VCR1_ISA {

template <typename T>
inline void write_row(const ResizeFramesArgs& args, const T* row, T* out) {
  const int64_t width = args.resize.horizontal.n_out, pad = args.resize.layout.width;
  if (args.out_column_stride == 3 && args.out_channel_stride == 1) {
    for (int64_t x = 0; x < width; ++x)
      for (int64_t c = 0; c < 3; ++c) out[3 * x + c] = row[c * pad + x];
    return;
  }
  for (int64_t c = 0; c < 3; ++c)
    for (int64_t x = 0; x < width; ++x)
      out[x * args.out_column_stride + c * args.out_channel_stride] = row[c * pad + x];
}

template <typename T>
inline void run(const ResizeFramesArgs& args, int num_threads) {
  const ResizeArgs& resize = args.resize;
  share(resize, resize.n_frames, resize.vertical.n_out, num_threads,
        [&](uint8_t* scratch, int64_t t, int64_t begin, int64_t end) {
          FrameState state = start_frame(resize, t, scratch, 0);
          T* const frame = static_cast<T*>(args.out) + t * args.out_frame_stride;
          resize_rows<T>(resize, state, begin, end, scratch, [&](int64_t y, const T* row) {
            write_row(args, row, frame + y * args.out_row_stride);
          });
        });
}

void resize_frames(const ResizeFramesArgs& args, int num_threads) {
  if (args.resize.mode == ResizeMode::kFloat) return run<float>(args, num_threads);
  run<uint8_t>(args, num_threads);
}

}  // namespace vcr1::cpu::VCR1_ISA

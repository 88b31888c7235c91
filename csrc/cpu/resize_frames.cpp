// Resized frames, with any output strides.
#include "resize_rows.h"

namespace vcr1::cpu::VCR1_ISA {

template <typename Out>
struct FrameSink {
  const ResizeFramesArgs& args;
  Out* frame;

  template <typename Row>
  void operator()(int64_t y, const Row* row) const {
    const int64_t width = args.resize.horizontal.n_out, pad = args.resize.layout.width;
    Out* out = frame + y * args.out_row_stride;
    if (args.out_column_stride == 3 && args.out_channel_stride == 1) {
      for (int64_t x = 0; x < width; ++x)
        for (int64_t c = 0; c < 3; ++c) out[3 * x + c] = static_cast<Out>(row[c * pad + x]);
      return;
    }
    for (int64_t c = 0; c < 3; ++c)
      for (int64_t x = 0; x < width; ++x)
        out[x * args.out_column_stride + c * args.out_channel_stride] =
            static_cast<Out>(row[c * pad + x]);
  }
};

template <typename Out>
inline void run(const ResizeFramesArgs& args, int num_threads) {
  for_each_row(args.resize, num_threads, [&](int64_t t, uint8_t*) {
    return FrameSink<Out>{args, static_cast<Out*>(args.out) + t * args.out_frame_stride};
  });
}

void resize_frames(const ResizeFramesArgs& args, int num_threads) {
  if (args.resize.mode == ResizeMode::kFloat) return run<float>(args, num_threads);
  run<uint8_t>(args, num_threads);
}

}  // namespace vcr1::cpu::VCR1_ISA

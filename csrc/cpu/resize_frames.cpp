// Resized frames, with any output strides.
#include "resize_rows.h"

namespace vcr1::cpu::VCR1_ISA {

template <typename T>
inline void interleave(const T* row, int64_t pad, int64_t width, T* out) {
  for (int64_t x = 0; x < width; ++x)
    for (int64_t c = 0; c < 3; ++c) out[3 * x + c] = row[c * pad + x];
}

#if defined(__AVX512VBMI__)
// Sixteen pixels a step; rows are padded to whole steps.
inline void interleave(const uint8_t* row, int64_t pad, int64_t width, uint8_t* out) {
  alignas(64) uint8_t order[64] = {};
  for (int i = 0; i < 48; ++i) order[i] = static_cast<uint8_t>(i % 3 * 16 + i / 3);
  const __m512i rgb = _mm512_load_si512(order);
  for (int64_t x = 0; x < width; x += 16) {
    const auto plane = [&](int64_t c) {
      return _mm_loadu_si128(reinterpret_cast<const __m128i*>(row + c * pad + x));
    };
    __m512i pixels = _mm512_castsi128_si512(plane(0));
    pixels = _mm512_inserti32x4(_mm512_inserti32x4(pixels, plane(1), 1), plane(2), 2);
    const auto mask = static_cast<__mmask64>((uint64_t{1} << 3 * least(16, width - x)) - 1);
    _mm512_mask_storeu_epi8(out + 3 * x, mask, _mm512_permutexvar_epi8(rgb, pixels));
  }
}
#endif

template <typename T>
inline void write_row(const ResizeFramesArgs& args, const T* row, T* out) {
  const int64_t width = args.resize.horizontal.n_out, pad = args.resize.layout.width;
  if (args.out_column_stride == 3 && args.out_channel_stride == 1)
    return interleave(row, pad, width, out);
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

// Source rows of a frame to shared memory, as interleaved RGB whatever their order was.
#pragma once

#include "common.cuh"
#include "ptx.cuh"

namespace vcr1::cuda {

constexpr int kStripRows = 16;

// How pixels lie in a row of the frames.
enum class Source {
  kPackedAligned,  // RGBRGB..., everything a multiple of 16 bytes
  kPacked,         // RGBRGB...
  kPlanar,         // RRR..., GGG..., BBB...
  kScattered,
};

inline Source source_of(const ResizeArgs& args) {
  if (args.column_stride == 3 && args.channel_stride == 1) {
    // The width, too: 16 bytes at a time, a row's end must not lie within them. It may be the end
    // of the storage.
    const auto bits = reinterpret_cast<std::uintptr_t>(args.frames) |
                      static_cast<std::uintptr_t>(args.row_stride) |
                      static_cast<std::uintptr_t>(3 * args.horizontal.n_in) |
                      (args.n_frames > 1 ? static_cast<std::uintptr_t>(args.frame_stride) : 0);
    return bits % 16 == 0 ? Source::kPackedAligned : Source::kPacked;
  }
  return args.column_stride == 1 ? Source::kPlanar : Source::kScattered;
}

// Four bytes from any address, of which the first `valid` >= 1 may be read. Loads whole words, but
// none without a valid byte: allocations are aligned to more than a word.
__device__ inline uint32_t load_word(const uint8_t* from, int valid) {
  const int shift = static_cast<int>(reinterpret_cast<std::uintptr_t>(from) % 4);
  const auto* const words = reinterpret_cast<const uint32_t*>(from - shift);
  const uint32_t low = __ldg(words);
  if (shift == 0) return low;
  const uint32_t high = 4 - shift < valid ? __ldg(words + 1) : 0;
  return __funnelshift_r(low, high, 8 * shift);
}

// Four pixels R, G, B of four bytes each to r0 g0 b0 r1, g1 b1 r2 g2, b2 r3 g3 b3; and back.
__device__ inline void interleave(const uint32_t (&planes)[3], uint32_t (&packed)[3]) {
  const uint32_t r = planes[0], g = planes[1], b = planes[2];
  packed[0] = __byte_perm(__byte_perm(r, g, 0x1040), b, 0x3410);
  packed[1] = __byte_perm(__byte_perm(r, g, 0x6205), b, 0x3250);
  packed[2] = __byte_perm(__byte_perm(r, g, 0x0730), b, 0x7216);
}
__device__ inline void separate(const uint32_t (&packed)[3], uint32_t (&planes)[3]) {
  const uint32_t p = packed[0], q = packed[1], r = packed[2];
  planes[0] = __byte_perm(__byte_perm(p, q, 0x0630), r, 0x5210);
  planes[1] = __byte_perm(__byte_perm(p, q, 0x0741), r, 0x6210);
  planes[2] = __byte_perm(__byte_perm(p, q, 0x0052), r, 0x7410);
}

// One row, from pixel 0 of `from`, by the lanes of a warp. Bytes up to the next multiple of 16 past
// the `pixels` may be written; their values do not matter.
__device__ inline void load_row(const ResizeArgs& args, Source source, const uint8_t* from,
                                int pixels, uint8_t* to) {
  const int lane = threadIdx.x % 32;
  const int bytes = 3 * pixels;
  auto* const words = reinterpret_cast<uint32_t*>(to);
  switch (source) {
    case Source::kPackedAligned:
      for (int i = 16 * lane; i < bytes; i += 16 * 32) copy_async(to + i, from + i);
      return;
    case Source::kPacked:
      for (int i = lane; 4 * i < bytes; i += 32) words[i] = load_word(from + 4 * i, bytes - 4 * i);
      return;
    case Source::kPlanar:
      for (int i = lane; 4 * i < pixels; i += 32) {
        uint32_t planes[3], packed[3];
        for (int c = 0; c < 3; ++c)
          planes[c] = load_word(from + c * args.channel_stride + 4 * i, pixels - 4 * i);
        interleave(planes, packed);
        for (int c = 0; c < 3; ++c) words[3 * i + c] = packed[c];
      }
      return;
    case Source::kScattered:
      for (int x = lane; x < pixels; x += 32)
        for (int c = 0; c < 3; ++c)
          to[3 * x + c] = __ldg(from + x * args.column_stride + c * args.channel_stride);
  }
}

// Rows [0, rows) of `from`, a warp each, `args.source_pitch` bytes apart.
__device__ inline void load_strip(const ResizeArgs& args, Source source, const uint8_t* from,
                                  int rows, int pixels, uint8_t* to) {
  for (int r = threadIdx.x / 32; r < rows; r += blockDim.x / 32)
    load_row(args, source, from + r * args.row_stride, pixels, to + r * args.source_pitch);
}

}  // namespace vcr1::cuda

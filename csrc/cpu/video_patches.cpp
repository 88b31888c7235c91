// Resized rows, normalised and cast, to the patch rows of Qwen2-VL and Qwen2.5-VL.
#include "resize_rows.h"

namespace vcr1::cpu::VCR1_ISA {

constexpr int64_t kPatch = 14, kMerge = 2, kTemporal = 2;
constexpr int64_t kPlane = kPatch * kPatch;  // values of a channel at one time
constexpr int64_t kPatchValues = 3 * kTemporal * kPlane;

// Round to nearest even; infinities stay, NaN cannot occur.
inline void cast(const float* from, BFloat16* to, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    uint32_t bits;
    std::memcpy(&bits, from + i, sizeof(bits));
    to[i].bits = static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
  }
}

inline void cast(const float* from, float* to, int64_t n) {
  std::memcpy(to, from, n * sizeof(float));
}

#if defined(__F16C__)
inline void cast(const float* from, Float16* to, int64_t n) {  // n: a multiple of 8
  for (int64_t i = 0; i < n; i += 8)
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to + i),
                     _mm256_cvtps_ph(_mm256_loadu_ps(from + i), _MM_FROUND_TO_NEAREST_INT));
}
#else
inline uint16_t half_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  const uint32_t sign = bits >> 16 & 0x8000;
  bits &= 0x7fffffff;
  if (bits >= 0x47800000) return static_cast<uint16_t>(sign | 0x7c00);  // 2^16 and more: infinity
  if (bits < 0x38800000) {  // below 2^-14: adding 1/2 aligns the subnormal's last bit, and rounds
    float magnitude;
    std::memcpy(&magnitude, &bits, sizeof(bits));
    magnitude += 0.5f;
    std::memcpy(&bits, &magnitude, sizeof(bits));
    return static_cast<uint16_t>(sign | (bits - 0x3f000000));
  }
  bits += 0xfff + (bits >> 13 & 1);
  return static_cast<uint16_t>(sign | ((bits >> 13) - (112 << 10)));
}
inline void cast(const float* from, Float16* to, int64_t n) {
  for (int64_t i = 0; i < n; ++i) to[i].bits = half_bits(from[i]);
}
#endif

template <typename Out>
struct PatchSink {
  const VideoPatchesArgs& args;
  int64_t t;
  Out* line;  // three rows of layout.width values

  template <typename Row>
  void operator()(int64_t y, const Row* row) const {
    const ResizeArgs& resize = args.resize;
    const int64_t pad = resize.layout.width;
    for (int64_t c = 0; c < 3; ++c) normalise(row + c * pad, line + c * pad, pad, c);

    const int64_t columns = resize.horizontal.n_out / kPatch;
    const int64_t super_rows = resize.vertical.n_out / (kPatch * kMerge);
    const int64_t super_row = t / kTemporal * super_rows + y / (kPatch * kMerge);
    Out* const patches =
        static_cast<Out*>(args.out) +
        (super_row * columns * kMerge + y / kPatch % kMerge * kMerge) * kPatchValues +
        t % kTemporal * kPlane + y % kPatch * kPatch;
    // An odd clip's last frame stands at both times of its patches.
    const int64_t copies = t % kTemporal == 0 && t + 1 == resize.n_frames ? 2 : 1;
    for (int64_t w = 0; w < columns; ++w) {
      Out* patch = patches + (w / kMerge * kMerge * kMerge + w % kMerge) * kPatchValues;
      for (int64_t c = 0; c < 3; ++c)
        for (int64_t copy = 0; copy < copies; ++copy)
          std::memcpy(patch + (c * kTemporal + copy) * kPlane, line + c * pad + w * kPatch,
                      kPatch * sizeof(Out));
    }
  }

  template <typename Row>
  void normalise(const Row* from, Out* to, int64_t n, int64_t c) const {
    const float offset = args.offset[c], scale = args.scale[c];
    for (int64_t x = 0; x < n; x += 16) {
      float values[16];
      for (int i = 0; i < 16; ++i) values[i] = (static_cast<float>(from[x + i]) - offset) / scale;
      cast(values, to + x, 16);
    }
  }
};

template <typename Out>
inline void run(const VideoPatchesArgs& args, int num_threads) {
  for_each_row(args.resize, num_threads, [&](int64_t t, uint8_t* scratch) {
    return PatchSink<Out>{args, t, reinterpret_cast<Out*>(scratch + args.resize.layout.cast)};
  });
}

void video_patches(const VideoPatchesArgs& args, int num_threads) {
  switch (args.out_dtype) {
    case DType::kBFloat16:
      return run<BFloat16>(args, num_threads);
    case DType::kFloat16:
      return run<Float16>(args, num_threads);
    default:
      return run<float>(args, num_threads);
  }
}

}  // namespace vcr1::cpu::VCR1_ISA

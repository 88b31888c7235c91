// Resized rows, normalised, cast and cut into the patch rows of a vision encoder.
#include "pages.h"
#include "resize_rows.h"

namespace vcr1::cpu::VCR1_ISA {

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

// Normalises and casts a segment, the values of one channel of a patch. May write up to 64 values
// past its end: whole vectors are faster than a remainder, and the next segment overwrites them.
template <typename Shape, typename In, typename Out>
class Normalise {
 public:
  explicit Normalise(const PatchLayout& layout) : layout_(layout) {}

  void operator()(const In* from, Out* to, int64_t c) const {
    const float offset = layout_.offset[c], scale = layout_.scale[c];
    for (int64_t x = 0; x < Shape::kSegment; x += 16) {
      float values[16];
      for (int i = 0; i < 16; ++i) values[i] = (static_cast<float>(from[x + i]) - offset) / scale;
      cast(values, to + x, 16);
    }
  }

 private:
  const PatchLayout& layout_;
};

#if defined(__AVX512VBMI__)
// A byte has 256 values, a channel therefore too: tables of their two bytes, looked up 64 at a
// time.
template <typename Shape, typename Out>
class ByteTable {
 public:
  explicit ByteTable(const PatchLayout& layout) {
    for (int c = 0; c < 3; ++c)
      for (int i = 0; i < 256; i += 16) {
        float values[16];
        Out out[16];
        for (int k = 0; k < 16; ++k)
          values[k] = (static_cast<float>(i + k) - layout.offset[c]) / layout.scale[c];
        cast(values, out, 16);
        for (int k = 0; k < 16; ++k) {
          low_[c][i + k] = static_cast<uint8_t>(out[k].bits);
          high_[c][i + k] = static_cast<uint8_t>(out[k].bits >> 8);
        }
      }
  }

  void operator()(const uint8_t* from, Out* to, int64_t c) const {
    __m512i low[4], high[4];
    for (int i = 0; i < 4; ++i) {
      low[i] = _mm512_load_si512(low_[c] + 64 * i);
      high[i] = _mm512_load_si512(high_[c] + 64 * i);
    }
    // The unpacks work on quarters of a vector.
    const __m512i quarters = _mm512_setr_epi64(0, 4, 1, 5, 2, 6, 3, 7);
    for (int64_t x = 0; x < Shape::kSegment; x += 64) {
      const __m512i at = _mm512_permutexvar_epi64(quarters, _mm512_loadu_si512(from + x));
      const __mmask64 bit6 = _mm512_test_epi8_mask(at, _mm512_set1_epi8(64));
      const __mmask64 bit7 = _mm512_movepi8_mask(at);
      const __m512i l = look_up(low, at, bit6, bit7), h = look_up(high, at, bit6, bit7);
      _mm512_storeu_si512(to + x, _mm512_unpacklo_epi8(l, h));
      _mm512_storeu_si512(to + x + 32, _mm512_unpackhi_epi8(l, h));
    }
  }

 private:
  static __m512i look_up(const __m512i table[4], __m512i at, __mmask64 bit6, __mmask64 bit7) {
    __m512i small = _mm512_permutexvar_epi8(at, table[0]);
    small = _mm512_mask_permutexvar_epi8(small, bit6, at, table[1]);
    __m512i large = _mm512_permutexvar_epi8(at, table[2]);
    large = _mm512_mask_permutexvar_epi8(large, bit6, at, table[3]);
    return _mm512_mask_mov_epi8(small, bit7, large);
  }

  alignas(64) uint8_t low_[3][256], high_[3][256];
};

template <typename Shape>
class Normalise<Shape, uint8_t, BFloat16> : public ByteTable<Shape, BFloat16> {
  using ByteTable<Shape, BFloat16>::ByteTable;
};
template <typename Shape>
class Normalise<Shape, uint8_t, Float16> : public ByteTable<Shape, Float16> {
  using ByteTable<Shape, Float16>::ByteTable;
};
#endif

// Copies past the cache: nothing here reads the patches again, and a plain store would first fetch
// the lines that it then overwrites. Followed by a fence before another thread may read them. Lines
// of a page just made are in the cache already.
inline void copy_out(const void* from, int64_t bytes, void* to, bool fresh) {
  if (fresh) {
    std::memcpy(to, from, bytes);
    return;
  }
  const char* source = static_cast<const char*>(from);
  char* target = static_cast<char*>(to);
#if defined(__AVX2__)
  const int64_t head = -reinterpret_cast<intptr_t>(target) & 63;
  std::memcpy(target, source, head);
  int64_t at = head;
  for (; at + 64 <= bytes; at += 64) {
#if defined(__AVX512F__)
    _mm512_stream_si512(reinterpret_cast<__m512i*>(target + at), _mm512_loadu_si512(source + at));
#else
    for (int64_t i = at; i < at + 64; i += 32)
      _mm256_stream_si256(reinterpret_cast<__m256i*>(target + i),
                          _mm256_loadu_si256(reinterpret_cast<const __m256i*>(source + i)));
#endif
  }
  std::memcpy(target + at, source + at, bytes - at);
#else
  std::memcpy(target, source, bytes);
#endif
}

inline void stream_fence() {
#if defined(__AVX2__)
  _mm_sfence();
#endif
}

// Makes rows of patches. The pixels of a row wait as they are, in the order of the patches, until
// all rows of the patches are there at every time. `In` is what resize_rows emits.
template <typename Shape, typename In, typename Out>
inline void run(const VideoPatchesArgs& args, int num_threads) {
  constexpr int64_t kPatch = Shape::kPatch, kMerge = Shape::kMerge, kTemporal = Shape::kTemporal;
  constexpr int64_t kPlane = Shape::kPlane, kSegment = Shape::kSegment, kValues = Shape::kValues;
  const ResizeArgs& resize = args.resize;
  const int64_t rows = resize.vertical.n_out / kPatch, columns = resize.horizontal.n_out / kPatch;
  const int64_t pad = resize.layout.width;
  const int64_t super_row = columns * kMerge * kValues;  // `merge` rows of patches
  const int64_t groups = (resize.n_frames + kTemporal - 1) / kTemporal;
  Out* const every = static_cast<Out*>(args.out);
  const int64_t super_rows = groups * rows / kMerge;
  const bool fresh = untouched(every + super_rows / 2 * super_row);
  const Normalise<Shape, In, Out> normalise(args.patches);

  const auto patch_row = [&](uint8_t* scratch, FrameState* frames, int64_t times, int64_t r,
                             Out* out) {
    In* const staged = reinterpret_cast<In*>(scratch + resize.layout.staged);
    Out* const values = reinterpret_cast<Out*>(scratch + resize.layout.cast);
    for (int64_t time = 0; time < times; ++time) {
      // The clip's last frame also stands at the times that are missing after it.
      const int64_t copies = time + 1 == times ? kTemporal - time : 1;
      resize_rows<In>(resize, frames[time], r * kPatch, (r + 1) * kPatch, scratch,
                      [&](int64_t y, const In* row) {
                        In* to = staged + time * kPlane + (y - r * kPatch) * kPatch;
                        for (int64_t w = 0; w < columns; ++w)
                          for (int64_t c = 0; c < 3; ++c, to += kSegment)
                            for (int64_t copy = 0; copy < copies; ++copy)
                              std::memcpy(to + copy * kPlane, row + c * pad + w * kPatch,
                                          kPatch * sizeof(In));
                      });
    }
    for (int64_t w = 0; w < columns; w += kMerge) {
      for (int64_t i = 0; i < 3 * kMerge; ++i)
        normalise(staged + (3 * w + i) * kSegment, values + i * kSegment, i % 3);
      copy_out(values, kMerge * kValues * sizeof(Out), out + w * kMerge * kValues, fresh);
    }
  };
  share(resize, groups, rows, num_threads,
        [&](uint8_t* scratch, int64_t group, int64_t begin, int64_t end) {
          const int64_t times = least(kTemporal, resize.n_frames - group * kTemporal);
          FrameState frames[kTemporal];
          for (int64_t time = 0; time < times; ++time)
            frames[time] =
                start_frame(resize, group * kTemporal + time, scratch, static_cast<int>(time));
          for (int64_t r = begin; r < end; ++r) {
            Out* const out = every + (group * rows + r) / kMerge * super_row;
            if (fresh && (r == begin || r % kMerge == 0)) populate(out, super_row * sizeof(Out));
            patch_row(scratch, frames, times, r, out + r % kMerge * kMerge * kValues);
          }
          stream_fence();
        });
}

template <typename Shape, typename Out>
inline void run(const VideoPatchesArgs& args, int num_threads) {
  if (args.resize.mode == ResizeMode::kFloat) return run<Shape, float, Out>(args, num_threads);
  run<Shape, uint8_t, Out>(args, num_threads);
}

template <typename Shape>
inline void run(const VideoPatchesArgs& args, int num_threads) {
  switch (args.out_dtype) {
    case DType::kBFloat16:
      return run<Shape, BFloat16>(args, num_threads);
    case DType::kFloat16:
      return run<Shape, Float16>(args, num_threads);
    default:
      return run<Shape, float>(args, num_threads);
  }
}

// The binding refuses other shapes.
void video_patches(const VideoPatchesArgs& args, int num_threads) {
  const PatchLayout& layout = args.patches;
#define VCR1_RUN(p, m, t)                                             \
  if (layout.patch == p && layout.merge == m && layout.temporal == t) \
    return run<PatchShape<p, m, t>>(args, num_threads);
  VCR1_PATCH_SHAPES(VCR1_RUN)
#undef VCR1_RUN
}

}  // namespace vcr1::cpu::VCR1_ISA

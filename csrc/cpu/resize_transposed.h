// The integer passes without gathers, for processors that have no AVX-512 VBMI.
//
// Sixteen source rows at a time are transposed, so that a vector holds one channel of two
// neighbouring pixels in all sixteen rows. The horizontal pass is then a multiply-add of whole
// vectors with a weight that they share, without shuffles; its result is transposed back into
// pairs of rows, and the vertical pass is the same multiply-add again.
#pragma once

#include "resize_walk.h"

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace vcr1::cpu::VCR1_ISA {

constexpr int64_t kPairBytes = 2 * kBlock;  // one channel of a pixel pair in all rows of a block

// Sixteen results of each of three channels: clip((sum_q w_q x_q + half) >> bits) with x_q the
// pixel pairs at source(q) + c * channel, to out + c * out_channel.
#if defined(__AVX512BW__)
template <bool kWide, typename Source>
inline void weigh(Source source, int64_t channel, const int16_t* weights, int64_t taps, int bits,
                  uint8_t* out, int64_t out_channel) {
  const __m512i half = _mm512_set1_epi32(1 << (bits - 1));
  __m512i sum0 = _mm512_setzero_si512(), sum1 = sum0, sum2 = sum0;
  __m512i low0 = half, low1 = half, low2 = half;
  for (int64_t q = 0; q < taps; ++q) {
    const uint8_t* pixels = source(q);
    const auto load = [pixels, channel](int64_t c) {
      return _mm512_cvtepu8_epi16(
          _mm256_loadu_si256(reinterpret_cast<const __m256i*>(pixels + c * channel)));
    };
    int32_t pair;
    std::memcpy(&pair, weights + 2 * q, sizeof(pair));
    const __m512i w = _mm512_set1_epi32(pair);
    const __m512i x0 = load(0), x1 = load(1), x2 = load(2);
    sum0 = _mm512_add_epi32(sum0, _mm512_madd_epi16(x0, w));
    sum1 = _mm512_add_epi32(sum1, _mm512_madd_epi16(x1, w));
    sum2 = _mm512_add_epi32(sum2, _mm512_madd_epi16(x2, w));
    if constexpr (kWide) {
      std::memcpy(&pair, weights + 2 * (taps + q), sizeof(pair));
      const __m512i v = _mm512_set1_epi32(pair);
      low0 = _mm512_add_epi32(low0, _mm512_madd_epi16(x0, v));
      low1 = _mm512_add_epi32(low1, _mm512_madd_epi16(x1, v));
      low2 = _mm512_add_epi32(low2, _mm512_madd_epi16(x2, v));
    }
  }
  const __m128i shift = _mm_cvtsi32_si128(bits);
  const auto store = [&](__m512i sum, __m512i low, int64_t c) {
    if constexpr (kWide) sum = _mm512_slli_epi32(sum, 8);
    sum = _mm512_sra_epi32(_mm512_add_epi32(sum, low), shift);
    sum = _mm512_max_epi32(sum, _mm512_setzero_si512());
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out + c * out_channel),
                     _mm512_cvtusepi32_epi8(sum));
  };
  store(sum0, low0, 0);
  store(sum1, low1, 1);
  store(sum2, low2, 2);
}
#elif defined(__AVX2__)
template <bool kWide, typename Source>
inline void weigh(Source source, int64_t channel, const int16_t* weights, int64_t taps, int bits,
                  uint8_t* out, int64_t out_channel) {
  const __m256i half = _mm256_set1_epi32(1 << (bits - 1));
  const __m128i shift = _mm_cvtsi32_si128(bits);
  const auto load = [](const uint8_t* pixels) {
    return _mm256_cvtepu8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(pixels)));
  };
  for (int64_t c = 0; c < 3; ++c) {
    __m256i sum0 = _mm256_setzero_si256(), sum1 = sum0, low0 = half, low1 = half;
    for (int64_t q = 0; q < taps; ++q) {
      const uint8_t* pixels = source(q) + c * channel;
      int32_t pair;
      std::memcpy(&pair, weights + 2 * q, sizeof(pair));
      const __m256i w = _mm256_set1_epi32(pair);
      const __m256i x0 = load(pixels), x1 = load(pixels + 16);
      sum0 = _mm256_add_epi32(sum0, _mm256_madd_epi16(x0, w));
      sum1 = _mm256_add_epi32(sum1, _mm256_madd_epi16(x1, w));
      if constexpr (kWide) {
        std::memcpy(&pair, weights + 2 * (taps + q), sizeof(pair));
        const __m256i v = _mm256_set1_epi32(pair);
        low0 = _mm256_add_epi32(low0, _mm256_madd_epi16(x0, v));
        low1 = _mm256_add_epi32(low1, _mm256_madd_epi16(x1, v));
      }
    }
    if constexpr (kWide) {
      sum0 = _mm256_slli_epi32(sum0, 8);
      sum1 = _mm256_slli_epi32(sum1, 8);
    }
    sum0 = _mm256_sra_epi32(_mm256_add_epi32(sum0, low0), shift);
    sum1 = _mm256_sra_epi32(_mm256_add_epi32(sum1, low1), shift);
    // The packs work on 128-bit halves; the permutation undoes it.
    const __m256i words = _mm256_permute4x64_epi64(_mm256_packs_epi32(sum0, sum1), 0xd8);
    _mm_storeu_si128(
        reinterpret_cast<__m128i*>(out + c * out_channel),
        _mm_packus_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1)));
  }
}
#else
template <bool kWide, typename Source>
inline void weigh(Source source, int64_t channel, const int16_t* weights, int64_t taps, int bits,
                  uint8_t* out, int64_t out_channel) {
  for (int64_t c = 0; c < 3; ++c) {
    int32_t sum[kBlock];
    for (int64_t i = 0; i < kBlock; ++i) sum[i] = 1 << (bits - 1);
    for (int64_t q = 0; q < taps; ++q) {
      const uint8_t* pixels = source(q) + c * channel;
      int32_t w0 = weights[2 * q], w1 = weights[2 * q + 1];
      if constexpr (kWide) {
        w0 = w0 * 256 + weights[2 * (taps + q)];
        w1 = w1 * 256 + weights[2 * (taps + q) + 1];
      }
      for (int64_t i = 0; i < kBlock; ++i) sum[i] += w0 * pixels[2 * i] + w1 * pixels[2 * i + 1];
    }
    for (int64_t i = 0; i < kBlock; ++i) {
      const int32_t value = sum[i] >> bits;
      out[c * out_channel + i] = static_cast<uint8_t>(value < 0 ? 0 : value > 255 ? 255 : value);
    }
  }
}
#endif

#if defined(__AVX2__)
inline __m256i load_halves(const uint8_t* low, const uint8_t* high) {
  return _mm256_inserti128_si256(
      _mm256_castsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(low))),
      _mm_loadu_si128(reinterpret_cast<const __m128i*>(high)), 1);
}

// Transposes an 8 x 8 matrix of 16-bit elements in each half of the vectors.
inline void transpose(__m256i v[8]) {
  __m256i a[8], b[8];
  for (int i = 0; i < 4; ++i) {
    a[2 * i] = _mm256_unpacklo_epi16(v[2 * i], v[2 * i + 1]);
    a[2 * i + 1] = _mm256_unpackhi_epi16(v[2 * i], v[2 * i + 1]);
  }
  for (int i = 0; i < 8; i += 4) {
    b[i] = _mm256_unpacklo_epi32(a[i], a[i + 2]);
    b[i + 1] = _mm256_unpackhi_epi32(a[i], a[i + 2]);
    b[i + 2] = _mm256_unpacklo_epi32(a[i + 1], a[i + 3]);
    b[i + 3] = _mm256_unpackhi_epi32(a[i + 1], a[i + 3]);
  }
  for (int i = 0; i < 4; ++i) {
    v[2 * i] = _mm256_unpacklo_epi64(b[i], b[i + 4]);
    v[2 * i + 1] = _mm256_unpackhi_epi64(b[i], b[i + 4]);
  }
}
#endif

// Sixteen rows to out[pair][channel][row][2]: columns [0, done) here, the caller does the rest.
inline int64_t transpose_in_vectors(const ResizeArgs& args, const uint8_t* const rows[kBlock],
                                    uint8_t* out) {
#if defined(__AVX2__)
  const int64_t width = args.horizontal.n_in;
  if (args.column_stride == 3 && args.channel_stride == 1) {
    // Four pixels a step; a load takes 16 bytes, of which the last four are the next step's.
    const __m256i pairs = _mm256_broadcastsi128_si256(
        _mm_setr_epi8(0, 3, 1, 4, 2, 5, 6, 9, 7, 10, 8, 11, -1, -1, -1, -1));
    int64_t x = 0;
    for (; 3 * x + 16 <= 3 * width; x += 4) {
      __m256i v[8];
      for (int i = 0; i < 8; ++i)
        v[i] = _mm256_shuffle_epi8(load_halves(rows[i] + 3 * x, rows[i + 8] + 3 * x), pairs);
      transpose(v);
      for (int i = 0; i < 6; ++i)
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + (x / 2 * 3 + i) * kPairBytes), v[i]);
    }
    return x;
  }
  if (args.column_stride == 1) {
    int64_t x = 0;
    for (; x + 16 <= width; x += 16) {
      for (int64_t c = 0; c < 3; ++c) {
        const int64_t at = c * args.channel_stride + x;
        __m256i v[8];
        for (int i = 0; i < 8; ++i) v[i] = load_halves(rows[i] + at, rows[i + 8] + at);
        transpose(v);
        for (int i = 0; i < 8; ++i)
          _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + ((x / 2 + i) * 3 + c) * kPairBytes),
                              v[i]);
      }
    }
    return x;
  }
#else
  (void)args, (void)rows, (void)out;
#endif
  return 0;
}

inline void transpose_in(const ResizeArgs& args, const uint8_t* const rows[kBlock], uint8_t* out) {
  for (int64_t x = transpose_in_vectors(args, rows, out); x < args.horizontal.n_in; ++x)
    for (int64_t c = 0; c < 3; ++c) {
      const int64_t at = x * args.column_stride + c * args.channel_stride;
      uint8_t* to = out + (x / 2 * 3 + c) * kPairBytes + x % 2;
      for (int64_t i = 0; i < kBlock; ++i) to[2 * i] = rows[i][at];
    }
}

// resized[c][x][row] to eight lines [c][x][2] of the ring, each a pair of rows.
inline void transpose_out(const uint8_t* resized, int64_t width, uint8_t* const lines[8]) {
  for (int64_t at = 0; at < 3 * width; at += 16) {
    const uint8_t* from = resized + at * kBlock;
#if defined(__AVX2__)
    __m256i v[8];
    for (int i = 0; i < 8; ++i) v[i] = load_halves(from + i * kBlock, from + (i + 8) * kBlock);
    transpose(v);
    for (int i = 0; i < 8; ++i)
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(lines[i] + 2 * at), v[i]);
#else
    for (int i = 0; i < 8; ++i)
      for (int j = 0; j < 16; ++j)
        std::memcpy(lines[i] + 2 * (at + j), from + j * kBlock + 2 * i, 2);
#endif
  }
}

template <bool kWide, typename Emit>
inline void resize_transposed(const ResizeArgs& args, FrameState& state, int64_t begin, int64_t end,
                              uint8_t* scratch, Emit&& emit) {
  const ResizeScratch& plan = args.layout;
  const ResizeAxis &across = args.horizontal, &down = args.vertical;
  uint8_t* const source = scratch + plan.source;
  uint8_t* const resized = scratch + plan.resized;
  uint8_t* const row = scratch + plan.row;
  auto** const taps = reinterpret_cast<const uint8_t**>(scratch + plan.pointers);
  const int64_t width = plan.width;
  const auto line = [&](int64_t pair) {
    return state.ring + pair % plan.ring_size * (width * 3 * 2);
  };
  const auto weights_of = [](const ResizeAxis& axis, int64_t i) {
    return static_cast<const int16_t*>(axis.weights) + i * axis.taps * (kWide ? 4 : 2);
  };

  const auto make = [&](int64_t block) {
    const uint8_t* rows[kBlock];
    rows_of_block(args, state.frame, block, rows);
    transpose_in(args, rows, source);
    for (int64_t x = 0; x < across.n_out; ++x) {
      const uint8_t* from = source + across.first[x] * (3 * kPairBytes);
      weigh<kWide>([from](int64_t q) { return from + q * (3 * kPairBytes); }, kPairBytes,
                   weights_of(across, x), across.taps, across.bits, resized + x * kBlock,
                   width * kBlock);
    }
    uint8_t* lines[kBlock / 2];
    for (int64_t i = 0; i < kBlock / 2; ++i) lines[i] = line(block * (kBlock / 2) + i);
    transpose_out(resized, width, lines);
  };
  const int64_t pairs = (down.n_in + 1) / 2;
  const auto lines = [&](int64_t y) {
    return Lines{down.first[y], least(down.first[y] + down.taps, pairs)};
  };
  walk(state, kBlock / 2, begin, end, lines, make, [&](int64_t y, int64_t first, int64_t) {
    for (int64_t q = 0; q < down.taps; ++q) taps[q] = line(first + q);
    for (int64_t x = 0; x < width; x += 16)
      weigh<kWide>([taps, x](int64_t q) { return taps[q] + 2 * x; }, 2 * width, weights_of(down, y),
                   down.taps, down.bits, row + x, width);
    emit(y, static_cast<const uint8_t*>(row));
  });
}

}  // namespace vcr1::cpu::VCR1_ISA

// The integer passes for AVX-512 VBMI and VNNI, on the tables of GatherTables.
//
// A 16-bit weight times a byte is two byte products, of the weight's high and of its low byte:
// exact, and a vpdpbusd makes 64 of them where a vpmaddwd of widened bytes makes 32. Across, vpermb
// gathers the four taps of sixteen output values out of 64 neighbouring bytes of one source row,
// RGB or planar, without a transposition. Four rows' results are interleaved by bytes, which is how
// the pass down takes them: a line of the ring is [channel][x][four rows].
#pragma once

#include <immintrin.h>

#include <type_traits>

#include "resize_walk.h"

namespace vcr1::cpu::VCR1_ISA {

constexpr int64_t kQuad = 4;  // neighbouring source rows, or taps, in a 32-bit lane
constexpr int64_t kWindow = 64;
constexpr int64_t kLines = kBlock / kQuad;

// A count that the compiler knows, so that weights stay in registers, or 0: only known at run time.
template <int kKnown>
inline int64_t count_of(int64_t count) {
  return kKnown > 0 ? kKnown : count;
}

// Four vectors of sixteen sums over quads, rounded, shifted and clipped: pixels(v, q) are bytes,
// weights(q, part) signed bytes. In each quarter of the result stand four values of vector 0, then
// those of vectors 1, 2 and 3. Each part of the weights has its own sum: half as long a chain.
template <int kParts, int kKnown, typename Pixels, typename Weights>
__attribute__((always_inline)) inline __m512i weigh_quads(int64_t count, int bits, Pixels pixels,
                                                          Weights weights) {
  __m512i part_sum[4][kParts], sum[4];
  for (int v = 0; v < 4; ++v)
    for (int part = 0; part < kParts; ++part)
      part_sum[v][part] = _mm512_set1_epi32(part == kParts - 1 ? 1 << (bits - 1) : 0);
  for (int64_t q = 0; q < count_of<kKnown>(count); ++q)
    for (int v = 0; v < 4; ++v) {
      const __m512i x = pixels(v, q);
      for (int part = 0; part < kParts; ++part)
        part_sum[v][part] = _mm512_dpbusd_epi32(part_sum[v][part], x, weights(q, part));
    }
  for (int v = 0; v < 4; ++v) {
    sum[v] = part_sum[v][0];
    for (int part = 1; part < kParts; ++part)
      sum[v] = _mm512_add_epi32(_mm512_slli_epi32(sum[v], 8), part_sum[v][part]);
  }
  for (int v = 0; v < 4; ++v) sum[v] = _mm512_srav_epi32(sum[v], _mm512_set1_epi32(bits));
  return _mm512_packus_epi16(_mm512_packs_epi32(sum[0], sum[1]),
                             _mm512_packs_epi32(sum[2], sum[3]));
}

struct AcrossRows {
  const GatherAcross& table;
  const ResizeAxis& axis;
  const uint8_t* rows[kBlock];
  int64_t lines;        // of four rows: a frame's last block may be cut off
  uint8_t* to[kLines];  // of one channel, or of the first
  int64_t plane;        // bytes of a channel in a line
  int64_t next;         // from a row to the one of the next block
};

template <int kParts, int kPlanes, int kQuads>
void gather_across(const AcrossRows& block) {
  const GatherAcross& table = block.table;
  const int64_t quads = count_of<kQuads>(table.quads), pixels = table.pixels;
  const int bits = block.axis.bits;
  const __m512i interleave =
      _mm512_broadcast_i32x4(_mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15));
  const uint32_t plane = (1u << pixels) - 1;
  for (int64_t g = 0; g < table.groups; ++g) {
    const int64_t x = least(g * pixels, block.axis.n_out - pixels);
    const int32_t* base = table.base + g * quads;
    const auto* vectors =
        reinterpret_cast<const __m512i*>(table.vectors) + g * quads * (1 + kParts);
    for (int64_t i = 0; i < block.lines; ++i) {
      const uint8_t* const* rows = block.rows + i * kQuad;
      for (int r = 0; r < kQuad; ++r)
        _mm_prefetch(reinterpret_cast<const char*>(rows[r] + base[0] + block.next), _MM_HINT_T1);
      const auto gather = [&](int r, int64_t q) {
        return _mm512_permutexvar_epi8(vectors[q * (1 + kParts)],
                                       _mm512_loadu_si512(rows[r] + base[q]));
      };
      const auto weights = [&](int64_t q, int part) {
        return vectors[q * (1 + kParts) + 1 + part];
      };
      const __m512i out = _mm512_shuffle_epi8(
          weigh_quads<kParts, kQuads>(quads, bits, gather, weights), interleave);
      // The lanes of channel c start at c * pixels.
      for (int c = 0; c < kPlanes; ++c)
        _mm512_mask_storeu_epi32(block.to[i] + c * block.plane + (x - c * pixels) * kQuad,
                                 static_cast<__mmask16>(plane << (c * pixels)), out);
    }
  }
}

template <int kParts, int kPlanes>
inline void gather_across(const AcrossRows& block) {
  switch (block.table.quads) {
    case 1:
      return gather_across<kParts, kPlanes, 1>(block);
    case 2:
      return gather_across<kParts, kPlanes, 2>(block);
    case 3:
      return gather_across<kParts, kPlanes, 3>(block);
    case 4:
      return gather_across<kParts, kPlanes, 4>(block);
    default:
      return gather_across<kParts, kPlanes, 0>(block);
  }
}

// One output row of `values` bytes, a multiple of 64, from `count` lines.
template <int kParts, int kCount, typename LineOf>
inline void weigh_lines(LineOf line_of, int64_t count, const int8_t* weights, int bits,
                        int64_t values, uint8_t* row) {
  const __m512i in_order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  const uint8_t* lines[kCount > 0 ? kCount : 1];
  for (int q = 0; q < kCount; ++q) lines[q] = line_of(q);
  const auto weight = [&](int64_t q, int part) {
    int32_t four;
    std::memcpy(&four, weights + (q * kParts + part) * kQuad, sizeof(four));
    return _mm512_set1_epi32(four);
  };
  for (int64_t x = 0; x < values; x += 64) {
    const auto load = [&](int v, int64_t q) {
      return _mm512_loadu_si512((kCount > 0 ? lines[q] : line_of(q)) + (x + 16 * v) * kQuad);
    };
    const __m512i out = weigh_quads<kParts, kCount>(count, bits, load, weight);
    _mm512_storeu_si512(row + x, _mm512_permutexvar_epi32(in_order, out));
  }
}

// Rows of which 64 bytes may be read from each place in the image: where it is neither RGB bytes
// nor planes, or too narrow, they are copied to `packed` as RGB.
inline const GatherAcross& readable_rows(const ResizeArgs& args, const uint8_t* rows[kBlock],
                                         uint8_t* packed) {
  const int64_t width = args.horizontal.n_in;
  if (args.column_stride == 3 && args.channel_stride == 1 && 3 * width >= kWindow)
    return args.gather.packed;
  if (args.column_stride == 1 && width >= kWindow) return args.gather.planar;
  const int64_t stride = width * 3 < kWindow ? kWindow : width * 3;
  for (int64_t i = 0; i < kBlock; ++i) {
    uint8_t* const to = packed + i * stride;
    for (int64_t x = 0; x < width; ++x)
      for (int64_t c = 0; c < 3; ++c)
        to[3 * x + c] = rows[i][x * args.column_stride + c * args.channel_stride];
    rows[i] = to;
  }
  return args.gather.packed;
}

template <int kParts, typename Emit>
inline void resize_gather(const ResizeArgs& args, FrameState& state, int64_t begin, int64_t end,
                          uint8_t* scratch, Emit&& emit) {
  const GatherDown& down = args.gather.down;
  const int64_t values = (3 * args.layout.width + 63) / 64 * 64;
  const int64_t ring_size = down.quads + kLines;
  const int64_t all = (args.vertical.n_in + kQuad - 1) / kQuad;
  const int64_t plane = args.layout.width * kQuad;
  uint8_t* const row = scratch + args.layout.row;
  const auto line = [&](int64_t i) { return state.ring + i % ring_size * (values * kQuad); };

  const auto make = [&](int64_t number) {
    const uint8_t* rows[kBlock];
    rows_of_block(args, state.frame, number, rows);
    const GatherAcross& table = readable_rows(args, rows, scratch + args.layout.source);
    const int64_t first = number * kLines;
    AcrossRows block{table, args.horizontal,         {}, least(kLines, all - first), {},
                     plane, kBlock * args.row_stride};
    std::memcpy(block.rows, rows, sizeof(rows));
    for (int64_t i = 0; i < kLines; ++i) block.to[i] = line(first + i);
    if (table.planes == 3) return gather_across<kParts, 3>(block);
    for (int64_t c = 0; c < 3; ++c) {
      gather_across<kParts, 1>(block);
      for (const uint8_t*& from : block.rows) from += args.channel_stride;
      for (uint8_t*& to : block.to) to += plane;
    }
  };
  const auto lines_of = [&](int64_t y) {
    return Lines{down.first[y], down.first[y] + down.count[y]};
  };
  walk(state, kLines, begin, end, lines_of, make, [&](int64_t y, int64_t first, int64_t count) {
    const auto line_of = [&](int64_t q) { return line(first + q); };
    const auto weigh = [&](auto known) {
      weigh_lines<kParts, decltype(known)::value>(line_of, count,
                                                  down.weights + y * down.quads * kParts * kQuad,
                                                  args.vertical.bits, values, row);
    };
    switch (count) {
      case 1:
        weigh(std::integral_constant<int, 1>());
        break;
      case 2:
        weigh(std::integral_constant<int, 2>());
        break;
      case 3:
        weigh(std::integral_constant<int, 3>());
        break;
      case 4:
        weigh(std::integral_constant<int, 4>());
        break;
      default:
        weigh(std::integral_constant<int, 0>());
    }
    emit(y, static_cast<const uint8_t*>(row));
  });
}

}  // namespace vcr1::cpu::VCR1_ISA

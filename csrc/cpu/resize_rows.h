// Separable resize of RGB frames, an output row at a time: the part that resize_frames and
// video_patches share. Included by files compiled once per instruction set.
//
// The h-resized rows live in a ring that stays in cache; a frame is never held resized in one
// direction.
#pragma once

#include <atomic>

#include "parallel.h"
#include "resize_walk.h"

#if defined(__AVX512VBMI__)
#include "resize_gather.h"
#else
#include "resize_transposed.h"
#endif

namespace vcr1::cpu::VCR1_ISA {

// The fp32 passes. Products are added left to right and not fused (the build turns contraction
// off), which keeps the bits of the reference on every instruction set.
template <typename Emit>
inline void resize_float(const ResizeArgs& args, FrameState& state, int64_t begin, int64_t end,
                         uint8_t* scratch, Emit&& emit) {
  const ResizeScratch& plan = args.layout;
  const ResizeAxis &across = args.horizontal, &down = args.vertical;
  auto* const source = reinterpret_cast<float*>(scratch + plan.source);
  auto* const row = reinterpret_cast<float*>(scratch + plan.row);
  const int64_t width = plan.width;
  const auto line = [&](int64_t y) {
    return reinterpret_cast<float*>(state.ring) + y % plan.ring_size * (width * 3);
  };
  const auto weights_of = [](const ResizeAxis& axis, int64_t i) {
    return static_cast<const float*>(axis.weights) + i * axis.taps;
  };

  const auto make = [&](int64_t block) {
    const uint8_t* rows[kBlock];
    rows_of_block(args, state.frame, block, rows);
    for (int64_t x = 0; x < across.n_in; ++x)
      for (int64_t c = 0; c < 3; ++c)
        for (int64_t i = 0; i < kBlock; ++i)
          source[(x * 3 + c) * kBlock + i] =
              rows[i][x * args.column_stride + c * args.channel_stride];
    for (int64_t x = 0; x < across.n_out; ++x) {
      const int64_t first = across.first[x], taps = least(across.taps, across.n_in - first);
      const float* weights = weights_of(across, x);
      for (int64_t c = 0; c < 3; ++c) {
        float sum[kBlock] = {};
        for (int64_t q = 0; q < taps; ++q)
          for (int64_t i = 0; i < kBlock; ++i)
            sum[i] += weights[q] * source[((first + q) * 3 + c) * kBlock + i];
        for (int64_t i = 0; i < kBlock; ++i) line(block * kBlock + i)[c * width + x] = sum[i];
      }
    }
  };
  const auto lines = [&](int64_t y) {
    return Lines{down.first[y], least(down.first[y] + down.taps, down.n_in)};
  };
  walk(state, kBlock, begin, end, lines, make, [&](int64_t y, int64_t first, int64_t taps) {
    const float* weights = weights_of(down, y);
    for (int64_t c = 0; c < 3; ++c) {
      float* to = row + c * width;
      for (int64_t x = 0; x < across.n_out; ++x) to[x] = 0.0f;
      for (int64_t q = 0; q < taps; ++q) {
        const float* from = line(first + q) + c * width;
        const float weight = weights[q];
        for (int64_t x = 0; x < across.n_out; ++x) to[x] += weight * from[x];
      }
    }
    emit(y, static_cast<const float*>(row));
  });
}

// Clamped to 0..255, rounded half to even.
inline void round_row(const float* from, int64_t n, uint8_t* to) {
  for (int64_t x = 0; x < n; ++x) {
    const float value = from[x] < 0.0f ? 0.0f : from[x] > 255.0f ? 255.0f : from[x];
    // Adding 1.5 * 2^23 leaves no fraction bits: the addition rounds.
    to[x] = static_cast<uint8_t>(static_cast<int32_t>((value + 12582912.0f) - 12582912.0f));
  }
}

template <typename Emit>
inline void copy_rows(const ResizeArgs& args, const uint8_t* frame, int64_t begin, int64_t end,
                      uint8_t* scratch, Emit&& emit) {
  uint8_t* const row = scratch + args.layout.row;
  const bool packed = args.column_stride == 3 && args.channel_stride == 1;
  for (int64_t y = begin; y < end; ++y) {
    const uint8_t* from = frame + y * args.row_stride;
    if (packed) {
      // Distances known to the compiler: it takes the channels apart with whole vectors.
      uint8_t *__restrict red = row, *__restrict green = row + args.layout.width,
                           *__restrict blue = row + 2 * args.layout.width;
      for (int64_t x = 0; x < args.horizontal.n_in; ++x) {
        red[x] = from[3 * x];
        green[x] = from[3 * x + 1];
        blue[x] = from[3 * x + 2];
      }
      emit(y, static_cast<const uint8_t*>(row));
      continue;
    }
    for (int64_t c = 0; c < 3; ++c)
      for (int64_t x = 0; x < args.horizontal.n_in; ++x)
        row[c * args.layout.width + x] = from[x * args.column_stride + c * args.channel_stride];
    emit(y, static_cast<const uint8_t*>(row));
  }
}

template <typename Emit>
inline void resize_int(const ResizeArgs& args, FrameState& state, int64_t begin, int64_t end,
                       uint8_t* scratch, Emit&& emit) {
#if defined(__AVX512VBMI__)
  if (args.gather.parts == 2)
    resize_gather<2>(args, state, begin, end, scratch, emit);
  else
    resize_gather<3>(args, state, begin, end, scratch, emit);
#else
  if (args.mode == ResizeMode::kInt16)
    resize_transposed<false>(args, state, begin, end, scratch, emit);
  else
    resize_transposed<true>(args, state, begin, end, scratch, emit);
#endif
}

// One of a worker's two frames at a time: `ring` is 0 or 1.
inline FrameState start_frame(const ResizeArgs& args, int64_t t, uint8_t* scratch, int ring) {
  return {args.frames + t * args.frame_stride,
          scratch + args.layout.ring + ring * args.layout.ring_bytes};
}

// Calls emit(y, row) for the output rows [begin, end): row[c * layout.width + x], of `Row`: float
// for kFloat, uint8_t for the other modes.
template <typename Row, typename Emit>
inline void resize_rows(const ResizeArgs& args, FrameState& state, int64_t begin, int64_t end,
                        uint8_t* scratch, Emit&& emit) {
  if constexpr (sizeof(Row) == sizeof(float)) {
    resize_float(args, state, begin, end, scratch, emit);
  } else {
    switch (args.mode) {
      case ResizeMode::kCopy:
        return copy_rows(args, state.frame, begin, end, scratch, emit);
      case ResizeMode::kInt16:
      case ResizeMode::kInt22:
        return resize_int(args, state, begin, end, scratch, emit);
      default:
        return resize_float(args, state, begin, end, scratch, [&](int64_t y, const float* row) {
          uint8_t* const rounded = scratch + args.layout.resized;
          for (int64_t c = 0; c < 3; ++c)
            round_row(row + c * args.layout.width, args.horizontal.n_out,
                      rounded + c * args.layout.width);
          emit(y, static_cast<const uint8_t*>(rounded));
        });
    }
  }
}

// Deals groups * units units of work to the threads: fn(scratch, group, begin, end) for each run's
// part of a group. Several runs a thread, taken as they come, because one may start late; of whole
// groups where there are enough of them, because rows are computed again where a run begins inside
// one.
template <typename Fn>
inline void share(const ResizeArgs& args, int64_t groups, int64_t units, int num_threads, Fn&& fn) {
  const int64_t total = groups * units, workers = least(num_threads, total);
  const int64_t runs = workers == 1 ? 1 : least(4 * workers, total);
  const int64_t step = groups >= runs ? units : 1;
  const auto start_of = [&](int64_t run) { return total / step * run / runs * step; };
  std::atomic<int64_t> next{0};
  parallel_for(workers, 1, static_cast<int>(workers), [&](int64_t worker, int64_t) {
    for (int64_t run; (run = next.fetch_add(1, std::memory_order_relaxed)) < runs;) {
      const int64_t stop = start_of(run + 1);
      for (int64_t at = start_of(run); at < stop;) {
        const int64_t begin = at % units, end = least(units, begin + stop - at);
        fn(args.scratch + worker * args.layout.total, at / units, begin, end);
        at += end - begin;
      }
    }
  });
}

}  // namespace vcr1::cpu::VCR1_ISA

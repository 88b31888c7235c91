// How the resize kernels walk down a frame: what every way of making rows shares.
#pragma once

#include <cstring>

#include "../kernels.h"

namespace vcr1::cpu::VCR1_ISA {

constexpr int64_t kBlock = 16;  // source rows resized together

inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

// A frame on its way: the h-resized rows that live in its ring, and how many blocks were made.
struct FrameState {
  const uint8_t* frame = nullptr;
  uint8_t* ring = nullptr;
  int64_t made = 0;
};

struct Lines {
  int64_t first, past;
};

// For each output row, makes the blocks of lines that it reads and that no earlier row needed, then
// emits it. A line is a row, or some neighbouring ones. Calls for one state come in rising order.
template <typename LinesOf, typename Make, typename Emit>
inline void walk(FrameState& state, int64_t lines_per_block, int64_t begin, int64_t end,
                 LinesOf lines_of, Make make, Emit emit) {
  for (int64_t y = begin; y < end; ++y) {
    const Lines lines = lines_of(y);
    const int64_t skipped = lines.first / lines_per_block;
    if (state.made < skipped) state.made = skipped;
    for (; state.made * lines_per_block < lines.past; ++state.made) make(state.made);
    emit(y, lines.first, lines.past - lines.first);
  }
}

inline void rows_of_block(const ResizeArgs& args, const uint8_t* frame, int64_t block,
                          const uint8_t* rows[kBlock]) {
  for (int64_t i = 0; i < kBlock; ++i)
    rows[i] = frame + least(block * kBlock + i, args.vertical.n_in - 1) * args.row_stride;
}

}  // namespace vcr1::cpu::VCR1_ISA

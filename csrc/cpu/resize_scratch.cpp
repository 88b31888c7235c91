// The memory plan of the resize kernels. Compiled once, unlike the kernels, which only read it.
#include <algorithm>

#include "../kernels.h"

namespace vcr1::cpu {

namespace {
constexpr int64_t kBlock = 16;  // rows resized together

// One plan serves every shape: a plan is made before the layout is known, and the largest costs
// only address space.
#define VCR1_VALUES_PER_COLUMN(p, m, t) PatchShape<p, m, t>::kValues / p,
#define VCR1_VALUES_CAST(p, m, t) m *PatchShape<p, m, t>::kValues,
#define VCR1_FRAMES_HELD(p, m, t) t,
constexpr int kValuesPerColumn = std::max({VCR1_PATCH_SHAPES(VCR1_VALUES_PER_COLUMN) 0});
constexpr int kValuesCast = std::max({VCR1_PATCH_SHAPES(VCR1_VALUES_CAST) 0});
constexpr int kFramesHeld = std::max({VCR1_PATCH_SHAPES(VCR1_FRAMES_HELD) 0});

int64_t round_up(int64_t value, int64_t multiple) {
  return (value + multiple - 1) / multiple * multiple;
}
}  // namespace

void plan_scratch(ResizeArgs& args) {
  ResizeScratch& plan = args.layout;
  const bool is_float = args.mode == ResizeMode::kFloat || args.mode == ResizeMode::kFloatRounded;
  const int64_t element = is_float ? sizeof(float) : 1;
  plan.width = round_up(args.horizontal.n_out, 16);
  plan.ring_size = args.vertical.taps + (is_float ? kBlock : kBlock / 2);

  int64_t end = 0;
  const auto take = [&end](int64_t bytes) {
    const int64_t begin = end;
    end += round_up(bytes, 64);
    return begin;
  };
  const int64_t values = round_up(plan.width * 3, 64);  // of a resized row
  // Padded pairs may be read past the width, with weight zero.
  const int64_t columns =
      is_float ? args.horizontal.n_in : 2 * ((args.horizontal.n_in + 1) / 2 + args.horizontal.taps);
  plan.source = take(std::max<int64_t>(columns * 3, 128) * kBlock * element);
  plan.resized = take(plan.width * 3 * kBlock * element);
  plan.pointers = take(args.vertical.taps * static_cast<int64_t>(sizeof(void*)));
  plan.row = take(values * element);
  // Lines of floats, of pairs of bytes, or of quads of them: a block of new ones beside those read.
  const int64_t quad_lines = args.gather.down.quads + kBlock / 4;
  plan.ring_bytes =
      round_up(is_float ? plan.ring_size * values * element
                        : std::max(plan.ring_size * values * 2, quad_lines * values * 4),
               64);
  plan.ring = take(kFramesHeld * plan.ring_bytes);
  // The kernels write whole vectors: up to 64 values past the end.
  constexpr int64_t kPad = 64;
  plan.staged = take((args.horizontal.n_out * kValuesPerColumn + kPad) * sizeof(float));
  plan.cast = take((kValuesCast + kPad) * sizeof(float));
  plan.total = end;
}

}  // namespace vcr1::cpu

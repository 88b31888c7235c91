// The memory plan of resize_rows.h. Compiled once, unlike the kernels, which only read it.
#include "../kernels.h"

namespace vcr1::cpu {

namespace {
constexpr int64_t kBlock = 16;  // rows resized together
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
  // Padded pairs may be read past the width, with weight zero.
  const int64_t columns =
      is_float ? args.horizontal.n_in : 2 * ((args.horizontal.n_in + 1) / 2 + args.horizontal.taps);
  plan.source = take(columns * 3 * kBlock * element);
  plan.resized = take(plan.width * 3 * kBlock * element);
  plan.ring = take(plan.ring_size * plan.width * 3 * (is_float ? element : 2));
  plan.pointers = take(args.vertical.taps * static_cast<int64_t>(sizeof(void*)));
  plan.row = take(plan.width * 3 * element);
  plan.cast = take(plan.width * 3 * static_cast<int64_t>(sizeof(float)));
  plan.total = end;
}

}  // namespace vcr1::cpu

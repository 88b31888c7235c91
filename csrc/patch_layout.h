// How video_patches cuts resized frames into patches: PatchLayout of
// vcr1_fast/ops/video_patches.py.
#pragma once

// The shapes (patch, merge, temporal) that the kernels are compiled for. A model family with
// another one adds it here; the CPU kernels, the CUDA kernels, their scratch memory and the error
// message follow.
#define VCR1_PATCH_SHAPES(APPLY) APPLY(14, 2, 2) APPLY(16, 2, 2)

namespace vcr1 {

struct PatchLayout {
  int patch, merge, temporal;
  float offset[3], scale[3];  // a value x of a channel becomes (x - offset) / scale
};

// A shape at compile time: divisions by these become multiplications, copies have a fixed size.
template <int kPatch_, int kMerge_, int kTemporal_>
struct PatchShape {
  static constexpr int kPatch = kPatch_, kMerge = kMerge_, kTemporal = kTemporal_;
  static constexpr int kPlane = kPatch * kPatch;       // values of a channel at one time
  static constexpr int kSegment = kTemporal * kPlane;  // values of a channel in a patch
  static constexpr int kValues = 3 * kSegment;         // values of a patch
};

}  // namespace vcr1

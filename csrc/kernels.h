// Every launcher's signature, CPU beside CUDA: the native table of contents.
//
// A launcher takes one struct of pointers, sizes and strides; it allocates nothing and does not
// synchronise. CPU launchers take the number of threads last, CUDA launchers the stream; the latter
// exist only in builds with CUDA.
#pragma once

#include <cstdint>

#include "cpu/isa.h"
#include "dtype.h"
#include "group_attention.h"
#include "grpo_loss.h"
#include "patch_layout.h"

// Declares `void name(const Args&, int num_threads)` once per instruction set, as CMake's
// vcr1_cpu_kernel() compiles it, and the function that picks one at run time. _VBMI: with a variant
// for AVX-512 VBMI and VNNI, where the others run their AVX-512 one.
#ifdef VCR1_MULTI_ISA
#define VCR1_CPU_VARIANT(isa, name, Args)       \
  namespace isa {                               \
  void name(const Args& args, int num_threads); \
  }
#define VCR1_CPU_DISPATCH(name, Args, best)             \
  VCR1_CPU_VARIANT(baseline, name, Args)                \
  VCR1_CPU_VARIANT(avx2, name, Args)                    \
  VCR1_CPU_VARIANT(avx512, name, Args)                  \
  inline void name(const Args& args, int num_threads) { \
    switch (isa()) {                                    \
      case Isa::kAvx512Vbmi:                            \
        return best::name(args, num_threads);           \
      case Isa::kAvx512:                                \
        return avx512::name(args, num_threads);         \
      case Isa::kAvx2:                                  \
        return avx2::name(args, num_threads);           \
      case Isa::kBaseline:                              \
        return baseline::name(args, num_threads);       \
    }                                                   \
  }
#define VCR1_CPU_LAUNCHER(name, Args) VCR1_CPU_DISPATCH(name, Args, avx512)
#define VCR1_CPU_LAUNCHER_VBMI(name, Args) \
  VCR1_CPU_VARIANT(avx512vbmi, name, Args) \
  VCR1_CPU_DISPATCH(name, Args, avx512vbmi)
#else
#define VCR1_CPU_LAUNCHER(name, Args)           \
  namespace baseline {                          \
  void name(const Args& args, int num_threads); \
  }                                             \
  inline void name(const Args& args, int num_threads) { baseline::name(args, num_threads); }
#define VCR1_CPU_LAUNCHER_VBMI(name, Args) VCR1_CPU_LAUNCHER(name, Args)
#endif

namespace vcr1 {

// Rows of any strides: row r of the flattened leading dimensions starts `offset(r)` elements in.
struct RowLayout {
  static constexpr int kMaxDims = 7;
  int ndim = 0;
  int64_t size[kMaxDims] = {};
  int64_t stride[kMaxDims] = {};
};

#ifdef __CUDACC__
#define VCR1_HOST_DEVICE __host__ __device__
#else
#define VCR1_HOST_DEVICE
#endif

VCR1_HOST_DEVICE static inline int64_t row_offset(const RowLayout& layout, int64_t row) {
  int64_t offset = 0;
  for (int i = layout.ndim - 1; i > 0; --i) {
    offset += row % layout.size[i] * layout.stride[i];
    row /= layout.size[i];
  }
  return layout.ndim > 0 ? offset + row * layout.stride[0] : 0;
}

// What forward and backward share. Logits: fp32, bf16 or fp16, last stride 1.
struct GatherLogprobsInput {
  DType dtype;
  const void* logits;
  RowLayout layout;
  int64_t rows, vocab, k;
  const int64_t* labels;         // (rows, k)
  const bool* mask;              // (rows,) or null: false rows are not read
  const float* row_temperature;  // (rows,) or null: `temperature` for all
  float temperature;
};

struct GatherLogprobsForward {
  GatherLogprobsInput in;
  float* logps;    // (rows, k)
  float* entropy;  // (rows,) or null: not computed
  float* lse;      // (rows,)
  float* stats;    // (rows, 3): max logit, log of the shifted sum, mean of the shifted logits
};

struct GatherLogprobsBackward {
  GatherLogprobsInput in;
  const float* logps;         // (rows, k), of the forward pass
  const float* stats;         // (rows, 3)
  const float* grad_logps;    // (rows, k)
  const float* grad_entropy;  // (rows,) or null
  const float* grad_lse;      // (rows,) or null
  void* grad;                 // dtype of the logits; may be the logits themselves
  RowLayout grad_layout;
};

namespace cpu {
VCR1_CPU_LAUNCHER(gather_logprobs, GatherLogprobsForward)
VCR1_CPU_LAUNCHER(gather_logprobs_backward, GatherLogprobsBackward)
}  // namespace cpu

namespace cuda {
void gather_logprobs(const GatherLogprobsForward& args, void* stream);
void gather_logprobs_backward(const GatherLogprobsBackward& args, void* stream);
}  // namespace cuda

}  // namespace vcr1

namespace vcr1::cpu {

// One axis of a resize, as ops/resize_frames.py lays it out. Integer tables read pixels in pairs
// (2k, 2k + 1): first counts pairs, weights are int16 (n_out, parts, 2 * taps), where part 0 of two
// holds w >> 8 and part 1 w & 255. Float tables: first counts pixels, weights are (n_out, taps).
struct ResizeAxis {
  const int32_t* first;
  const void* weights;
  int64_t taps;
  int64_t n_in, n_out;
  int bits;
};

enum class ResizeMode { kCopy, kInt16, kInt22, kFloat, kFloatRounded };

// The integer tables once more, for kernels that gather bytes (cpu/resize_gather.h): taps by fours,
// weights as signed bytes, w = (part[0] * 256 + part[1]) * 256 + ... in `parts` parts.
//
// Across: one vector makes `pixels` output pixels of `planes` channels, a lane of four taps each.
// Its vectors (groups, quads, 1 + parts, 64) hold which bytes of a window of 64 the lanes take,
// then the weights by part; base (groups, quads) is the window's first byte in the source row.
struct GatherAcross {
  const uint8_t* vectors;  // aligned to 64
  const int32_t* base;
  int64_t groups, quads, pixels, planes;
};

// Down: output row y reads the quads [first[y], first[y] + count[y]) of source rows, with weights
// (n_out, quads, parts, 4).
struct GatherDown {
  const int32_t* first;
  const int32_t* count;
  const int8_t* weights;
  int64_t quads;
};

struct GatherTables {
  int parts;                    // 2, or 3 where a weight needs them
  GatherAcross packed, planar;  // of RGB bytes, of one channel
  GatherDown down;
};

// Where one worker keeps what, in bytes from the start of its part of the scratch memory.
struct ResizeScratch {
  int64_t source, resized, pointers, row;
  int64_t ring, ring_bytes;  // a ring for each frame that video_patches holds at a time
  int64_t staged, cast;      // video_patches: a row of patches, and the values of `merge` patches
  int64_t total;             // a multiple of 64
  int64_t ring_size;         // lines of resized rows (int: row pairs) kept for the vertical pass
  int64_t width;             // the output width, padded to whole vectors
};

struct ResizeArgs {
  const uint8_t* frames;  // RGB, any strides (in bytes)
  int64_t n_frames, frame_stride, row_stride, column_stride, channel_stride;
  ResizeAxis horizontal, vertical;
  GatherTables gather;
  ResizeMode mode;
  ResizeScratch layout;
  uint8_t* scratch;  // num_threads * layout.total bytes, aligned to 64
};

// Fills `layout` from the axes, the mode and `gather`.
void plan_scratch(ResizeArgs& args);

struct ResizeFramesArgs {
  ResizeArgs resize;
  void* out;  // uint8, or float for kFloat; strides in elements
  int64_t out_frame_stride, out_row_stride, out_column_stride, out_channel_stride;
};
VCR1_CPU_LAUNCHER_VBMI(resize_frames, ResizeFramesArgs)

struct VideoPatchesArgs {
  ResizeArgs resize;
  void* out;  // (N, 3 * temporal * patch * patch)
  DType out_dtype;
  PatchLayout patches;
};
VCR1_CPU_LAUNCHER_VBMI(video_patches, VideoPatchesArgs)

}  // namespace vcr1::cpu

namespace vcr1::cuda {

// kMatrix16 and kMatrix22 run on the tensor cores, which take weights of 16 and 24 bits by bytes.
enum class ResizeMethod { kCopy, kMatrix16, kMatrix22, kInt, kFloat, kFloatRounded };

// One axis of a resize. Scalar methods: weights are int32 or float (n_out, taps), first (n_out,)
// holds the first pixel read. Matrix methods: see `tile_table` of vcr1_fast/ops/resize_frames.py.
struct ResizeAxis {
  const int32_t* first;
  const void* weights;
  int32_t n_in, n_out, bits;
  int32_t taps;
  int32_t tile;         // outputs of one block
  int32_t groups;       // of 16 outputs in a tile
  int32_t steps;        // of 32 pixels that a group's weights fill
  int32_t span, reach;  // most pixels of a tile: read, and stepped over
};

struct ResizeArgs {
  const uint8_t* frames;  // RGB, any strides (in bytes)
  int64_t n_frames, frame_stride, row_stride, column_stride, channel_stride;
  ResizeAxis horizontal, vertical;
  ResizeMethod method;
  // Matrix methods: shared memory, bytes. Filled by plan_shared().
  int32_t source_pitch, strip_bytes, source_bytes, column_pitch, shared_bytes;
};

void plan_shared(ResizeArgs& args);

struct ResizeFramesArgs {
  ResizeArgs resize;
  void* out;  // uint8, or float for kFloat; strides in elements
  int64_t out_frame_stride, out_row_stride, out_column_stride, out_channel_stride;
};
void resize_frames(const ResizeFramesArgs& args, void* stream);

struct VideoPatchesArgs {
  ResizeArgs resize;
  void* out;  // (N, 3 * temporal * patch * patch)
  DType out_dtype;
  PatchLayout patches;
};
void video_patches(const VideoPatchesArgs& args, void* stream);

}  // namespace vcr1::cuda

namespace vcr1 {

enum class IouKind { kSpan, kIou, kGiou, kDiou, kCiou };

struct BoxIouArgs {
  DType dtype;  // float32 or float64
  IouKind kind;
  bool pairwise;     // out (n, m), else out (n,) with n == m
  bool torchvision;  // its conventions for empty boxes
  // Spans (n, 2) or boxes (n, 4). CPU: (n, 5) for kCiou, atan(w / h) last, and where pairwise,
  // planes: (2, n), (4, n) or (5, n).
  const void *a, *b;
  void* out;
  int64_t n, m;
};

struct TrackIouArgs {
  DType dtype;
  const void *pred, *target;  // (batch, steps, 4)
  const int64_t* lengths;     // (batch,), 0 .. steps
  void* out;                  // (batch,)
  int64_t batch, steps;
};

struct IntervalSetIouArgs {
  double *pred, *target;                         // (p, 2), (q, 2): sorted and merged in place
  const int64_t *pred_offsets, *target_offsets;  // (n + 1,)
  double* out;                                   // (n,)
  double empty;
  int64_t n, p, q;
};

namespace cpu {
VCR1_CPU_LAUNCHER(box_iou, BoxIouArgs)
VCR1_CPU_LAUNCHER(track_iou, TrackIouArgs)
VCR1_CPU_LAUNCHER(interval_set_iou, IntervalSetIouArgs)
}  // namespace cpu

namespace cuda {
void box_iou(const BoxIouArgs& args, void* stream);
void track_iou(const TrackIouArgs& args, void* stream);
void interval_set_iou(const IntervalSetIouArgs& args, void* stream);
}  // namespace cuda

}  // namespace vcr1

namespace vcr1 {

// Log-probs and what belongs to them, N tokens in B completions. All pointers are dense, and of
// `dtype` where they are void: fp32 or fp64. Null: not given.
struct GrpoLossArgs {
  DType dtype;
  int64_t sequences, tokens;
  int64_t columns;         // tokens a completion, where there are no offsets
  const int64_t* offsets;  // (B + 1,) or null: (B, columns)
  const void* logps;
  const void* old_logps;  // null: the log-probs themselves
  const void* advantages;
  bool token_advantages;  // (N,) instead of (B,)
  const bool* mask;
  const void* ref_logps;
  const void* entropy;
  const void* rollout_logps;
  const void* token_weights;
  const void* weights;      // (B,), instead of the aggregation
  const void* denominator;  // one number, instead of the count the aggregation divides by
  grpo::Parameters parameters;
  void* loss;
  void* grad_logps;    // written at the completions' tokens only
  void* grad_entropy;  // the same, of the entropy
  void* metrics;       // (grpo::kMetrics,)
  double* scratch;     // (B, grpo::kScratch)
};

namespace cpu {
VCR1_CPU_LAUNCHER(grpo_loss, GrpoLossArgs)
}  // namespace cpu

// What the rows of a head need of each token, where a token's gradient takes no other token's
// log-prob. loss: without log-probs and results, but with scratch. All outputs are (N,).
struct GrpoTokensArgs {
  GrpoLossArgs loss;
  bool* keep;           // whether the token is in the mask, and in a completion
  void* weights;        // of the token in the loss
  void* advantages;     // also where a completion has one
  void* grad_entropy;   // dloss/dentropy, or null
  void* rollout_logps;  // those that give each token its completion's correction; or null
};

// Vectors over tokens, of which `rows` (ascending) are moved together.
struct GrpoPackArgs {
  static constexpr int kMaxVectors = 12;
  struct Vector {
    const void* from;
    void* to;
    int element;  // bytes: 1, 4 or 8
  };
  const int64_t* rows;  // (count,)
  int64_t count;
  Vector vectors[kMaxVectors];
  int columns;  // of the vectors that there are
  // Offsets of the completions (sequences + 1,), before (null: `length` tokens each) and after.
  const int64_t* offsets;
  int64_t length, sequences;
  int64_t* packed_offsets;
};

// to[i] = from[rows[i]]; scatter: to[rows[i]] = from[i], and 0 in the rows between. CUDA only.
struct CopyRowsArgs {
  const void* from;
  void* to;             // dense
  const int64_t* rows;  // (count,), ascending
  int64_t count, total;
  int64_t row_bytes, stride;  // stride: bytes between the rows of `from`; scatter: row_bytes
  bool scatter;
};

namespace cpu {
VCR1_CPU_LAUNCHER(grpo_tokens, GrpoTokensArgs)
VCR1_CPU_LAUNCHER(grpo_token_gradients, GrpoLossArgs)
VCR1_CPU_LAUNCHER(grpo_pack, GrpoPackArgs)
}  // namespace cpu

// One pass over logits for losses that weigh tokens one by one. On CUDA only: elsewhere the
// log-probs, the loss and the gradient are three calls.
struct LogitsGrpoLossArgs {
  GatherLogprobsForward forward;  // one label a row
  // fp32, as completions of one token each: `weights` is given, `mask` and `logps` are not.
  GrpoLossArgs tokens;
  const float* grad_entropy;  // (rows,) or null; only with forward.entropy
  void* grad;                 // dtype of the logits; may be the logits themselves
  RowLayout grad_layout;
};

// x *= factor, where `factor` lies on the GPU. CUDA only.
struct MultiplyArgs {
  DType dtype, factor_dtype;  // factor: float or double
  void* x;
  RowLayout layout;
  int64_t rows, columns;
  const void* factor;
};

namespace cuda {
void multiply(const MultiplyArgs& args, void* stream);
void grpo_loss(const GrpoLossArgs& args, void* stream);
void grpo_tokens(const GrpoTokensArgs& args, void* stream);
// Completions of one token each, with `weights`: writes grad_logps.
void grpo_token_gradients(const GrpoLossArgs& args, void* stream);
void grpo_pack(const GrpoPackArgs& args, void* stream);
void copy_rows(const CopyRowsArgs& args, void* stream);
void logits_grpo_loss(const LogitsGrpoLossArgs& args, void* stream);
}  // namespace cuda

}  // namespace vcr1

namespace vcr1::cpu {
VCR1_CPU_LAUNCHER(group_attention, GroupAttentionForward)
VCR1_CPU_LAUNCHER(group_attention_backward, GroupAttentionBackward)
}  // namespace vcr1::cpu

// The tokens of the GRPO loss one by one, for heads that make their logits row by row: their
// weights, the tokens inside a mask moved together, and their gradients. The maths is in
// vcr1_fast/ops/grpo/reference.py, the ops in vcr1_fast/ops/grpo/tokens.py.
#include <algorithm>

#include "grpo_token.cuh"

namespace vcr1::cuda {
namespace {

// Counts of each completion, and its rollout correction, into scratch memory.
template <typename T, int kTeam>
__global__ void __launch_bounds__(kBlock) counts_kernel(const __grid_constant__ GrpoTokensArgs a) {
  const GrpoLossArgs& given = a.loss;
  const Team<kTeam> team(given);
  const int64_t b = team.sequence;
  if (b >= given.sequences) return;  // whole teams; a block of one team never
  double sums[3] = {};
  team.for_tokens([&](int64_t i) { add_counts<T>(a, b, i, sums); });
  team_reduce<Add, kTeam>(sums);
  if (team.thread != 0) return;
  const Completion c = counted<T>(a, sums);
  scratch(given, kNumTokens, b) = c.tokens;
  scratch(given, kNumSequences, b) = c.tokens > 0.0;
  scratch(given, kEntropyWeight, b) = sums[1];
  scratch(given, kCorrection, b) = c.correction;
  scratch(given, kFlags, b) = c.dropped;
}

template <typename T, int kTeam>
__global__ void __launch_bounds__(kBlock) weights_kernel(const __grid_constant__ GrpoTokensArgs a) {
  const GrpoLossArgs& given = a.loss;
  // Every block adds up the same counts: less than a third launch would take.
  const Batch batch = batch_weights<T>(given, false);
  for_uncovered(given, [&](int64_t i) { write_nothing<T>(a, i); });
  const Team<kTeam> team(given);
  const int64_t b = team.sequence;
  if (b >= given.sequences) return;
  Completion c{};
  c.weight = weight_of<T>(given, batch, b);
  c.correction = scratch(given, kCorrection, b);
  c.dropped = scratch(given, kFlags, b) != 0.0;
  const double scale = entropy_scale(given.parameters, batch, c.weight);
  team.for_tokens([&](int64_t i) { write_token<T>(a, c, scale, b, i); });
}

// Completions of one token each.
template <typename T>
__global__ void __launch_bounds__(kBlock) gradients_kernel(const __grid_constant__ GrpoLossArgs a) {
  const int64_t i = int64_t{blockIdx.x} * kBlock + threadIdx.x;
  if (i < a.tokens) static_cast<T*>(a.grad_logps)[i] = token_gradient<T>(a, i);
}

__global__ void __launch_bounds__(kBlock) pack_kernel(const __grid_constant__ GrpoPackArgs a) {
  const int64_t i = int64_t{blockIdx.x} * kBlock + threadIdx.x;
  if (i <= a.sequences) a.packed_offsets[i] = packed_offset(a, i);
  if (i >= a.count) return;
#pragma unroll 1
  for (int k = 0; k < a.columns; ++k) pack_element(a.vectors[k], a.rows[i], i);
}

// A block a row, in units of the largest size that all addresses are multiples of.
template <typename Unit>
__global__ void __launch_bounds__(kBlock)
    copy_rows_kernel(const __grid_constant__ CopyRowsArgs a, int64_t first) {
  const int64_t i = first + blockIdx.x, units = a.row_bytes / static_cast<int64_t>(sizeof(Unit));
  const int64_t at = a.scatter ? lower_bound(a.rows, a.count, i) : a.rows[i];
  Unit* const to = static_cast<Unit*>(a.to) + i * units;
  const Unit* const from = static_cast<const Unit*>(a.from);
  if (a.scatter && (at == a.count || a.rows[at] != i)) {
    for (int64_t j = threadIdx.x; j < units; j += kBlock) to[j] = Unit{};
    return;
  }
  const Unit* const row =
      from + at * (a.scatter ? units : a.stride / static_cast<int64_t>(sizeof(Unit)));
  for (int64_t j = threadIdx.x; j < units; j += kBlock) to[j] = row[j];
}

template <typename T>
void run(const GrpoTokensArgs& args, void* stream) {
  for_team(args.loss, [&](auto team) {
    constexpr int kTeam = decltype(team)::value;
    const unsigned grid = grid_for<kTeam>("grpo_tokens", args.loss);
    const auto counts = counts_kernel<T, kTeam>;
    const auto weights = weights_kernel<T, kTeam>;
    if (grid > 0) launch("grpo_tokens", counts, {grid, kBlock}, stream, args);
    launch("grpo_tokens", weights, {std::max(grid, 1u), kBlock}, stream, args);
  });
}

// The blocks for n threads.
unsigned blocks_for(const char* op, int64_t n) {
  const int64_t blocks = (n + kBlock - 1) / kBlock;
  VCR1_CHECK(blocks < int64_t{1} << 31, op, ": at most ", kBlock * (int64_t{1} << 31),
             " tokens on a GPU, got ", n);
  return static_cast<unsigned>(blocks);
}

template <typename Unit>
void copy(const CopyRowsArgs& args, void* stream) {
  constexpr int64_t kStep = int64_t{1} << 30;  // rows a grid
  const int64_t rows = args.scatter ? args.total : args.count;
  for (int64_t first = 0; first < rows; first += kStep)
    launch("copy_rows", copy_rows_kernel<Unit>,
           {static_cast<unsigned>(std::min(kStep, rows - first)), kBlock}, stream, args, first);
}

}  // namespace

void grpo_tokens(const GrpoTokensArgs& args, void* stream) {
  if (args.loss.dtype == DType::kFloat64)
    run<double>(args, stream);
  else
    run<float>(args, stream);
}

void grpo_token_gradients(const GrpoLossArgs& args, void* stream) {
  const auto kernel =
      args.dtype == DType::kFloat64 ? gradients_kernel<double> : gradients_kernel<float>;
  const unsigned grid = blocks_for("grpo_token_gradients", args.tokens);
  if (grid > 0) launch("grpo_token_gradients", kernel, {grid, kBlock}, stream, args);
}

void grpo_pack(const GrpoPackArgs& args, void* stream) {
  const int64_t threads = std::max(args.count, args.sequences + 1);
  launch("grpo_pack", pack_kernel, {blocks_for("grpo_pack", threads), kBlock}, stream, args);
}

void copy_rows(const CopyRowsArgs& args, void* stream) {
  const auto bits = reinterpret_cast<std::uintptr_t>(args.from) |
                    reinterpret_cast<std::uintptr_t>(args.to) |
                    static_cast<std::uintptr_t>(args.row_bytes | args.stride);
  if (bits % 16 == 0) return copy<uint4>(args, stream);
  bits % 4 == 0 ? copy<uint32_t>(args, stream) : copy<uint16_t>(args, stream);
}

}  // namespace vcr1::cuda

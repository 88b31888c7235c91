// Completions by teams of threads, and what the kernels of the GRPO loss share. A token's terms are
// in ../grpo_token.h.
#pragma once

#include "../grpo_token.h"
#include "common.cuh"

namespace vcr1::cuda {

using namespace vcr1::grpo;

constexpr int kBlock = 256;

struct Add {
  __device__ static double apply(double a, double b) { return a + b; }
};
struct Min {
  __device__ static double apply(double a, double b) { return a < b ? a : b; }
};
struct Max {
  __device__ static double apply(double a, double b) { return a > b ? a : b; }
};

// Every thread of the team, a warp or the whole block, gets the results.
template <typename Op, int kTeam, int kCount>
__device__ inline void team_reduce(double (&x)[kCount]) {
#pragma unroll
  for (int k = 0; k < kCount; ++k)
#pragma unroll
    for (int step = 16; step > 0; step /= 2)
      x[k] = Op::apply(x[k], __shfl_xor_sync(~0u, x[k], step));
  if constexpr (kTeam > 32) {
    constexpr int kWarps = kTeam / 32;
    __shared__ double parts[kCount][kWarps];
    __syncthreads();  // the call before may still be reading
    if (threadIdx.x % 32 == 0)
#pragma unroll
      for (int k = 0; k < kCount; ++k) parts[k][threadIdx.x / 32] = x[k];
    __syncthreads();
#pragma unroll
    for (int k = 0; k < kCount; ++k) {
      x[k] = parts[k][0];
      for (int i = 1; i < kWarps; ++i) x[k] = Op::apply(x[k], parts[k][i]);
    }
  }
}

// One completion and the tokens of it that this thread visits.
template <int kTeam>
struct Team {
  int64_t sequence, begin, end;
  int thread;

  __device__ explicit Team(const GrpoLossArgs& a)
      : sequence(int64_t{blockIdx.x} * (kBlock / kTeam) + threadIdx.x / kTeam),
        begin(0),
        end(0),
        thread(threadIdx.x % kTeam) {
    if (sequence < a.sequences) token_range(a, sequence, begin, end);
  }
  template <typename Fn>
  __device__ void for_tokens(Fn&& fn) const {
    for (int64_t i = begin + thread; i < end; i += kTeam) fn(i);
  }
};

// Scratch memory: row `index` holds one number a completion.
__device__ inline double& scratch(const GrpoLossArgs& a, int index, int64_t b) {
  return a.scratch[index * a.sequences + b];
}

// Called by the whole block; scratch holds the completions' counts. `all`: they are wanted whatever
// the weights depend on.
template <typename T>
__device__ inline Batch batch_weights(const GrpoLossArgs& a, bool all) {
  double totals[3] = {};
  if (all || a.weights == nullptr || a.parameters.entropy_token_mean) {
    for (int64_t b = threadIdx.x; b < a.sequences; b += kBlock) {
      totals[0] += scratch(a, kNumTokens, b);
      totals[1] += scratch(a, kNumSequences, b);
      totals[2] += scratch(a, kEntropyWeight, b);
    }
    team_reduce<Add, kBlock>(totals);
  }
  return batch_of<T>(a, totals[0], totals[1], totals[2]);
}

template <typename T>
__device__ inline double weight_of(const GrpoLossArgs& a, const Batch& batch, int64_t b) {
  return token_weight<T>(a, batch, b, a.weights != nullptr ? 0.0 : scratch(a, kNumTokens, b));
}

// fn(i) of each token that is in no completion, by the whole grid.
template <typename Fn>
__device__ inline void for_uncovered(const GrpoLossArgs& a, Fn&& fn) {
  if (a.offsets == nullptr) return;
  int64_t first, last;
  covered_range(a, first, last);
  const int64_t thread = int64_t{blockIdx.x} * kBlock + threadIdx.x;
  const int64_t step = int64_t{gridDim.x} * kBlock;
  for (int64_t i = thread; i < first; i += step) fn(i);
  for (int64_t i = last + thread; i < a.tokens; i += step) fn(i);
}

// launch_both(team): a block takes a long completion, a warp each of many short ones.
template <typename Fn>
void for_team(const GrpoLossArgs& args, Fn&& fn) {
  if (args.tokens > 128 * args.sequences)
    fn(std::integral_constant<int, kBlock>{});
  else
    fn(std::integral_constant<int, 32>{});
}

// Blocks of completions.
template <int kTeam>
unsigned grid_for(const char* op, const GrpoLossArgs& args) {
  constexpr int64_t kTeams = kBlock / kTeam;
  const int64_t blocks = (args.sequences + kTeams - 1) / kTeams;
  VCR1_CHECK(blocks < int64_t{1} << 31, op, ": at most ", kTeams << 31,
             " completions on a GPU, got ", args.sequences);
  return static_cast<unsigned>(blocks);
}

}  // namespace vcr1::cuda

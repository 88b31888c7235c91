// Log-probabilities of given tokens, entropy and log-sum-exp: one read of the logits forward, one
// read and one write backward. The maths is in vcr1_fast/ops/gather_logprobs.py.
//
// A team of threads takes a row: a warp where rows are short (several teams a block, so that they
// need no barrier), the whole block where they are long. Where there are too few long rows to fill
// the GPU, several blocks take a row: a cluster forward, which adds up the row's sums; any blocks
// backward, because a column's gradient takes nothing but those sums.
#include <algorithm>

#include "softmax.cuh"

namespace vcr1::cuda {
namespace {

// Threads of an SM that its registers should hold.
constexpr int kThreadsPerSm = 1024;
constexpr int kLong = 512;           // the team of a long row
constexpr int64_t kLeast = 8 << 10;  // bytes of a row that a block takes: a load for each thread

template <int kTeam>
struct Shape {
  static constexpr int kBlock = kTeam == 32 ? 256 : kTeam;
  static constexpr int kRows = kBlock / kTeam;  // a block
};

__device__ inline float temperature_of(const GatherLogprobsInput& in, int64_t row) {
  return in.row_temperature != nullptr ? in.row_temperature[row] : in.temperature;
}

// Both kernels work on rows `first`, first + 1, ...: a grid has less than 2^31 blocks. kSplit:
// `blocks` blocks take a row, in the forward pass as a cluster.
template <int kTeam, bool kEntropy, bool kSplit, typename T>
__global__ void __launch_bounds__(Shape<kTeam>::kBlock, kThreadsPerSm / Shape<kTeam>::kBlock)
    forward_kernel(const GatherLogprobsForward a, int64_t first, int blocks) {
  const GatherLogprobsInput& in = a.in;
  const int rank = kSplit ? blockIdx.x % blocks : 0;
  const int64_t row = kSplit
                          ? first + blockIdx.x / blocks
                          : first + int64_t{blockIdx.x} * Shape<kTeam>::kRows + threadIdx.x / kTeam;
  if (row >= in.rows) return;  // whole teams; a block of one team never
  const int thread = threadIdx.x % kTeam;
  float* const logps = a.logps + row * in.k;
  float* const stats = a.stats + row * 3;
  if (in.mask != nullptr && !in.mask[row]) {
    if (rank != 0) return;
#pragma unroll 1
    for (int64_t j = thread; j < in.k; j += kTeam) logps[j] = 0.0f;
    if (thread == 0) {
      stats[0] = stats[1] = stats[2] = a.lse[row] = 0.0f;
      if (kEntropy) a.entropy[row] = 0.0f;
    }
    return;
  }
  const T* const x = static_cast<const T*>(in.logits) + row_offset(in.layout, row);
  const int64_t* const labels = in.labels + row * in.k;
  const auto logit = [&](int64_t label) {
    return label >= 0 && label < in.vocab ? widen(x[label]) : quiet_nan();
  };
  // Asked for before the row, so that the end does not wait for two more loads.
  const float own_logit = thread < in.k ? logit(labels[thread]) : 0.0f;
  const float temperature = temperature_of(in, row);
  const float scale = kLog2e / temperature;
  Sums sums;
  if constexpr (kSplit) {
    const Columns columns(x, static_cast<int>(in.vocab), rank, blocks);
    const PackedRow<const T> packed(x + columns.begin, columns.end - columns.begin);
    float unused = 0.0f;
    sums = cluster_merge<kTeam>(thread_sums<kEntropy, kTeam>(packed, thread, scale), scale, blocks,
                                unused);
    cluster_wait();
    if (rank != 0) return;
  } else {
    const PackedRow<const T> packed(x, static_cast<int>(in.vocab));
    sums = team_merge<kTeam>(thread_sums<kEntropy, kTeam>(packed, thread, scale), scale);
  }
  const float log_sum = sums.log_sum();
#pragma unroll 1
  for (int64_t j = thread; j < in.k; j += kTeam) {
    // Against the maximum first: the logits may share an offset far larger than log_sum.
    const float d = (j == thread ? own_logit : logit(labels[j])) - sums.max;
    logps[j] = d / temperature - log_sum;
  }
  if (thread == 0) {
    const float mean_d = sums.mean_d();
    a.lse[row] = sums.lse(temperature);
    if (kEntropy) a.entropy[row] = log_sum - mean_d;
    stats[0] = sums.top();
    stats[1] = log_sum;
    stats[2] = mean_d;
  }
}

template <int kTeam, typename T>
__device__ inline void zero_row(const PackedRow<T>& out, int thread) {
  const Pack<T> zero = filled_pack<T>(0.0f);
  for (int i = thread; i < out.packs; i += kTeam) store_streaming(out.pack(i), zero);
  if (thread < out.edge) *out.edge_element(thread) = narrow<T>(0.0f);
}

template <int kTeam, bool kEntropy, bool kSplit, typename T>
__global__ void __launch_bounds__(Shape<kTeam>::kBlock, kThreadsPerSm / Shape<kTeam>::kBlock)
    backward_kernel(const GatherLogprobsBackward a, int64_t first, int blocks) {
  const GatherLogprobsInput& in = a.in;
  const int64_t row = kSplit
                          ? first + blockIdx.x / blocks
                          : first + int64_t{blockIdx.x} * Shape<kTeam>::kRows + threadIdx.x / kTeam;
  if (row >= in.rows) return;
  const int thread = threadIdx.x % kTeam;
  const int vocab = static_cast<int>(in.vocab);
  const T* const x = static_cast<const T*>(in.logits) + row_offset(in.layout, row);
  T* const grad = static_cast<T*>(a.grad) + row_offset(a.grad_layout, row);
  const Columns columns =
      kSplit ? Columns(x, vocab, blockIdx.x % blocks, blocks) : Columns{0, vocab};
  const int size = columns.end - columns.begin;
  const PackedRow<T> out(grad + columns.begin, size);
  const float* const g = a.grad_logps + row * in.k;
  const float h = kEntropy ? a.grad_entropy[row] : 0.0f;
  const float g_lse = a.grad_lse != nullptr ? a.grad_lse[row] : 0.0f;
  float g_sum = 0.0f;  // every thread the same few values: cheaper than a reduction
  bool zero = h == 0.0f && g_lse == 0.0f;
#pragma unroll 1
  for (int64_t j = 0; j < in.k; ++j) {
    zero = zero && g[j] == 0.0f;
    g_sum += g[j];
  }
  if (zero || (in.mask != nullptr && !in.mask[row])) return zero_row<kTeam>(out, thread);

  const float* const stats = a.stats + row * 3;
  const float temperature = temperature_of(in, row);
  const RowGradient<kEntropy> gradient(stats[0], stats[1], stats[2], temperature, g_lse - g_sum, h);
  write_gradient<kTeam>(gradient, PackedRow<const T>(x + columns.begin, size), out, thread);

  // The labels' elements are written again, by other threads than before: wait for the team.
  // They come from the log-probs, because in place their logits are gone.
  kTeam == 32 ? __syncwarp() : __syncthreads();
  const int64_t* const labels = in.labels + row * in.k;
#pragma unroll 1
  for (int64_t j = thread; j < in.k; j += kTeam) {
    if (!columns.has(labels[j])) continue;
    float own = 0.0f;
#pragma unroll 1
    for (int64_t i = 0; i < in.k; ++i)
      if (labels[i] == labels[j]) own += g[i];
    // Labels that repeat write the same value.
    grad[labels[j]] =
        narrow<T>(gradient.at_label(a.logps[row * in.k + j], stats[1], temperature, own));
  }
}

// launch_rows(team, first): for every part of the rows that fits a grid.
template <typename T, typename Launch>
void for_rows(const GatherLogprobsInput& in, Launch&& launch_rows) {
  VCR1_CHECK(in.vocab <= kMaxVocab, "logits: at most ", kMaxVocab, " columns on a GPU, got ",
             in.vocab);
  constexpr int64_t kStep = int64_t{1} << 30;  // rows
  const int64_t bytes = in.vocab * static_cast<int64_t>(sizeof(T));
  for (int64_t first = 0; first < in.rows; first += kStep) {
    const int64_t rows = std::min(kStep, in.rows - first);
    if (bytes <= 4096) {
      launch_rows(std::integral_constant<int, 32>{}, first, rows);
    } else if (bytes <= 32768) {
      launch_rows(std::integral_constant<int, 128>{}, first, rows);
    } else {
      launch_rows(std::integral_constant<int, kLong>{}, first, rows);
    }
  }
}

template <int kTeam>
LaunchShape shape_for(int64_t rows) {
  constexpr int64_t kRows = Shape<kTeam>::kRows;
  return {static_cast<unsigned>((rows + kRows - 1) / kRows), Shape<kTeam>::kBlock};
}

// How many blocks take a long row so that `rows` of them fill the GPU.
int64_t blocks_wanted(const char* op, int64_t rows, int64_t row_bytes) {
  const int64_t fill = blocks_at_a_time(op, kThreadsPerSm / kLong);
  return std::max<int64_t>(1, std::min((fill + rows - 1) / rows, row_bytes / kLeast));
}

template <typename T>
void launch_forward(const GatherLogprobsForward& args, int64_t first, int64_t rows, void* stream) {
  const char* const op = "gather_logprobs";
  const auto split = args.entropy != nullptr ? forward_kernel<kLong, true, true, T>
                                             : forward_kernel<kLong, false, true, T>;
  const int64_t wanted = blocks_wanted(op, rows, args.in.vocab * int64_t{sizeof(T)});
  unsigned cluster = 1;
  if (wanted > 1) {
    const auto largest = static_cast<unsigned>(largest_cluster(op, split, {1, kLong}));
    while (cluster < largest && 2 * int64_t{cluster} <= wanted) cluster *= 2;
  }
  if (cluster > 1)
    return launch(op, split, {static_cast<unsigned>(rows) * cluster, kLong, 0, cluster}, stream,
                  args, first, static_cast<int>(cluster));
  const auto kernel = args.entropy != nullptr ? forward_kernel<kLong, true, false, T>
                                              : forward_kernel<kLong, false, false, T>;
  launch(op, kernel, shape_for<kLong>(rows), stream, args, first, 1);
}

template <typename T>
void launch_backward(const GatherLogprobsBackward& args, int64_t first, int64_t rows,
                     void* stream) {
  const char* const op = "gather_logprobs_backward";
  const auto blocks =
      static_cast<unsigned>(blocks_wanted(op, rows, args.in.vocab * int64_t{sizeof(T)}));
  const bool entropy = args.grad_entropy != nullptr;
  const auto kernel = blocks > 1 ? entropy ? backward_kernel<kLong, true, true, T>
                                           : backward_kernel<kLong, false, true, T>
                      : entropy  ? backward_kernel<kLong, true, false, T>
                                 : backward_kernel<kLong, false, false, T>;
  launch(op, kernel, {static_cast<unsigned>(rows) * blocks, kLong}, stream, args, first,
         static_cast<int>(blocks));
}

}  // namespace

void gather_logprobs(const GatherLogprobsForward& args, void* stream) {
  for_float_dtype(args.in.dtype, [&](auto type) {
    using T = decltype(type);
    for_rows<T>(args.in, [&](auto team, int64_t first, int64_t rows) {
      constexpr int kTeam = decltype(team)::value;
      if constexpr (kTeam == kLong) {
        launch_forward<T>(args, first, rows, stream);
      } else {
        const auto kernel = args.entropy != nullptr ? forward_kernel<kTeam, true, false, T>
                                                    : forward_kernel<kTeam, false, false, T>;
        launch("gather_logprobs", kernel, shape_for<kTeam>(rows), stream, args, first, 1);
      }
    });
  });
}

void gather_logprobs_backward(const GatherLogprobsBackward& args, void* stream) {
  for_float_dtype(args.in.dtype, [&](auto type) {
    using T = decltype(type);
    for_rows<T>(args.in, [&](auto team, int64_t first, int64_t rows) {
      constexpr int kTeam = decltype(team)::value;
      if constexpr (kTeam == kLong) {
        launch_backward<T>(args, first, rows, stream);
      } else {
        const auto kernel = args.grad_entropy != nullptr ? backward_kernel<kTeam, true, false, T>
                                                         : backward_kernel<kTeam, false, false, T>;
        launch("gather_logprobs_backward", kernel, shape_for<kTeam>(rows), stream, args, first, 1);
      }
    });
  });
}

}  // namespace vcr1::cuda

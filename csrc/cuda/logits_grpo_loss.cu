// Log-probs of rows of logits, the GRPO loss's gradient in them and from it the logits' gradient,
// with one read and one write of the logits. For losses that weigh tokens one by one: the maths is
// in vcr1_fast/ops/gather_logprobs.py and grpo/reference.py.
//
// A cluster of blocks holds a row in its shared memory between the read and the write: 304 KB for
// 152,064 columns in bf16, more than one SM has. Rows that do not fit are read twice.
#include <algorithm>

#include "cluster.cuh"
#include "grpo_token.cuh"
#include "ptx.cuh"
#include "softmax.cuh"

namespace vcr1::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kBlocksPerSm = 4;  // that registers should hold
constexpr int kStages = 4;       // of the copy into shared memory
constexpr int kMaxCluster = 8;   // every sm_90 can schedule that
constexpr int kSliceBytes =
    44 << 10;  // five such slices fit an SM: one is written while others load

// The packs of a row that one block of the cluster works on; the row's edge is the first block's.
template <typename T>
struct Slice {
  PackedRow<T> row;
  int first, packs, edge;

  __device__ Slice(T* x, int vocab, int rank, int cluster) : row(x, vocab) {
    const int each = (row.packs + cluster - 1) / cluster;
    first = min(rank * each, row.packs);
    packs = min(each, row.packs - first);
    edge = rank == 0 ? row.edge : 0;
  }
  __device__ bool owns(int column) const {
    const int i = column - row.head;
    if (i < 0 || i >= row.packs * Pack<T>::kSize) return edge > 0;
    return i / Pack<T>::kSize >= first && i / Pack<T>::kSize < first + packs;
  }
};

template <typename T>
__device__ inline void zero_slice(const Slice<T>& out) {
  const Pack<T> zero = filled_pack<T>(0.0f);
  for (int i = threadIdx.x; i < out.packs; i += kThreads)
    store_streaming(out.row.pack(out.first + i), zero);
  if (static_cast<int>(threadIdx.x) < out.edge)
    *out.row.edge_element(threadIdx.x) = narrow<T>(0.0f);
}

// Copies the slice to `held` and sums it up. Each thread reads what it copied itself: no barrier.
template <bool kEntropy, typename T>
__device__ inline Sums copy_and_sum(const Slice<const T>& x, Pack<T>* held, float scale) {
  const int thread = threadIdx.x;
  const int steps = (x.packs + kThreads - 1) / kThreads, stage = (steps + kStages - 1) / kStages;
#pragma unroll
  for (int s = 0; s < kStages; ++s) {
    for (int n = s * stage; n < (s + 1) * stage; ++n) {
      const int i = n * kThreads + thread;
      if (i < x.packs) copy_async(held + i, x.row.pack(x.first + i));
    }
    commit_copies();
  }
  Sums sums = Sums::none();
  if (thread < x.edge) {
    const float value = widen(*x.row.edge_element(thread));
    sums.raise(fmaxf(sums.max, value), scale);
    sums.add<kEntropy>(value, scale);
  }
#pragma unroll
  for (int s = 0; s < kStages; ++s) {
    if (s == 0) wait_copies<3>();
    if (s == 1) wait_copies<2>();
    if (s == 2) wait_copies<1>();
    if (s == 3) wait_copies<0>();
    const int end = min((s + 1) * stage * kThreads, x.packs);
    int i = s * stage * kThreads + thread;
    for (; i + kThreads < end; i += 2 * kThreads) {
      const Pack<T> packs[2] = {held[i], held[i + kThreads]};
      sums.take<kEntropy>(packs, scale);
    }
    if (i < end) {
      const Pack<T> packs[1] = {held[i]};
      sums.take<kEntropy>(packs, scale);
    }
  }
  return sums;
}

// Every thread of every block of the cluster gets the row's sums, from the same additions.
__device__ inline Sums cluster_merge(Sums sums, float scale, int cluster) {
  sums = team_merge<kThreads>(sums, scale);
  if (cluster == 1) return sums;
  __shared__ float part[3];
  if (threadIdx.x == 0) {
    part[0] = sums.max;
    part[1] = sums.weight;
    part[2] = sums.weighted_t;
  }
  cluster_arrive();
  cluster_wait();
  const int lane = threadIdx.x % 32;
  sums = Sums::none();
  if (lane < cluster) {
    sums.max = cluster_read(part, lane);
    sums.weight = cluster_read(part + 1, lane);
    sums.weighted_t = cluster_read(part + 2, lane);
  }
  // Waited for before this block ends, because others may still be reading its part.
  cluster_arrive();
  return warp_merge(sums, scale);
}

template <bool kEntropy, typename T>
__device__ inline void write_held(const RowGradient<kEntropy>& gradient, const Slice<const T>& x,
                                  const Slice<T>& out, const Pack<T>* held) {
  const int thread = threadIdx.x;
#pragma unroll 2
  for (int i = thread; i < x.packs; i += kThreads)
    store_streaming(out.row.pack(out.first + i), gradient_pack(gradient, held[i]));
  if (thread < x.edge)
    *out.row.edge_element(thread) = narrow<T>(gradient.at(widen(*x.row.edge_element(thread))));
}

__device__ inline void zero_statistics(const GatherLogprobsForward& f, int64_t row) {
  f.logps[row] = f.lse[row] = f.stats[3 * row] = f.stats[3 * row + 1] = f.stats[3 * row + 2] = 0.0f;
  if (f.entropy != nullptr) f.entropy[row] = 0.0f;
}

// kHeld: the row stays in shared memory. Otherwise `cluster` is 1 and it is read again.
template <bool kHeld, bool kEntropy, typename T>
__global__ void __launch_bounds__(kThreads, kBlocksPerSm)
    loss_kernel(const __grid_constant__ LogitsGrpoLossArgs a, int64_t first_row, int cluster) {
  auto* const held = reinterpret_cast<Pack<T>*>(dynamic_shared());
  const GatherLogprobsInput& in = a.forward.in;
  const int rank = blockIdx.x % cluster, vocab = static_cast<int>(in.vocab);
  const int64_t row = first_row + blockIdx.x / cluster;
  const bool first_thread = rank == 0 && threadIdx.x == 0;
  const T* const logits = static_cast<const T*>(in.logits) + row_offset(in.layout, row);
  const Slice<const T> x(logits, vocab, rank, cluster);
  const Slice<T> out(static_cast<T*>(a.grad) + row_offset(a.grad_layout, row), vocab, rank,
                     cluster);
  if (in.mask != nullptr && !in.mask[row]) {
    if (first_thread) zero_statistics(a.forward, row);
    return zero_slice(out);
  }
  const float temperature =
      in.row_temperature != nullptr ? in.row_temperature[row] : in.temperature;
  const float scale = kLog2e / temperature;
  const int64_t label = in.labels[row];
  const bool known = label >= 0 && label < in.vocab;
  // Before the clusters' barrier: in place, another block writes it afterwards.
  const float own_logit = known ? widen(logits[label]) : quiet_nan();

  const Sums own = kHeld ? copy_and_sum<kEntropy>(x, held, scale)
                         : thread_sums<kEntropy, kThreads>(x.row, threadIdx.x, scale);
  const Sums sums = cluster_merge(own, scale, cluster);
  const float log_sum = sums.log_sum(), mean_d = sums.mean_d();
  const float logp = (own_logit - sums.max) / temperature - log_sum;
  if (first_thread) {
    a.forward.logps[row] = logp;
    a.forward.lse[row] = sums.lse(temperature);
    if (kEntropy) a.forward.entropy[row] = log_sum - mean_d;
    float* const stats = a.forward.stats + row * 3;
    stats[0] = sums.top();
    stats[1] = log_sum;
    stats[2] = mean_d;
  }

  Completion c{};
  c.correction = 1.0;
  const float weight = static_cast<const float*>(a.tokens.weights)[row];
  const Token<float> token = load_token<float>(a.tokens, row, row, true, logp);
  const Evaluated<float> e = evaluate(a.tokens, c, token, row, weight);
  const float g = e.part.direct + e.part.d_s * token.unclamped;
  const float h = kEntropy && a.grad_entropy != nullptr ? a.grad_entropy[row] : 0.0f;
  if (g == 0.0f && h == 0.0f) {
    // In place and read twice: nothing is read any more.
    zero_slice(out);
  } else {
    const RowGradient<kEntropy> gradient(sums.top(), log_sum, mean_d, temperature, -g, h);
    if constexpr (kHeld)
      write_held(gradient, x, out, held);
    else
      write_gradient<kThreads>(gradient, x.row, out.row, threadIdx.x);
    __syncthreads();  // the label's element is written again, by another thread than before
    if (threadIdx.x == 0 && known && out.owns(static_cast<int>(label)))
      out.row.first[label] = narrow<T>(gradient.at_label(logp, log_sum, temperature, g));
  }
  if (cluster > 1) cluster_wait();
}

struct Plan {
  bool held;
  int cluster;
  size_t shared_bytes;
};

// How many blocks hold a row, by what the device offers; they need the logits and the gradient on
// the same side of a 16-byte boundary, which the caller knows. `kernel`: any variant of the kernel.
template <typename Kernel>
Plan plan_for(int64_t row_bytes, Kernel* kernel) {
  const char* const op = "logits_grpo_loss";
  int device, most;
  CUDA_CHECK(op, cudaGetDevice(&device));
  CUDA_CHECK(op, cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
  // Of the code, not of the device: where the driver compiles PTX for sm_80 on an sm_90 device,
  // clusters can be launched, but cluster.cuh has compiled to nothing.
  cudaFuncAttributes code{};
  CUDA_CHECK(op, cudaFuncGetAttributes(&code, kernel));
  const int largest = code.ptxVersion >= 90 ? kMaxCluster : 1;
  const int64_t packs = row_bytes / 16;
  Plan plan{true, 1, 0};
  const auto slice = [&] { return (packs + plan.cluster - 1) / plan.cluster * 16; };
  while (plan.cluster < largest && slice() > kSliceBytes) plan.cluster *= 2;
  if (slice() > most / 2 - 2048) return {false, 1, 0};  // less than two blocks an SM: read twice
  plan.shared_bytes = static_cast<size_t>(slice());
  return plan;
}

// Whether each row of the gradient lies as far past a multiple of 16 bytes as its row of logits.
bool same_alignment(const LogitsGrpoLossArgs& args, int64_t element) {
  const auto past = [](const void* p) { return reinterpret_cast<std::uintptr_t>(p) % 16; };
  const RowLayout &logits = args.forward.in.layout, &grad = args.grad_layout;
  if (past(args.grad) != past(args.forward.in.logits)) return false;
  // Layouts of other dimensions (a slice's, and the dense gradient's) can be compared only where
  // no stride moves a row from its base.
  const auto keeps = [&](const RowLayout& layout) {
    for (int i = 0; i < layout.ndim; ++i)
      if (layout.stride[i] * element % 16 != 0) return false;
    return true;
  };
  if (keeps(logits) && keeps(grad)) return true;
  if (logits.ndim != grad.ndim) return false;
  for (int i = 0; i < logits.ndim; ++i)
    if (logits.size[i] != grad.size[i] || (logits.stride[i] - grad.stride[i]) * element % 16 != 0)
      return false;
  return true;
}

}  // namespace

void logits_grpo_loss(const LogitsGrpoLossArgs& args, void* stream) {
  const GatherLogprobsInput& in = args.forward.in;
  VCR1_CHECK(in.vocab <= kMaxVocab, "logits: at most ", kMaxVocab, " columns on a GPU, got ",
             in.vocab);
  for_float_dtype(in.dtype, [&](auto type) {
    using T = decltype(type);
    constexpr int64_t kElement = sizeof(T);
    Plan plan{false, 1, 0};
    if (same_alignment(args, kElement))
      plan = plan_for(in.vocab * kElement, &loss_kernel<true, false, T>);
    const bool entropy = args.forward.entropy != nullptr;
    const auto kernel = plan.held
                            ? entropy ? loss_kernel<true, true, T> : loss_kernel<true, false, T>
                        : entropy ? loss_kernel<false, true, T>
                                  : loss_kernel<false, false, T>;
    CUDA_CHECK("logits_grpo_loss",
               cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                    static_cast<int>(plan.shared_bytes)));
    // Left to itself, the driver may keep so much of the SM's memory for its cache that fewer
    // blocks fit than registers allow.
    CUDA_CHECK("logits_grpo_loss",
               cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout,
                                    cudaSharedmemCarveoutMaxShared));
    constexpr int64_t kStep = int64_t{1} << 27;  // rows a grid; times kMaxCluster below 2^31
    for (int64_t first = 0; first < in.rows; first += kStep) {
      const int64_t blocks = std::min(kStep, in.rows - first) * plan.cluster;
      const LaunchShape shape{static_cast<unsigned>(blocks), kThreads, plan.shared_bytes,
                              static_cast<unsigned>(plan.cluster)};
      launch("logits_grpo_loss", kernel, shape, stream, args, first, plan.cluster);
    }
  });
}

}  // namespace vcr1::cuda

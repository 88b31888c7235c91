// Log-probs of rows of logits, the GRPO loss's gradient in them and from it the logits' gradient,
// with one read and one write of the logits. For losses that weigh tokens one by one: the maths is
// in vcr1_fast/ops/gather_logprobs.py and grpo/reference.py.
//
// Between the read and the write a cluster of blocks holds the row: 304 KB for 152,064 columns in
// bf16, more than one SM has. In registers, as exponentials that are then only scaled, where a
// thread's part fits and no entropy is wanted; in shared memory otherwise. Rows that fit neither
// are read twice.
#include <algorithm>

#include "grpo_token.cuh"
#include "ptx.cuh"
#include "softmax.cuh"

namespace vcr1::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kBlocksPerSm = 4;  // that registers should hold
constexpr int kStages = 4;       // of the copy into shared memory
constexpr int kMaxCluster = 16;
// Five such slices fit an SM: one is written while others load.
constexpr int64_t kSliceBytes = 44 << 10;
constexpr int kKept = 40;                 // exponentials of a thread in registers
constexpr int64_t kLeastBytes = 4 << 10;  // of a block: a load for each thread

enum class Hold { kNothing, kShared, kRegisters };

constexpr int blocks_per_sm(Hold hold) { return hold == Hold::kRegisters ? 2 : kBlocksPerSm; }

template <typename T>
__device__ inline void zero_columns(const PackedRow<T>& out) {
  const Pack<T> zero = filled_pack<T>(0.0f);
  for (int i = threadIdx.x; i < out.packs; i += kThreads) store_streaming(out.pack(i), zero);
  if (static_cast<int>(threadIdx.x) < out.edge) *out.edge_element(threadIdx.x) = narrow<T>(0.0f);
}

template <bool kEntropy, typename T>
__device__ inline void add_edge(Sums& sums, const PackedRow<const T>& x, float scale) {
  if (static_cast<int>(threadIdx.x) >= x.edge) return;
  const float value = widen(*x.edge_element(threadIdx.x));
  sums.raise(fmaxf(sums.max, value), scale);
  sums.add<kEntropy>(value, scale);
}

// A thread's exponentials, relative to its largest logit among them.
template <typename T>
struct Exponentials {
  static constexpr int kPacks = kKept / Pack<T>::kSize;
  float top;
  float e[kPacks][Pack<T>::kSize];

  __device__ Sums load(const PackedRow<const T>& x, float scale) {
    Pack<T> packs[kPacks];
#pragma unroll
    for (int u = 0; u < kPacks; ++u) {
      const int i = u * kThreads + threadIdx.x;
      packs[u] = filled_pack<T>(-infinity());
      if (i < x.packs) packs[u] = load_streaming(x.pack(i));
    }
    top = kLowest;
#pragma unroll
    for (int u = 0; u < kPacks; ++u) top = fmaxf(top, pack_max(packs[u]));
    float even = 0.0f, odd = 0.0f;
#pragma unroll
    for (int u = 0; u < kPacks; ++u) {
#pragma unroll
      for (int j = 0; j < Pack<T>::kSize; j += 2) {
        float a, b;
        widen_pair(packs[u].lanes + j, a, b);
        even += e[u][j] = exp2_fast((a - top) * scale);
        odd += e[u][j + 1] = exp2_fast((b - top) * scale);
      }
    }
    Sums sums = Sums::above(top);
    sums.weight = even + odd;
    return sums;
  }

  // `sums` and `log_sum`: of the row.
  __device__ void write(const RowGradient<false>& gradient, const PackedRow<const T>& x,
                        const PackedRow<T>& out) const {
    const float factor =
        exp2_fast((top - gradient.max) * gradient.scale - gradient.log2_sum) * gradient.base;
#pragma unroll
    for (int u = 0; u < kPacks; ++u) {
      const int i = u * kThreads + threadIdx.x;
      if (i >= x.packs) break;
      Pack<T> pack;
#pragma unroll
      for (int j = 0; j < Pack<T>::kSize; j += 2)
        narrow_pair(e[u][j] * factor, e[u][j + 1] * factor, pack.lanes + j);
      store_streaming(out.pack(i), pack);
    }
  }
};

// Copies the columns to `held` and sums them up. Each thread reads what it copied itself: no
// barrier.
template <bool kEntropy, typename T>
__device__ inline Sums copy_and_sum(const PackedRow<const T>& x, Pack<T>* held, float scale) {
  const int thread = threadIdx.x;
  const int steps = (x.packs + kThreads - 1) / kThreads, stage = (steps + kStages - 1) / kStages;
#pragma unroll
  for (int s = 0; s < kStages; ++s) {
    for (int n = s * stage; n < (s + 1) * stage; ++n) {
      const int i = n * kThreads + thread;
      if (i < x.packs) copy_async(held + i, x.pack(i));
    }
    commit_copies();
  }
  Sums sums = Sums::none();
  add_edge<kEntropy>(sums, x, scale);
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

template <bool kEntropy, typename T>
__device__ inline void write_held(const RowGradient<kEntropy>& gradient,
                                  const PackedRow<const T>& x, const PackedRow<T>& out,
                                  const Pack<T>* held) {
#pragma unroll 2
  for (int i = threadIdx.x; i < x.packs; i += kThreads)
    store_streaming(out.pack(i), gradient_pack(gradient, held[i]));
}

__device__ inline void zero_statistics(const GatherLogprobsForward& f, int64_t row) {
  f.logps[row] = f.lse[row] = f.stats[3 * row] = f.stats[3 * row + 1] = f.stats[3 * row + 2] = 0.0f;
  if (f.entropy != nullptr) f.entropy[row] = 0.0f;
}

// Hold::kNothing: one block takes a row, and reads it again.
template <Hold kHold, bool kEntropy, typename T>
__global__ void __launch_bounds__(kThreads, blocks_per_sm(kHold))
    loss_kernel(const __grid_constant__ LogitsGrpoLossArgs a, int64_t first_row, int blocks) {
  const int cluster = kHold == Hold::kNothing ? 1 : blocks;
  auto* const held = reinterpret_cast<Pack<T>*>(dynamic_shared());
  const GatherLogprobsInput& in = a.forward.in;
  const int rank = blockIdx.x % cluster, vocab = static_cast<int>(in.vocab);
  const int64_t row = first_row + blockIdx.x / cluster;
  const bool first_thread = rank == 0 && threadIdx.x == 0;
  const T* const logits = static_cast<const T*>(in.logits) + row_offset(in.layout, row);
  T* const grad = static_cast<T*>(a.grad) + row_offset(a.grad_layout, row);
  const Columns columns =
      kHold == Hold::kNothing ? Columns(0, vocab) : Columns(logits, vocab, rank, cluster);
  const int size = columns.end - columns.begin;
  const PackedRow<const T> x(logits + columns.begin, size);
  const PackedRow<T> out(grad + columns.begin, size);
  if (in.mask != nullptr && !in.mask[row]) {
    if (first_thread) zero_statistics(a.forward, row);
    return zero_columns(out);
  }
  const float temperature =
      in.row_temperature != nullptr ? in.row_temperature[row] : in.temperature;
  const float scale = kLog2e / temperature;
  const int64_t label = in.labels[row];
  const bool known = label >= 0 && label < in.vocab;
  // By the thread that releases at the cluster's barrier: in place, another block writes the
  // label's column after it.
  float own_logit = quiet_nan();
  if (known && (cluster == 1 || threadIdx.x == 0)) own_logit = widen(logits[label]);

  Exponentials<T> kept;
  Sums sums;
  if constexpr (kHold == Hold::kRegisters) {
    sums = kept.load(x, scale);
    add_edge<kEntropy>(sums, x, scale);
  } else if constexpr (kHold == Hold::kShared) {
    sums = copy_and_sum<kEntropy>(x, held, scale);
  } else {
    sums = thread_sums<kEntropy, kThreads>(x, threadIdx.x, scale);
  }
  sums = cluster == 1 ? team_merge<kThreads>(sums, scale)
                      : cluster_merge<kThreads>(sums, scale, cluster, own_logit);
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
    zero_columns(out);
  } else {
    const RowGradient<kEntropy> gradient(sums.top(), log_sum, mean_d, temperature, -g, h);
    if constexpr (kHold == Hold::kNothing) {
      write_gradient<kThreads>(gradient, x, out, threadIdx.x);
    } else {
      if constexpr (kHold == Hold::kRegisters)
        kept.write(gradient, x, out);
      else
        write_held(gradient, x, out, held);
      if (static_cast<int>(threadIdx.x) < x.edge)
        *out.edge_element(threadIdx.x) =
            narrow<T>(gradient.at(widen(*x.edge_element(threadIdx.x))));
    }
    __syncthreads();  // the label's element is written again, by another thread than before
    if (threadIdx.x == 0 && known && columns.has(label))
      grad[label] = narrow<T>(gradient.at_label(logp, log_sum, temperature, g));
  }
  if (cluster > 1) cluster_wait();
}

template <typename T>
using Kernel = void (*)(LogitsGrpoLossArgs, int64_t, int);

template <typename T>
Kernel<T> kernel_of(Hold hold, bool entropy) {
  if (hold == Hold::kRegisters) return loss_kernel<Hold::kRegisters, false, T>;
  if (hold == Hold::kShared)
    return entropy ? loss_kernel<Hold::kShared, true, T> : loss_kernel<Hold::kShared, false, T>;
  return entropy ? loss_kernel<Hold::kNothing, true, T> : loss_kernel<Hold::kNothing, false, T>;
}

struct Plan {
  Hold hold;
  int cluster;
  size_t shared_bytes;
};

// Where a row is held, and by how many blocks. To be held, its logits and its gradient must be on
// the same side of a 16-byte boundary, which the caller knows.
template <typename T>
Plan plan_for(int64_t rows, int64_t vocab, bool entropy) {
  const char* const op = "logits_grpo_loss";
  int device, most;
  CUDA_CHECK(op, cudaGetDevice(&device));
  CUDA_CHECK(op, cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
  const int64_t packs = vocab * static_cast<int64_t>(sizeof(T)) / 16;
  const auto bytes = [&](int cluster) { return (packs + cluster - 1) / cluster * 16; };
  const auto plan = [&](Hold hold, int64_t fits) {
    // The largest cluster of the slices that it would have.
    const LaunchShape shape{1, kThreads, hold == Hold::kShared ? std::min(kSliceBytes, fits) : 0};
    const int largest =
        std::min(kMaxCluster, largest_cluster(op, kernel_of<T>(hold, entropy), shape));
    const int64_t fill = blocks_at_a_time(op, blocks_per_sm(hold));
    Plan out{hold, 1, 0};
    const auto few = [&] {  // rows, with slices that are not too small to be divided
      return rows * out.cluster < fill && bytes(out.cluster) >= 2 * kLeastBytes;
    };
    while (out.cluster < largest && (bytes(out.cluster) > fits || few())) out.cluster *= 2;
    if (hold == Hold::kShared) out.shared_bytes = static_cast<size_t>(bytes(out.cluster));
    return out;
  };
  if (!entropy) {
    constexpr int64_t kFits = Exponentials<T>::kPacks * 16 * kThreads;
    const Plan registers = plan(Hold::kRegisters, kFits);
    if (bytes(registers.cluster) <= kFits) return registers;
  }
  const Plan shared = plan(Hold::kShared, kSliceBytes);
  // Less than two blocks an SM: read twice.
  if (static_cast<int64_t>(shared.shared_bytes) > most / 2 - 2048) return {Hold::kNothing, 1, 0};
  return shared;
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
    const bool entropy = args.forward.entropy != nullptr;
    Plan plan{Hold::kNothing, 1, 0};
    if (same_alignment(args, kElement)) plan = plan_for<T>(in.rows, in.vocab, entropy);
    const auto kernel = kernel_of<T>(plan.hold, entropy);
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

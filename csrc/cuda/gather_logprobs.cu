// Log-probabilities of given tokens, entropy and log-sum-exp: one block a row, one read of the
// logits forward, one read and one write backward. The maths is in
// vcr1_fast/ops/gather_logprobs.py. Not run in continuous integration, which has no GPU.
#include "common.cuh"

namespace vcr1::cuda {
namespace {

constexpr int kThreads = 1024;
constexpr float kShiftLow = -200.0f;  // as in the CPU kernel: keeps 0 * inf out of the entropy

__device__ inline float quiet_nan() { return __int_as_float(0x7fffffff); }
__device__ inline float infinity() { return __int_as_float(0x7f800000); }

// Running maximum of the logits, sum of e^d and of d e^d with d = (x - max) / T.
struct Sums {
  float max, weight, weighted_d;

  __device__ void rescale(float top, float inv_temperature) {
    if (!(top > max)) return;
    if (weight != 0.0f) {
      const float d = (max - top) * inv_temperature;
      const float factor = __expf(d);
      weighted_d = factor > 0.0f ? factor * (weighted_d + d * weight) : 0.0f;
      weight *= factor;
    }
    max = top;
  }
  __device__ void add(float x, float inv_temperature) {
    rescale(x, inv_temperature);
    if (x == -infinity()) return;  // weighs 0; -inf - -inf would be NaN
    const float d = (x - max) * inv_temperature;
    const float e = __expf(d);
    weight += e;
    weighted_d += e * fmaxf(d, kShiftLow);
  }
  __device__ void merge(Sums other, float inv_temperature) {
    rescale(other.max, inv_temperature);
    other.rescale(max, inv_temperature);
    weight += other.weight;
    weighted_d += other.weighted_d;
  }
};

// The same order of additions every time: results repeat bit for bit.
__device__ Sums block_merge(Sums sums, float inv_temperature) {
  __shared__ Sums parts[kThreads / 32];
  for (int step = 16; step > 0; step /= 2) {
    const Sums other{__shfl_down_sync(~0u, sums.max, step),
                     __shfl_down_sync(~0u, sums.weight, step),
                     __shfl_down_sync(~0u, sums.weighted_d, step)};
    sums.merge(other, inv_temperature);
  }
  if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = sums;
  __syncthreads();
  if (threadIdx.x == 0)
    for (int i = 1; i < kThreads / 32; ++i) sums.merge(parts[i], inv_temperature);
  return sums;  // thread 0's is the row's
}

__device__ inline float temperature_of(const GatherLogprobsInput& in, int64_t row) {
  return in.row_temperature != nullptr ? in.row_temperature[row] : in.temperature;
}

template <typename T>
__global__ void __launch_bounds__(kThreads) forward_kernel(GatherLogprobsForward a) {
  const GatherLogprobsInput& in = a.in;
  const int64_t row = blockIdx.x;
  float* const logps = a.logps + row * in.k;
  float* const stats = a.stats + row * 3;
  if (in.mask != nullptr && !in.mask[row]) {
    for (int64_t j = threadIdx.x; j < in.k; j += kThreads) logps[j] = 0.0f;
    if (threadIdx.x == 0) {
      stats[0] = stats[1] = stats[2] = a.lse[row] = 0.0f;
      if (a.entropy != nullptr) a.entropy[row] = 0.0f;
    }
    return;
  }
  const T* const x = static_cast<const T*>(in.logits) + row_offset(in.layout, row);
  const float inv_temperature = 1.0f / temperature_of(in, row);
  Sums sums{-infinity(), 0.0f, 0.0f};
  int64_t done = 0;
  if (aligned(x)) {
    constexpr int n = Pack<T>::kSize;
    const auto* const packs = reinterpret_cast<const Pack<T>*>(x);
    for (int64_t i = threadIdx.x; i < in.vocab / n; i += kThreads) {
      const Pack<T> pack = packs[i];
      // One rescale a pack instead of one an element.
      float values[n], top = sums.max;
      for (int j = 0; j < n; ++j) top = fmaxf(top, values[j] = widen(pack.lanes[j]));
      sums.rescale(top, inv_temperature);
      for (int j = 0; j < n; ++j) sums.add(values[j], inv_temperature);
    }
    done = in.vocab / n * n;
  }
  for (int64_t i = done + threadIdx.x; i < in.vocab; i += kThreads)
    sums.add(widen(x[i]), inv_temperature);
  sums = block_merge(sums, inv_temperature);

  __shared__ Sums row_sums;
  if (threadIdx.x == 0) row_sums = sums;
  __syncthreads();
  const float log_sum = row_sums.weight == 0.0f ? quiet_nan() : logf(row_sums.weight);
  for (int64_t j = threadIdx.x; j < in.k; j += kThreads) {
    const int64_t label = in.labels[row * in.k + j];
    const bool known = label >= 0 && label < in.vocab;
    const float d = known ? (widen(x[label]) - row_sums.max) * inv_temperature : quiet_nan();
    logps[j] = d - log_sum;
  }
  if (threadIdx.x == 0) {
    const float mean_d = row_sums.weighted_d / row_sums.weight;
    a.lse[row] = row_sums.max * inv_temperature + (row_sums.weight == 0.0f ? 0.0f : log_sum);
    if (a.entropy != nullptr) a.entropy[row] = log_sum - mean_d;
    stats[0] = row_sums.max;
    stats[1] = log_sum;
    stats[2] = mean_d;
  }
}

// dL/dx_j = p_j (a - h (d_j - mean_d)) / T; the label terms follow.
struct RowGradient {
  float max, inv_temperature, log_sum, mean_d, a, h;
  __device__ float at(float x) const {
    const float d = (x - max) * inv_temperature;
    const float p = __expf(d - log_sum);
    return p * (a - h * (fmaxf(d, kShiftLow) - mean_d)) * inv_temperature;
  }
};

template <typename T>
__global__ void __launch_bounds__(kThreads) backward_kernel(GatherLogprobsBackward a) {
  const GatherLogprobsInput& in = a.in;
  const int64_t row = blockIdx.x;
  const T* const x = static_cast<const T*>(in.logits) + row_offset(in.layout, row);
  T* const out = static_cast<T*>(a.grad) + row_offset(a.grad_layout, row);
  const int64_t* const labels = in.labels + row * in.k;
  const float* const g = a.grad_logps + row * in.k;
  const float* const stats = a.stats + row * 3;
  const float h = a.grad_entropy != nullptr ? a.grad_entropy[row] : 0.0f;
  const float g_lse = a.grad_lse != nullptr ? a.grad_lse[row] : 0.0f;
  float g_sum = 0.0f;  // every thread the same few values: cheaper than a reduction
  bool zero = h == 0.0f && g_lse == 0.0f;
  for (int64_t j = 0; j < in.k; ++j) {
    zero = zero && g[j] == 0.0f;
    g_sum += g[j];
  }
  zero = zero || (in.mask != nullptr && !in.mask[row]);

  const float inv_temperature = 1.0f / temperature_of(in, row);
  const RowGradient gradient{stats[0], inv_temperature, stats[1], stats[2], g_lse - g_sum, h};
  int64_t done = 0;
  if (aligned(x) && aligned(out)) {
    constexpr int n = Pack<T>::kSize;
    const auto* const packs = reinterpret_cast<const Pack<T>*>(x);
    auto* const outs = reinterpret_cast<Pack<T>*>(out);
    for (int64_t i = threadIdx.x; i < in.vocab / n; i += kThreads) {
      Pack<T> result;
      if (zero) {
        for (int j = 0; j < n; ++j) result.lanes[j] = narrow<T>(0.0f);
      } else {
        const Pack<T> pack = packs[i];
        for (int j = 0; j < n; ++j) result.lanes[j] = narrow<T>(gradient.at(widen(pack.lanes[j])));
      }
      outs[i] = result;
    }
    done = in.vocab / n * n;
  }
  for (int64_t i = done + threadIdx.x; i < in.vocab; i += kThreads)
    out[i] = narrow<T>(zero ? 0.0f : gradient.at(widen(x[i])));
  if (zero) return;

  // The labels' elements are written again, by other threads than before: wait for the block.
  // They come from the log-probs, because in place their logits are gone.
  __syncthreads();
  for (int64_t j = threadIdx.x; j < in.k; j += kThreads) {
    if (labels[j] < 0 || labels[j] >= in.vocab) continue;
    float own = 0.0f;
    for (int64_t i = 0; i < in.k; ++i)
      if (labels[i] == labels[j]) own += g[i];
    const float logp = a.logps[row * in.k + j];
    const float d = fmaxf(logp + stats[1], kShiftLow);
    const float p = expf(logp);
    // Labels that repeat write the same value.
    out[labels[j]] = narrow<T>((own + p * (gradient.a - h * (d - stats[2]))) * inv_temperature);
  }
}

}  // namespace

void gather_logprobs(const GatherLogprobsForward& args, void* stream) {
  for_float_dtype(args.in.dtype, [&](auto type) {
    forward_kernel<decltype(type)>
        <<<static_cast<unsigned>(args.in.rows), kThreads, 0, static_cast<cudaStream_t>(stream)>>>(
            args);
  });
  CUDA_CHECK("gather_logprobs", cudaGetLastError());
}

void gather_logprobs_backward(const GatherLogprobsBackward& args, void* stream) {
  for_float_dtype(args.in.dtype, [&](auto type) {
    backward_kernel<decltype(type)>
        <<<static_cast<unsigned>(args.in.rows), kThreads, 0, static_cast<cudaStream_t>(stream)>>>(
            args);
  });
  CUDA_CHECK("gather_logprobs_backward", cudaGetLastError());
}

}  // namespace vcr1::cuda

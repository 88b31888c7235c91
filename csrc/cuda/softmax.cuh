// Softmax sums of a row of logits by a team of threads, in one read. The maths is in
// vcr1_fast/ops/gather_logprobs.py; shifted logits are kept in units of log 2 here, because the
// hardware's exponential is 2^x: t = (x - max) scale, scale = log2(e) / T.
#pragma once

#include <cmath>

#include "cluster.cuh"
#include "common.cuh"

namespace vcr1::cuda {

constexpr float kLog2e = 1.4426950408889634f;
constexpr float kLn2 = 0.6931471805599453f;
// Under entropy a logit this far below the maximum (or at -inf) weighs exactly 0, and 0 * inf would
// be NaN; shifted logits are clamped here first. In nats, as in the CPU kernel.
constexpr float kShiftLow = -200.0f;
// Below any finite logit but -FLT_MAX itself, and finite: -inf - -inf would be NaN.
constexpr float kLowest = -3.402823466e38f;

__device__ inline float quiet_nan() { return __int_as_float(0x7fffffff); }
__device__ inline float infinity() { return __int_as_float(0x7f800000); }

// 2^x to a relative error of 2^-22; exactly 1 at 0, 0 below -126.
VCR1_HOST_DEVICE inline float exp2_fast(float x) {
#ifdef __CUDA_ARCH__
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  return x < -126.0f ? 0.0f : std::exp2(x);
#endif
}

__device__ inline float pack_max(const Pack<float>& pack) {
  return fmaxf(fmaxf(pack.lanes[0], pack.lanes[1]), fmaxf(pack.lanes[2], pack.lanes[3]));
}
// Halves are compared in pairs, in their own type: half the instructions.
template <typename Pair, typename T>
__device__ inline float pack_max_by_pairs(const Pack<T>& pack) {
  Pair pairs[4];
  memcpy(pairs, pack.lanes, sizeof(pairs));
  const Pair top = __hmax2(__hmax2(pairs[0], pairs[1]), __hmax2(pairs[2], pairs[3]));
  return fmaxf(widen(top.x), widen(top.y));
}
__device__ inline float pack_max(const Pack<__half>& pack) {
  return pack_max_by_pairs<__half2>(pack);
}
__device__ inline float pack_max(const Pack<__nv_bfloat16>& pack) {
  return pack_max_by_pairs<__nv_bfloat162>(pack);
}

// Running maximum of the logits, sum of 2^t and of t 2^t.
struct Sums {
  float max, weight, weighted_t;

  VCR1_HOST_DEVICE static Sums above(float max) { return {max, 0.0f, 0.0f}; }
  VCR1_HOST_DEVICE static Sums none() { return above(kLowest); }

  // Without a branch: in a warp some lane's maximum rises nearly every time. The clamp keeps
  // (-inf) * 0 out; at the clamp the factor is 0.
  VCR1_HOST_DEVICE void raise(float top, float scale) {
    const float t = fmaxf((max - top) * scale, -1000.0f);
    const float factor = exp2_fast(t);
    weighted_t = factor * (weighted_t + t * weight);
    weight *= factor;
    max = top;
  }
  // x <= max.
  template <bool kEntropy>
  VCR1_HOST_DEVICE void add(float x, float scale) {
    const float t = (x - max) * scale;
    const float e = exp2_fast(t);
    weight += e;
    if (kEntropy) weighted_t += e * fmaxf(t, kShiftLow * kLog2e);
  }
  // The same bits when own and other change places, as the lanes of a butterfly need it: they
  // branch on what they compute from the sums. Plain additions would not do. The compiler fuses one
  // of the two products of raise() into the addition, and rounds only the other.
  __device__ void merge(Sums other, float scale) {
    const float top = fmaxf(max, other.max);
    raise(top, scale);
    other.raise(top, scale);
    weight = __fadd_rn(weight, other.weight);
    weighted_t = __fadd_rn(weighted_t, other.weighted_t);
  }

  template <bool kEntropy, int kPacks, typename T>
  __device__ void take(const Pack<T> (&packs)[kPacks], float scale) {
    float top = max;
#pragma unroll
    for (int u = 0; u < kPacks; ++u) top = fmaxf(top, pack_max(packs[u]));
    raise(top, scale);
    // Two short sums at a time: shorter chains of additions, and less rounding.
    Sums even = above(max), odd = even;
#pragma unroll
    for (int u = 0; u < kPacks; ++u) {
#pragma unroll
      for (int j = 0; j < Pack<T>::kSize; j += 2) {
        float a, b;
        widen_pair(packs[u].lanes + j, a, b);
        even.add<kEntropy>(a, scale);
        odd.add<kEntropy>(b, scale);
      }
    }
    weight += even.weight + odd.weight;
    weighted_t += even.weighted_t + odd.weighted_t;
  }

  // What the row is made of. An empty row (nothing but -inf) has no distribution.
  VCR1_HOST_DEVICE bool empty() const { return weight == 0.0f; }
  VCR1_HOST_DEVICE float log_sum() const { return empty() ? NAN : logf(weight); }
  VCR1_HOST_DEVICE float mean_d() const { return weighted_t / weight * kLn2; }
  VCR1_HOST_DEVICE float top() const { return empty() ? -INFINITY : max; }
  VCR1_HOST_DEVICE float lse(float temperature) const {
    return empty() ? -INFINITY : max / temperature + logf(weight);
  }
};

// Columns of a row are counted in 32 bits, with a margin for a loop that runs over the end.
constexpr int64_t kMaxVocab = int64_t{1} << 30;
constexpr int kUnroll = 4;  // 16-byte loads in flight a thread

// The part of thread `thread` of kThreads (at least a warp, which covers the row's edge).
template <bool kEntropy, int kThreads, typename T>
__device__ inline Sums thread_sums(const PackedRow<const T>& row, int thread, float scale) {
  Sums sums = Sums::none();
  Pack<T> packs[kUnroll];
  int i = thread;
  for (; i + (kUnroll - 1) * kThreads < row.packs; i += kUnroll * kThreads) {
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) packs[u] = load_streaming(row.pack(i + u * kThreads));
    sums.take<kEntropy>(packs, scale);
  }
  if (i < row.packs) {  // all loads at once again: one wait, not up to three
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      packs[u] = filled_pack<T>(-infinity());
      if (i + u * kThreads < row.packs) packs[u] = load_streaming(row.pack(i + u * kThreads));
    }
    sums.take<kEntropy>(packs, scale);
  }
  if (thread < row.edge) {
    const float x = widen(*row.edge_element(thread));
    sums.raise(fmaxf(sums.max, x), scale);
    sums.add<kEntropy>(x, scale);
  }
  return sums;
}

// Butterfly: the same order of additions every time, and the result in every lane.
__device__ inline Sums warp_merge(Sums sums, float scale) {
#pragma unroll
  for (int step = 16; step > 0; step /= 2) {
    Sums other;
    other.max = __shfl_xor_sync(~0u, sums.max, step);
    other.weight = __shfl_xor_sync(~0u, sums.weight, step);
    other.weighted_t = __shfl_xor_sync(~0u, sums.weighted_t, step);
    sums.merge(other, scale);
  }
  return sums;
}

// Merged over the team, a warp or the whole block: every thread gets the row's sums.
template <int kThreads>
__device__ inline Sums team_merge(Sums sums, float scale) {
  sums = warp_merge(sums, scale);
  if constexpr (kThreads > 32) {
    constexpr int kWarps = kThreads / 32;
    static_assert(kWarps <= 32);
    __shared__ Sums parts[kWarps];
    if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = sums;
    __syncthreads();
    const int lane = threadIdx.x % 32;
    sums = lane < kWarps ? parts[lane] : Sums::none();
    sums = warp_merge(sums, scale);
  }
  return sums;
}

// Merged over a cluster of blocks: every thread of each gets the row's sums, from the same
// additions. shared_value: of each block's first thread, becomes that of block 0's in all. The
// caller waits for its cluster before it ends, because others may still be reading its part.
template <int kThreads>
__device__ inline Sums cluster_merge(Sums sums, float scale, int cluster, float& shared_value) {
  sums = team_merge<kThreads>(sums, scale);
  __shared__ float part[4];
  if (threadIdx.x == 0) {
    part[0] = sums.max;
    part[1] = sums.weight;
    part[2] = sums.weighted_t;
    part[3] = shared_value;
  }
  cluster_arrive(threadIdx.x == 0);
  cluster_wait();
  const int lane = threadIdx.x % 32;
  sums = Sums::none();
  if (lane < cluster) {
    sums.max = cluster_read(part, lane);
    sums.weight = cluster_read(part + 1, lane);
    sums.weighted_t = cluster_read(part + 2, lane);
  }
  shared_value = cluster_read(part + 3, 0);
  sums = warp_merge(sums, scale);
  // Nothing was written since, and what was read has arrived: the merge has used it.
  cluster_arrive(false);
  return sums;
}

// dL/dx_j = p_j (a - h (d_j - mean_d)) / T with d = (x - max) / T, and the label terms, which
// at_label() has. max, log_sum and mean_d are those of the row's Sums.
template <bool kEntropy>
struct RowGradient {
  float max, scale, log2_sum;
  float slope, base, lowest;  // p (slope d T + base)
  float a, h, mean_d;

  VCR1_HOST_DEVICE RowGradient(float max, float log_sum, float mean_d, float temperature, float a,
                               float h)
      : max(max),
        scale(kLog2e / temperature),
        log2_sum(log_sum * kLog2e),
        slope(-h / temperature / temperature),
        base((kEntropy ? a + h * mean_d : a) / temperature),
        lowest(kShiftLow * temperature),
        a(a),
        h(h),
        mean_d(mean_d) {}

  VCR1_HOST_DEVICE float at(float x) const {
    const float d = x - max;
    const float p = exp2_fast(fmaf(d, scale, -log2_sum));
    return kEntropy ? p * fmaf(fmaxf(d, lowest), slope, base) : p * base;
  }
  // own: the sum of the upstream gradients of the label's log-prob.
  VCR1_HOST_DEVICE float at_label(float logp, float log_sum, float temperature, float own) const {
    float value = own + expf(logp) * a;
    if (kEntropy) value -= expf(logp) * h * (fmaxf(logp + log_sum, kShiftLow) - mean_d);
    return value / temperature;
  }
};

template <bool kEntropy, typename T>
__device__ inline Pack<T> gradient_pack(const RowGradient<kEntropy>& gradient,
                                        const Pack<T>& pack) {
  Pack<T> out;
#pragma unroll
  for (int j = 0; j < Pack<T>::kSize; j += 2) {
    float x, y;
    widen_pair(pack.lanes + j, x, y);
    narrow_pair(gradient.at(x), gradient.at(y), out.lanes + j);
  }
  return out;
}

// One read of x, one write of out, which may be x itself: each thread reads its elements before it
// writes them, and no others.
template <int kThreads, bool kEntropy, typename T>
__device__ inline void write_gradient(const RowGradient<kEntropy>& gradient,
                                      const PackedRow<const T>& x, const PackedRow<T>& out,
                                      int thread) {
  if (x.head != out.head) {  // no 16-byte address of one is one of the other
    const int size = x.packs * Pack<T>::kSize + x.edge;
    for (int i = thread; i < size; i += kThreads)
      out.first[i] = narrow<T>(gradient.at(widen(x.first[i])));
    return;
  }
  for (int i = thread; i < x.packs; i += kUnroll * kThreads) {
    Pack<T> packs[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u)
      if (i + u * kThreads < x.packs) packs[u] = load_streaming(x.pack(i + u * kThreads));
#pragma unroll
    for (int u = 0; u < kUnroll; ++u)
      if (i + u * kThreads < x.packs)
        store_streaming(out.pack(i + u * kThreads), gradient_pack(gradient, packs[u]));
  }
  if (thread < x.edge)
    *out.edge_element(thread) = narrow<T>(gradient.at(widen(*x.edge_element(thread))));
}

}  // namespace vcr1::cuda

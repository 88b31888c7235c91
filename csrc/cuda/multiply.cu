// A gradient times the upstream gradient, a number that only the GPU knows. Nearly always it is 1:
// then nothing but the number is read.
#include <algorithm>

#include "common.cuh"

namespace vcr1::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kMostBlocks = 2048;  // enough to fill a GPU, few enough to return at once
constexpr int64_t kPart = 32768;   // elements: whole packs, so parts of a row share its alignment

template <typename T, typename Factor>
__device__ inline T product(T x, Factor factor) {
  return narrow<T>(widen(x) * static_cast<float>(factor));
}
__device__ inline double product(double x, double factor) { return x * factor; }
__device__ inline double product(double x, float factor) { return x * factor; }

template <typename T, typename Factor>
__global__ void __launch_bounds__(kThreads)
    multiply_kernel(const __grid_constant__ MultiplyArgs a) {
  const Factor factor = *static_cast<const Factor*>(a.factor);
  if (factor == Factor{1}) return;
  const int64_t parts = (a.columns + kPart - 1) / kPart;
  for (int64_t i = blockIdx.x; i < a.rows * parts; i += gridDim.x) {
    const int64_t first = i % parts * kPart;
    const int size = static_cast<int>(min(kPart, a.columns - first));
    const PackedRow<T> row(static_cast<T*>(a.x) + row_offset(a.layout, i / parts) + first, size);
    for (int j = threadIdx.x; j < row.packs; j += kThreads) {
      Pack<T> pack = load_streaming(row.pack(j));
#pragma unroll
      for (int lane = 0; lane < Pack<T>::kSize; ++lane)
        pack.lanes[lane] = product(pack.lanes[lane], factor);
      store_streaming(row.pack(j), pack);
    }
    if (static_cast<int>(threadIdx.x) < row.edge) {
      T* const x = row.edge_element(threadIdx.x);
      *x = product(*x, factor);
    }
  }
}

template <typename T>
void run(const MultiplyArgs& args, void* stream) {
  const int64_t parts = args.rows * ((args.columns + kPart - 1) / kPart);
  const LaunchShape shape{static_cast<unsigned>(std::min<int64_t>(parts, kMostBlocks)), kThreads};
  const auto kernel =
      args.factor_dtype == DType::kFloat64 ? multiply_kernel<T, double> : multiply_kernel<T, float>;
  launch("multiply", kernel, shape, stream, args);
}

}  // namespace

void multiply(const MultiplyArgs& args, void* stream) {
  if (args.dtype == DType::kFloat64) return run<double>(args, stream);
  for_float_dtype(args.dtype, [&](auto type) { run<decltype(type)>(args, stream); });
}

}  // namespace vcr1::cuda

// Separable resize of RGB frames: the part that resize_frames and video_patches share. A block
// makes a tile of one resized frame and hands it to a Sink, which normalises, orders and stores it.
// The scalar methods take the Sink's tile (kTileRows x kTileColumns), the matrix methods the
// plan's.
//
// The integer passes are products with banded matrices, and run on the tensor cores: 16 outputs
// times 32 inputs are the weights, 32 inputs times 8 are pixels. A weight of 16 or 24 bits is two
// or three bytes, of which the highest has the sign; the partial sums are exact, and so is their
// sum. Strips of 16 source rows come through a double buffer, and leave as columns of bytes, which
// is what the vertical pass wants for its second operand.
//
// Nothing here has run on a GPU yet.
#pragma once

#include <algorithm>
#include <limits>

#include "strip.cuh"

namespace vcr1::cuda {

constexpr int kGroup = 16;       // outputs that share a block of weights
constexpr int kStep = 32;        // inputs of one multiplication
constexpr int kMatrixWarps = 4;  // at most: one a group of the tile's width
constexpr int kScalarThreads = 256;

// Where a tile lies in the output, and how much of it is inside.
struct Tile {
  int64_t t;
  int y, x, rows, columns;
};

// A tile's values: channel c of pixel (y, x) is data[c * plane + y * pitch + x].
template <typename Value>
struct TileValues {
  const Value* data;
  int plane, pitch;
};

__device__ inline Tile tile_of(const ResizeArgs& args, int rows, int columns) {
  const int height = args.vertical.n_out, width = args.horizontal.n_out;
  const unsigned down = (height + rows - 1) / rows, across = (width + columns - 1) / columns;
  const unsigned row = blockIdx.x / across;
  Tile tile;
  tile.x = static_cast<int>(blockIdx.x % across) * columns;
  tile.y = static_cast<int>(row % down) * rows;
  tile.t = row / down;
  tile.rows = min(rows, height - tile.y);
  tile.columns = min(columns, width - tile.x);
  return tile;
}

inline unsigned count_tiles(const char* op, const ResizeArgs& args, int rows, int columns) {
  const int64_t n = args.n_frames * ((args.vertical.n_out + rows - 1) / rows) *
                    ((args.horizontal.n_out + columns - 1) / columns);
  VCR1_CHECK(n <= std::numeric_limits<int32_t>::max(), op, ": ", n, " tiles are too many");
  return static_cast<unsigned>(n);
}

// The group of 16 outputs that a warp works on: its first input, counted from the tile's.
struct Group {
  int offset, steps;
  const uint4* weights;
};

__device__ inline Group group_of(const ResizeAxis& axis, int planes, int tile, int group) {
  const int32_t* const row = axis.first + tile * (2 + 2 * axis.groups);
  const int index = tile * axis.groups + group;
  return {row[2 + 2 * group], row[3 + 2 * group],
          static_cast<const uint4*>(axis.weights) + index * axis.steps * planes * 32};
}

template <int kPlanes>
struct Weights {
  uint4 plane[kPlanes];

  __device__ void load(const uint4* table, int step) {
    for (int p = 0; p < kPlanes; ++p)
      plane[p] = __ldg(table + (step * kPlanes + p) * 32 + threadIdx.x % 32);
  }
};

// 16 outputs times 8 columns in each of kBlocks, as the tensor core spreads them over the warp.
template <int kPlanes, int kBlocks>
struct Sums {
  int plane[kBlocks][kPlanes][4] = {};

  __device__ void add(const Weights<kPlanes>& weights, const uint32_t (&inputs)[kBlocks][2]) {
    for (int i = 0; i < kBlocks; ++i) {
      multiply_add<true>(plane[i][0], weights.plane[0], inputs[i]);
      for (int p = 1; p < kPlanes; ++p)
        multiply_add<false>(plane[i][p], weights.plane[p], inputs[i]);
    }
  }
  // (sum + half) >> bits of value k.
  __device__ int rounded(int block, int k, int bits) const {
    uint32_t sum = static_cast<uint32_t>(plane[block][0][k]);
    for (int p = 1; p < kPlanes; ++p) sum = (sum << 8) + static_cast<uint32_t>(plane[block][p][k]);
    return static_cast<int>(sum + (1u << (bits - 1))) >> bits;
  }
};

__host__ __device__ inline int channel_columns(const ResizeArgs& args) {
  return (args.horizontal.tile + 7) / 8 * 8;
}

// The horizontal pass over a strip, by one warp and for one group: bytes to columns[c][x][row].
template <int kPlanes, int kSteps>
__device__ inline void resize_strip(const ResizeArgs& args, const Group& group, int group_index,
                                    const Weights<kPlanes> (&held)[kSteps > 0 ? kSteps : 1],
                                    const uint8_t* strip, uint8_t* columns) {
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const int width = channel_columns(args);
  for (int half = 0; half < kStripRows; half += 8) {
    Sums<kPlanes, 3> sums;
    const uint8_t* from = strip + (half + g) * args.source_pitch + 3 * (group.offset + 4 * t);
    const auto step = [&](const Weights<kPlanes>& weights) {
      uint32_t inputs[3][2];
      for (int k = 0; k < 2; ++k, from += 3 * kStep / 2) {
        uint32_t packed[3], planes[3];
        for (int i = 0; i < 3; ++i) packed[i] = reinterpret_cast<const uint32_t*>(from)[i];
        separate(packed, planes);
        for (int c = 0; c < 3; ++c) inputs[c][k] = planes[c];
      }
      sums.add(weights, inputs);
    };
    if constexpr (kSteps > 0) {
#pragma unroll
      for (int s = 0; s < kSteps; ++s) step(held[s]);
    } else {
      for (int s = 0; s < group.steps; ++s) {
        Weights<kPlanes> weights;
        weights.load(group.weights, s);
        step(weights);
      }
    }
    const int bits = args.horizontal.bits;
#pragma unroll
    for (int c = 0; c < 3; ++c) {
#pragma unroll
      for (int k = 0; k < 4; k += 2) {
        const int x = group_index * kGroup + g + 4 * k;
        if (x >= width) continue;
        auto* const to = columns + (c * width + x) * args.column_pitch + half + 2 * t;
        *reinterpret_cast<uint16_t*>(to) =
            saturate(sums.rounded(c, k, bits), sums.rounded(c, k + 1, bits));
      }
    }
  }
}

// The vertical pass over the tile, by all warps: columns[c][x][row] to resized[c][y][x].
template <int kPlanes>
__device__ inline void resize_columns(const ResizeArgs& args, int tile, const uint8_t* columns,
                                      uint8_t* resized) {
  constexpr int kBlocks = 6;  // of 8 columns, that share the loaded weights
  const ResizeAxis& axis = args.vertical;
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const int width = channel_columns(args), blocks = 3 * width / 8;
  const int units = axis.groups * ((blocks + kBlocks - 1) / kBlocks);
  for (int unit = threadIdx.x / 32; unit < units; unit += blockDim.x / 32) {
    const int group_index = unit % axis.groups, first = unit / axis.groups * kBlocks;
    const Group group = group_of(axis, kPlanes, tile, group_index);
    const uint8_t* from[kBlocks];
#pragma unroll
    for (int i = 0; i < kBlocks; ++i)
      from[i] =
          columns + (8 * min(first + i, blocks - 1) + g) * args.column_pitch + group.offset + 4 * t;
    Sums<kPlanes, kBlocks> sums;
    for (int s = 0; s < group.steps; ++s) {
      Weights<kPlanes> weights;
      weights.load(group.weights, s);
      uint32_t inputs[kBlocks][2];
#pragma unroll
      for (int i = 0; i < kBlocks; ++i)
        for (int k = 0; k < 2; ++k)
          inputs[i][k] = *reinterpret_cast<const uint32_t*>(from[i] + s * kStep + k * (kStep / 2));
      sums.add(weights, inputs);
    }
#pragma unroll
    for (int i = 0; i < kBlocks; ++i) {
      if (first + i >= blocks) break;
      const int block = first + i, c = (block >= width / 8) + (block >= width / 4);
      const int x = 8 * block - c * width + 2 * t;
#pragma unroll
      for (int k = 0; k < 4; k += 2) {
        const int y = group_index * kGroup + g + 4 * k;
        if (y >= axis.tile) continue;
        auto* const to = resized + (c * axis.tile + y) * width + x;
        *reinterpret_cast<uint16_t*>(to) =
            saturate(sums.rounded(i, k, axis.bits), sums.rounded(i, k + 1, axis.bits));
      }
    }
  }
}

// kSteps: the steps of every horizontal group, whose weights then stay in registers; or 0.
template <int kPlanes, int kSteps, typename Sink>
__global__ void __launch_bounds__(32 * kMatrixWarps)
    matrix_kernel(const __grid_constant__ ResizeArgs args, const Source source,
                  const __grid_constant__ Sink sink) {
  uint8_t* const shared = dynamic_shared();
  uint8_t* const strips = shared + Sink::kTableBytes;
  uint8_t* const resized = strips;  // once the strips are done with
  uint8_t* const columns = strips + args.source_bytes;
  sink.prepare(shared);

  const ResizeAxis &across = args.horizontal, &down = args.vertical;
  const Tile tile = tile_of(args, down.tile, across.tile);
  const int tile_x = tile.x / across.tile, tile_y = tile.y / down.tile;
  const int32_t* const x_span = across.first + tile_x * (2 + 2 * across.groups);
  const int32_t* const y_span = down.first + tile_y * (2 + 2 * down.groups);
  const int pixels = x_span[1], rows = y_span[1];
  const uint8_t* const corner = args.frames + tile.t * args.frame_stride +
                                y_span[0] * args.row_stride + x_span[0] * args.column_stride;

  const int group_index = threadIdx.x / 32;
  const Group group = group_of(across, kPlanes, tile_x, group_index);
  Weights<kPlanes> held[kSteps > 0 ? kSteps : 1];
  if constexpr (kSteps > 0)
    for (int s = 0; s < kSteps; ++s) held[s].load(group.weights, s);

  const auto load = [&](int strip) {
    const int row = strip * kStripRows;
    load_strip(args, source, corner + row * args.row_stride, min(kStripRows, rows - row), pixels,
               strips + strip % 2 * args.strip_bytes);
    commit_copies();
  };
  const int n_strips = (rows + kStripRows - 1) / kStripRows;
  load(0);
  for (int strip = 0; strip < n_strips; ++strip) {
    if (strip + 1 < n_strips) {
      load(strip + 1);
      wait_copies<1>();
    } else {
      wait_copies<0>();
    }
    __syncthreads();  // every thread's copies of this strip have arrived
    resize_strip<kPlanes, kSteps>(args, group, group_index, held,
                                  strips + strip % 2 * args.strip_bytes,
                                  columns + strip * kStripRows);
    __syncthreads();  // its half of the buffer is free again
  }
  resize_columns<kPlanes>(args, tile_y, columns, resized);
  __syncthreads();
  const int width = channel_columns(args);
  sink.write(tile, TileValues<uint8_t>{resized, down.tile * width, width}, shared);
}

// The arithmetic of the scalar methods. The float products are added left to right and not fused:
// the bits of the CPU kernels and of plain torch.
__device__ inline int add_product(int sum, int weight, int value) { return sum + weight * value; }
__device__ inline float add_product(float sum, float weight, float value) {
  return __fadd_rn(sum, __fmul_rn(weight, value));
}
__device__ inline int start_of(int bits, int) { return 1 << (bits - 1); }
__device__ inline float start_of(int, float) { return 0.0f; }
__device__ inline int between_passes(int sum, int bits) { return min(max(sum >> bits, 0), 255); }
__device__ inline float between_passes(float sum, int) { return sum; }
__device__ inline void finish(int sum, int bits, uint8_t& out) {
  out = static_cast<uint8_t>(between_passes(sum, bits));
}
__device__ inline void finish(float sum, int, uint8_t& out) {  // half to even
  out = static_cast<uint8_t>(__float2int_rn(fminf(fmaxf(sum, 0.0f), 255.0f)));
}
__device__ inline void finish(float sum, int, float& out) { out = sum; }

// Any sizes: Number is the type of the weights and of the sums, Value that of the results.
template <typename Number, typename Value, typename Sink>
__global__ void __launch_bounds__(kScalarThreads)
    scalar_kernel(const __grid_constant__ ResizeArgs args, const __grid_constant__ Sink sink) {
  constexpr int kLine = 3 * Sink::kTileColumns, kPlane = Sink::kTileRows * Sink::kTileColumns;
  constexpr int kOutputs = (3 * kPlane + kScalarThreads - 1) / kScalarThreads;  // of a thread
  __shared__ __align__(16) uint8_t table[Sink::kTableBytes];
  __shared__ Number strip[kStripRows * kLine];
  __shared__ __align__(16) Value resized[3 * kPlane];
  sink.prepare(table);

  const ResizeAxis &across = args.horizontal, &down = args.vertical;
  const Tile tile = tile_of(args, Sink::kTileRows, Sink::kTileColumns);
  const uint8_t* const frame = args.frames + tile.t * args.frame_stride;
  const auto* const weights_x = static_cast<const Number*>(across.weights);
  const auto* const weights_y = static_cast<const Number*>(down.weights);
  Number sums[kOutputs];
#pragma unroll
  for (int k = 0; k < kOutputs; ++k) sums[k] = start_of(down.bits, Number());

  const int end = min(down.n_in, down.first[tile.y + tile.rows - 1] + down.taps);
  for (int top = down.first[tile.y]; top < end; top += kStripRows) {
    const int bottom = min(top + kStripRows, end);
    for (int i = threadIdx.x; i < (bottom - top) * kLine; i += kScalarThreads) {
      const int x = tile.x + i % kLine / 3, c = i % 3;
      if (x >= across.n_out) continue;
      const int first = across.first[x], taps = min(across.taps, across.n_in - first);
      const uint8_t* const from = frame + (top + i / kLine) * args.row_stride +
                                  first * args.column_stride + c * args.channel_stride;
      const Number* const weights = weights_x + static_cast<int64_t>(x) * across.taps;
      Number sum = start_of(across.bits, Number());
      for (int q = 0; q < taps; ++q)
        sum = add_product(sum, __ldg(weights + q),
                          static_cast<Number>(__ldg(from + q * args.column_stride)));
      strip[i] = between_passes(sum, across.bits);
    }
    __syncthreads();
#pragma unroll
    for (int k = 0; k < kOutputs; ++k) {
      const int i = threadIdx.x + k * kScalarThreads;
      const int c = i / kPlane, y = i % kPlane / Sink::kTileColumns, x = i % Sink::kTileColumns;
      if (c >= 3 || y >= tile.rows || x >= tile.columns) continue;
      const int first = down.first[tile.y + y], past = min(first + down.taps, bottom);
      const Number* const weights = weights_y + static_cast<int64_t>(tile.y + y) * down.taps;
      for (int q = max(first, top); q < past; ++q)
        sums[k] =
            add_product(sums[k], __ldg(weights + q - first), strip[(q - top) * kLine + 3 * x + c]);
    }
    __syncthreads();
  }
#pragma unroll
  for (int k = 0; k < kOutputs; ++k) {
    const int i = threadIdx.x + k * kScalarThreads;
    if (i < 3 * kPlane) finish(sums[k], down.bits, resized[i]);
  }
  __syncthreads();
  sink.write(tile, TileValues<Value>{resized, kPlane, Sink::kTileColumns}, table);
}

template <typename Sink>
__global__ void __launch_bounds__(kScalarThreads)
    copy_kernel(const __grid_constant__ ResizeArgs args, const __grid_constant__ Sink sink) {
  constexpr int kPlane = Sink::kTileRows * Sink::kTileColumns;
  __shared__ __align__(16) uint8_t table[Sink::kTableBytes];
  __shared__ __align__(16) uint8_t pixels[3 * kPlane];
  sink.prepare(table);
  const Tile tile = tile_of(args, Sink::kTileRows, Sink::kTileColumns);
  const uint8_t* const corner = args.frames + tile.t * args.frame_stride +
                                tile.y * args.row_stride + tile.x * args.column_stride;
  for (int i = threadIdx.x; i < 3 * kPlane; i += kScalarThreads) {
    const int c = i % 3, x = i / 3 % Sink::kTileColumns, y = i / (3 * Sink::kTileColumns);
    if (y >= tile.rows || x >= tile.columns) continue;
    pixels[c * kPlane + y * Sink::kTileColumns + x] =
        __ldg(corner + y * args.row_stride + x * args.column_stride + c * args.channel_stride);
  }
  __syncthreads();
  sink.write(tile, TileValues<uint8_t>{pixels, kPlane, Sink::kTileColumns}, table);
}

template <typename Sink>
void launch_matrix(const char* op, void (*kernel)(ResizeArgs, Source, Sink), const ResizeArgs& args,
                   const Sink& sink, cudaStream_t stream) {
  const int bytes = args.shared_bytes + Sink::kTableBytes;
  CUDA_CHECK(op, cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes));
  const unsigned tiles = count_tiles(op, args, args.vertical.tile, args.horizontal.tile);
  const auto threads = static_cast<unsigned>(32 * args.horizontal.groups);
  launch(op, kernel, {tiles, threads, static_cast<size_t>(bytes)}, stream, args, source_of(args),
         sink);
}

template <typename Sink>
void launch_scalar(const char* op, void (*kernel)(ResizeArgs, Sink), const ResizeArgs& args,
                   const Sink& sink, cudaStream_t stream) {
  const unsigned tiles = count_tiles(op, args, Sink::kTileRows, Sink::kTileColumns);
  launch(op, kernel, {tiles, kScalarThreads}, stream, args, sink);
}

// Every method whose results are bytes.
template <typename Sink>
void launch_bytes(const char* op, const ResizeArgs& args, const Sink& sink, cudaStream_t stream) {
  switch (args.method) {
    case ResizeMethod::kCopy:
      return launch_scalar<Sink>(op, copy_kernel<Sink>, args, sink, stream);
    case ResizeMethod::kMatrix16:
      if (args.horizontal.steps == 2)
        return launch_matrix<Sink>(op, matrix_kernel<2, 2, Sink>, args, sink, stream);
      if (args.horizontal.steps == 3)
        return launch_matrix<Sink>(op, matrix_kernel<2, 3, Sink>, args, sink, stream);
      return launch_matrix<Sink>(op, matrix_kernel<2, 0, Sink>, args, sink, stream);
    case ResizeMethod::kMatrix22:
      return launch_matrix<Sink>(op, matrix_kernel<3, 0, Sink>, args, sink, stream);
    case ResizeMethod::kInt:
      return launch_scalar<Sink>(op, scalar_kernel<int, uint8_t, Sink>, args, sink, stream);
    default:
      launch_scalar<Sink>(op, scalar_kernel<float, uint8_t, Sink>, args, sink, stream);
  }
}

template <typename Sink>
void launch_floats(const char* op, const ResizeArgs& args, const Sink& sink, cudaStream_t stream) {
  launch_scalar<Sink>(op, scalar_kernel<float, float, Sink>, args, sink, stream);
}

}  // namespace vcr1::cuda

// Attention within packs of groups, forward and backward, in one pass over the keys that each block
// of queries sees: scores of a tile of keys, their exponentials and the products with them stay in
// the cache. See ops/group_attention.py for the formulae.
//
// Forward, a task is a block of 32 queries of one head. Backward, it is a share of the blocks of
// all heads that read one key head; gradients of keys and values are summed in the task's own
// memory, and the tasks' sums are added at the end, so that no two write to one place.
#include <algorithm>
#include <limits>

#include "../kernels.h"
#include "attention_tiles.h"
#include "parallel.h"

namespace vcr1::cpu::VCR1_ISA {
namespace {

constexpr int kKeys = 64;  // of a tile, even
constexpr int kMaxDim = kGroupAttentionMaxDim;
constexpr double kLog2E = 1.4426950408889634, kLn2 = 0.6931471805599453;

// A block with its parts at hand; `parts` is the one its first query is in.
struct Block {
  int64_t row;
  int used;
  const GroupAttentionPart* parts;
};

Block block_at(const GroupAttentionInput& in, int64_t index) {
  const GroupAttentionBlock& block = in.blocks[index];
  return {block.row, static_cast<int>(block.used), in.parts + block.part};
}

// fn(first key, keys, hide) for the tiles of keys that a block sees, `own` being where the keys of
// the queries' rows begin; hide(scores) then sets to -inf what single queries of it do not see.
template <typename S, typename Fn>
void for_keys(const Block& block, int64_t own, Fn&& fn) {
  const auto everything = [](S*) {};
  for (int64_t key = block.parts->prefix; key < block.parts->prefix_end; key += kKeys)
    fn(key, static_cast<int>(std::min<int64_t>(kKeys, block.parts->prefix_end - key)), everything);
  const GroupAttentionPart* part = block.parts;  // the key's
  const int64_t end = block.row + block.used;
  for (int64_t key = part->row; key < end; key += kKeys) {
    const int n = static_cast<int>(std::min<int64_t>(kKeys, end - key));
    const bool all_seen = part->end >= end && key + n <= block.row;
    fn(own + key, n, [&](S* scores) {
      if (all_seen) return;
      constexpr S kHidden = -std::numeric_limits<S>::infinity();
      for (int j = 0; j < n; ++j) {
        while (part->end <= key + j) ++part;
        // Of the queries in this key's part those from the key on.
        const int64_t first = std::max<int64_t>(0, key + j - block.row);
        const int64_t last = std::min<int64_t>(block.used, part->end - block.row);
        S* const row = scores + j * kRows;
        std::fill(row, row + first, kHidden);
        std::fill(row + last, row + kRows, kHidden);
      }
    });
  }
}

template <typename S, typename T>
void copy_row(const T* from, int dim, S* to, int size) {
  using V = typename VecOf<S>::type;
  for (int d = 0; d < size; d += V::kWidth)
    store(to + d, d < dim ? load_partial(from + d, dim - d, S(0)) : splat(S(0)));
}

// Rows of a block as rows[used][size], the rest zero, and times `factor` as columns[size][kRows].
template <typename S, typename T>
void gather(const T* from, int64_t stride, int used, int dim, int size, S factor, S* rows,
            S* columns) {
  for (int r = 0; r < used; ++r) copy_row(from + r * stride, dim, rows + r * size, size);
  std::fill(rows + used * size, rows + kRows * size, S(0));
  transpose(rows, kRows, size, factor, columns);
}

// The way back, by way of rows[kRows][size].
template <typename S, typename T>
void scatter(const S* columns, int used, int dim, int size, S factor, S* rows, T* to,
             int64_t stride) {
  using V = typename VecOf<S>::type;
  transpose(columns, size, kRows, factor, rows);
  for (int r = 0; r < used; ++r)
    for (int d = 0; d < dim; d += V::kWidth)
      store_partial(to + r * stride + d, load(rows + r * size + d), dim - d);
}

// Keys and values in the kernel's own precision, each head's rows one after another, those of the
// prefix first.
template <typename S>
struct Packed {
  S* keys;
  S* values;
  int64_t head_size;
};

// Where row `row` of keys and values, the prefix's rows first, lies.
struct Place {
  const HeadsView& key;
  const HeadsView& value;
  int64_t row;
};

Place place(int64_t prefix_rows, int64_t row, const HeadsView& prefix_key,
            const HeadsView& prefix_value, const HeadsView& key, const HeadsView& value) {
  if (row < prefix_rows) return {prefix_key, prefix_value, row};
  return {key, value, row - prefix_rows};
}

template <typename S, typename T>
Packed<S> pack(const GroupAttentionInput& in, int num_threads) {
  const int size = static_cast<int>(padded_dim(in.dim)), dim = static_cast<int>(in.dim);
  const int64_t rows = in.prefix_rows + in.rows;
  const Packed<S> out{static_cast<S*>(in.scratch),
                      static_cast<S*>(in.scratch) + in.kv_heads * rows * size, rows * size};
  constexpr int64_t kGrain = 256;
  parallel_for(in.kv_heads * rows, kGrain, num_threads, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t head = i / rows;
      const auto [key, value, row] =
          place(in.prefix_rows, i % rows, in.prefix_key, in.prefix_value, in.key, in.value);
      copy_row(key.at<T>(row, head), dim, out.keys + i * size, size);
      copy_row(value.at<T>(row, head), dim, out.values + i * size, size);
    }
  });
  return out;
}

// One tile's part of the running softmax. Updates the lanes' largest score and the sum of
// 2^(score - largest), gives what earlier sums are to be multiplied with, and makes the scores
// those powers.
template <typename S>
void online_softmax(S* scores, int n, S* largest, S* sum, S* rescale) {
  using V = typename VecOf<S>::type;
  constexpr int w = V::kWidth;
  if (n % 2 != 0) {
    std::fill(scores + n * kRows, scores + (n + 1) * kRows, -std::numeric_limits<S>::infinity());
    ++n;
  }
  for (int lane = 0; lane < kRows; lane += 2 * w) {
    V before[2] = {load(largest + lane), load(largest + lane + w)};
    V top[2] = {before[0], before[1]};
    S* const x = scores + lane;
    for (int j = 0; j < n; ++j)
      for (int k = 0; k < 2; ++k) top[k] = max(load(x + j * kRows + k * w), top[k]);
    const V change[4] = {sub(before[0], top[0]), sub(before[1], top[1]), splat(S(0)), splat(S(0))};
    V factor[4];
    exp2_of(change, factor);
    V total[2];
    for (int k = 0; k < 2; ++k) {
      store(largest + lane + k * w, top[k]);
      store(rescale + lane + k * w, factor[k]);
      total[k] = mul(load(sum + lane + k * w), factor[k]);
    }
    for (int j = 0; j < n; j += 2) {
      V y[4], e[4];
      for (int i = 0; i < 4; ++i) y[i] = sub(load(x + (j + i / 2) * kRows + i % 2 * w), top[i % 2]);
      exp2_of(y, e);
      for (int i = 0; i < 4; ++i) {
        store(x + (j + i / 2) * kRows + i % 2 * w, e[i]);
        total[i % 2] = add(total[i % 2], e[i]);
      }
    }
    for (int k = 0; k < 2; ++k) store(sum + lane + k * w, total[k]);
  }
}

template <typename S>
void scale_columns(S* columns, int dim, const S* factor) {
  using V = typename VecOf<S>::type;
  for (int lane = 0; lane < kRows; lane += V::kWidth) {
    const V by = load(factor + lane);
    for (int d = 0; d < dim; ++d)
      store(columns + d * kRows + lane, mul(load(columns + d * kRows + lane), by));
  }
}

template <typename S, typename T>
void forward_block(const GroupAttentionForward& a, const Packed<S>& packed, int64_t head,
                   const Block& block) {
  const GroupAttentionInput& in = a.in;
  const int dim = static_cast<int>(in.dim), size = static_cast<int>(padded_dim(dim));
  const int64_t kv_offset = head / (in.heads / in.kv_heads) * packed.head_size;
  const S *const keys = packed.keys + kv_offset, *const values = packed.values + kv_offset;
  alignas(64) S rows[kRows * kMaxDim], query[kRows * kMaxDim], out[kRows * kMaxDim];
  alignas(64) S scores[kKeys * kRows], largest[kRows], sum[kRows], rescale[kRows];
  gather(in.query.at<T>(block.row, head), in.query.row, block.used, dim, size,
         static_cast<S>(in.scale * kLog2E), rows, query);
  std::fill(out, out + size * kRows, S(0));
  std::fill(sum, sum + kRows, S(0));
  // Finite, so that a lane which has not seen a key yet subtracts it from -inf.
  std::fill(largest, largest + kRows, std::numeric_limits<S>::lowest());
  for_keys<S>(block, in.prefix_rows, [&](int64_t key, int n, auto hide) {
    multiply_columns(keys + key * size, n, size, query, size, scores);
    hide(scores);
    online_softmax(scores, n, largest, sum, rescale);
    scale_columns(out, size, rescale);
    add_columns(values + key * size, n, size, scores, size, out);
  });
  S* const lse = static_cast<S*>(a.lse) + head * in.rows + block.row;
  for (int r = 0; r < block.used; ++r) {
    lse[r] = largest[r] * static_cast<S>(kLn2) + std::log(sum[r]);
    sum[r] = S(1) / sum[r];
  }
  scale_columns(out, size, sum);
  scatter(out, block.used, dim, size, S(1), rows, a.out.at<T>(block.row, head), a.out.row);
}

template <typename S, typename T>
void forward(const GroupAttentionForward& args, int num_threads) {
  const Packed<S> packed = pack<S, T>(args.in, num_threads);
  const int64_t blocks = args.in.num_blocks;
  // The last blocks of a prompt see most keys: they come first.
  parallel_for(args.in.heads * blocks, 1, num_threads, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      forward_block<S, T>(args, packed, i / blocks, block_at(args.in, blocks - 1 - i % blocks));
  });
}

template <typename S>
S dot(const S* a, const S* b, int n) {
  using V = typename VecOf<S>::type;
  V sum = splat(S(0));
  for (int i = 0; i < n; i += V::kWidth) sum = fma(load(a + i), load(b + i), sum);
  return reduce_add(sum);
}

// Scores become probabilities, and products of values and the output's gradient become gradients of
// the scores: p (dp - delta).
template <typename S>
void score_gradients(S* scores, S* products, int n, const S* lse, const S* delta) {
  using V = typename VecOf<S>::type;
  constexpr int w = V::kWidth;
  if (n % 2 != 0) {  // nobody reads the results; but what memory holds is not to be computed with
    std::fill(scores + n * kRows, scores + (n + 1) * kRows, -std::numeric_limits<S>::infinity());
    std::fill(products + n * kRows, products + (n + 1) * kRows, S(0));
    ++n;
  }
  for (int lane = 0; lane < kRows; lane += 2 * w) {
    const V shift[2] = {load(lse + lane), load(lse + lane + w)};
    const V mean[2] = {load(delta + lane), load(delta + lane + w)};
    for (int j = 0; j < n; j += 2) {
      S* const x = scores + j * kRows + lane;
      S* const y = products + j * kRows + lane;
      V from[4], p[4];
      for (int i = 0; i < 4; ++i) from[i] = sub(load(x + i / 2 * kRows + i % 2 * w), shift[i % 2]);
      // No probability is above 1, whatever rounding large scores makes of it.
      for (int i = 0; i < 4; ++i) from[i] = min(splat(S(0)), from[i]);
      exp2_of(from, p);
      for (int i = 0; i < 4; ++i) {
        const int at = i / 2 * kRows + i % 2 * w;
        store(x + at, p[i]);
        store(y + at, mul(p[i], sub(load(y + at), mean[i % 2])));
      }
    }
  }
}

template <typename S, typename T>
void backward_block(const GroupAttentionBackward& a, const Packed<S>& packed, int64_t head,
                    const Block& block, S* grad_keys, S* grad_values) {
  const GroupAttentionInput& in = a.in;
  const int dim = static_cast<int>(in.dim), size = static_cast<int>(padded_dim(dim));
  const int64_t kv_offset = head / (in.heads / in.kv_heads) * packed.head_size;
  const S *const keys = packed.keys + kv_offset, *const values = packed.values + kv_offset;
  alignas(64) S query[kRows * kMaxDim], query_columns[kRows * kMaxDim];
  alignas(64) S grad[kRows * kMaxDim], grad_columns[kRows * kMaxDim];
  alignas(64) S grad_query[kRows * kMaxDim], row[kMaxDim];
  alignas(64) S scores[kKeys * kRows], products[kKeys * kRows];
  alignas(64) S lse[kRows], delta[kRows];
  const S scale = static_cast<S>(in.scale);
  gather(in.query.at<T>(block.row, head), in.query.row, block.used, dim, size,
         static_cast<S>(in.scale * kLog2E), query, query_columns);
  gather(a.grad.at<T>(block.row, head), a.grad.row, block.used, dim, size, S(1), grad,
         grad_columns);
  const S* const given = static_cast<const S*>(a.lse) + head * in.rows + block.row;
  for (int r = 0; r < kRows; ++r) {
    lse[r] =
        r < block.used ? given[r] * static_cast<S>(kLog2E) : std::numeric_limits<S>::infinity();
    delta[r] = 0;
    if (r >= block.used) continue;
    copy_row(a.out.at<T>(block.row + r, head), dim, row, size);
    delta[r] = dot(row, grad + r * size, size);
  }
  // The gradient of a key is the scaled query, times that of the score.
  for (int i = 0; i < block.used * size; ++i) query[i] *= scale;
  std::fill(grad_query, grad_query + size * kRows, S(0));
  for_keys<S>(block, in.prefix_rows, [&](int64_t key, int n, auto hide) {
    multiply_columns(keys + key * size, n, size, query_columns, size, scores);
    hide(scores);
    multiply_columns(values + key * size, n, size, grad_columns, size, products);
    score_gradients(scores, products, n, lse, delta);
    add_columns(keys + key * size, n, size, products, size, grad_query);
    add_rows(scores, n, grad, block.used, size, grad_values + key * size);
    add_rows(products, n, query, block.used, size, grad_keys + key * size);
  });
  // The query's memory is free now.
  scatter(grad_query, block.used, dim, size, scale, query, a.grad_query.at<T>(block.row, head),
          a.grad_query.row);
}

template <typename S, typename T>
void backward(const GroupAttentionBackward& args, int num_threads) {
  const GroupAttentionInput& in = args.in;
  const Packed<S> packed = pack<S, T>(in, num_threads);
  const int64_t blocks = in.num_blocks, share = in.heads / in.kv_heads;
  const int dim = static_cast<int>(in.dim), size = static_cast<int>(padded_dim(dim));
  // Behind the packed ones: keys' and values' gradients of each task.
  S* const sums = packed.values + in.kv_heads * packed.head_size;
  parallel_for(in.kv_heads * args.tasks, 1, num_threads, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      S* const grad_keys = sums + 2 * i * packed.head_size;
      S* const grad_values = grad_keys + packed.head_size;
      std::fill(grad_keys, grad_keys + 2 * packed.head_size, S(0));
      // Every `tasks`-th block, so that all tasks have long ones and short ones.
      for (int64_t index = i % args.tasks; index < blocks; index += args.tasks) {
        const Block block = block_at(in, index);
        for (int64_t k = 0; k < share; ++k)
          backward_block<S, T>(args, packed, i / args.tasks * share + k, block, grad_keys,
                               grad_values);
      }
    }
  });
  constexpr int64_t kGrain = 256;
  const int64_t rows = in.prefix_rows + in.rows;
  parallel_for(in.kv_heads * rows, kGrain, num_threads, [&](int64_t begin, int64_t end) {
    using V = typename VecOf<S>::type;
    for (int64_t i = begin; i < end; ++i) {
      const int64_t head = i / rows;
      const S* const first = sums + 2 * head * args.tasks * packed.head_size + i % rows * size;
      const auto [key, value, row] = place(in.prefix_rows, i % rows, args.grad_prefix_key,
                                           args.grad_prefix_value, args.grad_key, args.grad_value);
      for (int which = 0; which < 2; ++which) {
        T* const to = (which == 0 ? key : value).template at<T>(row, head);
        for (int d = 0; d < dim; d += V::kWidth) {
          const S* const from = first + which * packed.head_size + d;
          V total = load(from);
          for (int64_t task = 1; task < args.tasks; ++task)
            total = add(total, load(from + 2 * task * packed.head_size));
          store_partial(to + d, total, dim - d);
        }
      }
    }
  });
}

template <typename Args>
using Launcher = void (*)(const Args&, int);

template <typename Args>
void dispatch(const Args& args, Launcher<Args> f64, Launcher<Args> f32, Launcher<Args> bf16,
              Launcher<Args> f16, int num_threads) {
  const DType dtype = args.in.dtype;
  const auto fn = dtype == DType::kFloat64    ? f64
                  : dtype == DType::kFloat32  ? f32
                  : dtype == DType::kBFloat16 ? bf16
                                              : f16;
  fn(args, num_threads);
}

}  // namespace

void group_attention(const GroupAttentionForward& args, int num_threads) {
  dispatch(args, forward<double, double>, forward<float, float>, forward<float, BFloat16>,
           forward<float, Float16>, num_threads);
}

void group_attention_backward(const GroupAttentionBackward& args, int num_threads) {
  dispatch(args, backward<double, double>, backward<float, float>, backward<float, BFloat16>,
           backward<float, Float16>, num_threads);
}

}  // namespace vcr1::cpu::VCR1_ISA

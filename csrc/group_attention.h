// Arguments of the kernels for attention within packs; launchers are in kernels.h.
#pragma once

#include <cstdint>

#include "dtype.h"

namespace vcr1 {

// Elements of (rows, heads, dim), the last dimension dense; strides in elements.
struct HeadsView {
  void* data;
  int64_t row, head;

  template <typename T>
  T* at(int64_t i, int64_t j) const {
    return static_cast<T*>(data) + i * row + j * head;
  }
};

// Queries [row, end) see keys [prefix, prefix_end) and, each of them, keys row to its own. The
// prefix is of the same rows, or, where there are prefix rows, of those.
struct GroupAttentionPart {
  int64_t row, end, prefix, prefix_end;
};

// Queries [row, row + used), at most kGroupAttentionRows of one or more parts that share a prefix,
// of which `part` is the one the first of them is in.
struct GroupAttentionBlock {
  int64_t row, used, part;
};

constexpr int kGroupAttentionRows = 32;
constexpr int kGroupAttentionMaxDim = 256;

// What the kernel's own copies of keys and values have for `dim` numbers: whole vectors.
constexpr int64_t padded_dim(int64_t dim) { return (dim + 15) / 16 * 16; }
// Numbers of scratch memory, fp64 for fp64 inputs, else fp32: keys and values, and in the backward
// pass (tasks > 0) their gradients for each task. `rows`: those of the prefix included.
constexpr int64_t group_attention_scratch(int64_t rows, int64_t kv_heads, int64_t dim,
                                          int64_t tasks) {
  return 2 * kv_heads * rows * padded_dim(dim) * (1 + tasks);
}

// What forward and backward share. Queries that are in no part are neither read nor written.
struct GroupAttentionInput {
  DType dtype;  // fp64, fp32, bf16 or fp16
  HeadsView query, key, value;
  HeadsView prefix_key, prefix_value;  // unused without prefix rows
  int64_t rows, prefix_rows, heads, kv_heads, dim;
  const GroupAttentionPart* parts;  // rising rows
  const GroupAttentionBlock* blocks;
  int64_t num_blocks;
  double scale;
  void* scratch;  // see group_attention_scratch()
};

struct GroupAttentionForward {
  GroupAttentionInput in;
  HeadsView out;
  void* lse;  // (heads, rows), fp64 or fp32
};

struct GroupAttentionBackward {
  GroupAttentionInput in;
  HeadsView out, grad;  // of the forward pass, and its gradient
  const void* lse;
  HeadsView grad_query, grad_key, grad_value;
  HeadsView grad_prefix_key, grad_prefix_value;
  int64_t tasks;  // for each key head
};

}  // namespace vcr1

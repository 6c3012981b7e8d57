// What the kernels of shared-prefix training attention work on, beside what attention.h has.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "cpu/attention.h"

namespace thinktwice {

// A tensor [tokens, heads, dim] whose last dimension is contiguous.
struct Heads {
  const void* data;
  int64_t token_stride, head_stride;
};

// A segment of the row and the prefix that it continues. Positions count from the prefix's first token.
struct Sequence {
  int64_t prefix_start, prefix_length;  // length 0 = no prefix
  int64_t start, length;

  int64_t end() const { return prefix_length + length; }
  int64_t token(int64_t position) const {
    return position < prefix_length ? prefix_start + position : start + position - prefix_length;
  }
};

// `tokens` successive queries of a segment under one KV head.
struct SegmentTile {
  Sequence sequence;
  int64_t first;  // counted from the segment's start
  int64_t tokens;
  int64_t kv_head;
};

// Of an Attention here the caches and the block size are not used.
struct PrefixForward {
  Attention attention;
  Heads k, v;
  float* lse;  // [tokens][heads], log of a query's sum of weights
};

struct PrefixBackward {
  Attention attention;  // its `out` is dq, contiguous
  Heads k, v, result, gradient;
  const float* lse;  // [tokens][heads]
  void *dk, *dv;     // [tokens][kv_heads][dim]
};

// One thread's buffers of the backward pass.
struct BackwardWorkspace {
  // Rows of q, weights in `scores`, the transposed keys in `keys`, the keys in `value_rows`, dq in `out`.
  Workspace weights;
  // Rows of the gradient in `q`, gradients of the weights in `scores`, the transposed values in `keys`.
  Workspace gradients;
  float *lse, *delta;  // [rows]; delta is the product of result and gradient
};

inline BackwardWorkspace backward_workspace(int64_t rows, int64_t dim) {
  thread_local std::vector<float> floats;
  BackwardWorkspace work{thread_workspace(rows, dim), {}, nullptr, nullptr};
  work.gradients = work.weights;
  const int64_t stride = work.weights.row_stride;
  const int64_t needed = rows * (stride + kChunk + 2) + stride * kChunk + kAlignment;
  if (static_cast<int64_t>(floats.size()) < needed) floats.resize(needed);
  void* start = floats.data();
  size_t space = floats.size() * sizeof(float);
  work.gradients.q = static_cast<float*>(std::align(kAlignment * sizeof(float), sizeof(float), start, space));
  work.gradients.keys = work.gradients.q + rows * stride;
  work.gradients.scores = work.gradients.keys + stride * kChunk;
  work.lse = work.gradients.scores + rows * kChunk;
  work.delta = work.lse + rows;
  return work;
}

// The same buffers without the first `rows` rows.
inline BackwardWorkspace rows_from(BackwardWorkspace work, int64_t rows) {
  work.weights = rows_from(work.weights, rows);
  work.gradients = rows_from(work.gradients, rows);
  work.lse += rows;
  work.delta += rows;
  return work;
}

}  // namespace thinktwice

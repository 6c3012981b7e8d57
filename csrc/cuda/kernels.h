// What the CUDA kernels work on and how they are launched; knows nothing about torch. Pointers are to device
// memory, sizes and strides count elements. A launch returns the first error of those it is made of.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "advance.h"
#include "sample_status.h"

#if defined(__CUDACC__)
#define SLICE_INLINE __host__ __device__ __forceinline__
#else
#define SLICE_INLINE inline
#endif

namespace thinktwice::gpu {

enum class Type { kFloat, kBFloat16, kHalf };

struct CacheWrite {
  const void *k, *v;
  void *k_cache, *v_cache;
  const int64_t* slots;
  int64_t tokens, k_token_stride, k_head_stride, v_token_stride, v_head_stride;
  int64_t blocks, heads, block_size, dim, element_size;
};
cudaError_t launch_write_kv(const CacheWrite& work, cudaStream_t stream);

// Heads of a multiple of 8 elements, up to 256.
struct Rotary {
  void* q;
  const void *k, *v;
  const void *q_norm, *k_norm;  // of T, [dim] or over all heads; null = none
  void *k_cache, *v_cache;
  const float *cos, *sin;  // [table_rows, dim]; null = no rotation
  const int64_t *positions, *slots;
  int64_t tokens, table_rows, blocks, block_size;
  int64_t q_token_stride, q_head_stride, k_token_stride, k_head_stride, v_token_stride, v_head_stride;
  int heads, kv_heads, dim;
  int q_norm_is_whole, k_norm_is_whole;  // one mean over all heads
  float eps;
};
cudaError_t launch_rotary_write_kv(const Rotary& work, Type type, cudaStream_t stream);

struct BlockCopy {
  void *k_cache, *v_cache;
  const int64_t* pairs;
  int64_t num_pairs, layers, blocks, block_bytes;
};
cudaError_t launch_copy_blocks(const BlockCopy& work, cudaStream_t stream);

constexpr int kChunk = 64;   // keys per step of the online softmax; chunks start at its multiples
constexpr int kSplit = 256;  // keys per part of a row's softmax; the parts are merged in their order

// A part of the attention's work: for each KV head, some rows of an item or of a group, and a split of keys.
struct Part {
  int32_t run;  // an item, or -1 - a group
  int32_t first_row, rows, split;
};

// Rows of the largest tile that parts are computed in.
constexpr int part_rows(Type type, int dim) { return type == Type::kFloat ? 8 : dim > 128 ? 32 : 64; }

struct Attention {
  const void *q, *k_cache, *v_cache;
  void* out;
  const int32_t *block_tables, *context_lens;
  const int32_t* starts;                         // of each sequence's queries in q; null = one query each
  const int32_t *group_offsets, *shared_blocks;  // null = no groups
  float* part_sums;                              // [items, heads, splits, dim], weighted sums of values
  float2* part_states;                           // [items, heads, splits], maximum and sum of weights
  int64_t q_token_stride, q_head_stride;
  int tokens, sequences, groups;
  int heads, kv_heads, group, dim;
  int num_blocks, block_size, table_width, splits;
  int window;  // 0 = none
  float scale;
  Part* parts;            // [1 + room for them], largest first; the first one's `run` is their number
  int first_item, items;  // of those that one launch decodes; its parts count from the first
};

// Lists the parts of all items, `a.items` of them. They depend on lengths and groups, not on the layer. An
// item is a token of q, or with `single_queries` a sequence, which is left out unless it has exactly one
// query.
int64_t most_parts(const Attention& a, Type type);
cudaError_t launch_list_parts(const Attention& a, Type type, bool single_queries, cudaStream_t stream);

// One query per item, its keys split over the multiprocessors; the splits that a group shares are read once
// for its members.
cudaError_t launch_decode(const Attention& a, Type type, bool single_queries, cudaStream_t stream);

// The sequences with more than one query; not for float32.
cudaError_t launch_prefill(const Attention& a, Type type, cudaStream_t stream);

// A row of logits is cut into slices, as many as its length alone says: a row's bits depend on no other.
constexpr int64_t kLeastSlice = 4096;
constexpr int kMostSlices = 8;
SLICE_INLINE int slices_of(int64_t vocabulary) {
  return vocabulary < 2 * kLeastSlice             ? 1
         : vocabulary > kMostSlices * kLeastSlice ? kMostSlices
                                                  : static_cast<int>(vocabulary / kLeastSlice);
}

struct SliceTotals {
  double total, moment;  // sums of weight and of weight * (scaled - max), over all tokens
  double mass;           // sum of the weights that may be drawn
  float score;           // the highest of the race, and whose it is
  uint32_t token;
};

struct Sampling {
  const void* logits;
  int64_t rows, vocabulary, stride;
  const float *temperature, *top_p, *min_p;
  const int32_t* top_k;
  const int64_t *sample_ids, *positions;
  const int64_t* seed;                   // one: a captured launch has it read anew each time
  int64_t* tokens;                       // -1 where the status is not kOk,
  float *logps, *raw_logps, *entropies;  // NaN
  int32_t* statuses;
  float* maxima;        // workspace [rows, slices]; NaN where a slice holds one,
  SliceTotals* totals;  // [rows, slices],
  uint64_t* lowest;     // [rows], the lowest rank key that top-k and top-p keep
};
cudaError_t launch_sample(const Sampling& work, Type type, cudaStream_t stream);

cudaError_t launch_advance(const Advance& work, cudaStream_t stream);

}  // namespace thinktwice::gpu

// Which rows of queries and which keys a thread block works on. A row is one query head of one token; rows of
// successive tokens and one KV head stand one after the other and share their reading of the keys.
#pragma once

#undef NDEBUG  // a block outside the cache stops the kernel in every build
#include <cassert>

#include "cuda/kernels.h"

namespace thinktwice::gpu {

constexpr int kThreads = 128;
constexpr int kWarps = kThreads / 32;

// Some of the rows of a run of tokens that start with the same blocks.
struct RowTile {
  int first_token, first_item;  // of the run
  int first_row, rows;          // of the run's rows, those in this tile
  int kv_head;
  int first_position;           // of the run's first token; the others' follow it,
  const int32_t* context_lens;  // unless this is given: then each ends a sequence of this length
  const int32_t* blocks;

  __device__ int position(const Attention& a, int row) const {
    const int step = (first_row + row) / a.group;
    return context_lens ? context_lens[step] - 1 : first_position + step;
  }
};

// A part of the keys.
struct KeyRange {
  int first, end;
};

__device__ inline int first_key(const Attention& a, int position) {
  return a.window > 0 ? max(0, position - a.window + 1) : 0;
}

__device__ inline KeyRange split_range(int split, int first, int end) {
  return {max(split * kSplit, first), min(split * kSplit + kSplit, end)};
}

// The number of i < n with key(i) <= x, for keys that do not fall; called by whole warps.
template <typename Key>
__device__ int count_not_above(int n, int x, const Key& key) {
  int count = 0;
  for (int base = 0; base < n; base += 32) {
    const int i = base + static_cast<int>(threadIdx.x % 32);
    count += __popc(__ballot_sync(0xffffffffu, i < n && key(i) <= x));
  }
  return count;
}

__device__ inline int interval_of(const int32_t* offsets, int n, int x) {
  return count_not_above(n, x, [offsets](int i) { return offsets[i]; }) - 1;
}

// Finds tile `index` among the tiles of n runs of tokens, and returns its run; -1 where there is none. Run i
// owns the tiles from offsets[i] * group / tile_rows + i on, which leaves room for all of its own.
__device__ inline int find_tile(const int32_t* offsets, int n, int group, int tile_rows, int index,
                                RowTile& tile) {
  const int run = count_not_above(n, index, [=](int i) { return offsets[i] * group / tile_rows + i; }) - 1;
  tile.first_token = offsets[run];
  tile.first_row = (index - offsets[run] * group / tile_rows - run) * tile_rows;
  tile.rows = min(tile_rows, (offsets[run + 1] - offsets[run]) * group - tile.first_row);
  return tile.rows > 0 ? run : -1;
}

// Leaves a tile the rows of the items that this launch takes; false if these are none.
__device__ inline bool keep_items(const Attention& a, RowTile& tile) {
  const int first = max(tile.first_row, (a.first_item - tile.first_item) * a.group);
  const int end = min(tile.first_row + tile.rows, (a.first_item + a.items - tile.first_item) * a.group);
  tile.first_row = first;
  tile.rows = end - first;
  return tile.rows > 0;
}

__host__ __device__ inline int most_tiles(int tokens, int runs, int group, int tile_rows) {
  return tokens * group / tile_rows + runs;
}

// Where the one query of an item stands.
struct Query {
  int token, sequence, position;
};

__device__ inline bool find_query(const Attention& a, bool single_queries, int item, Query& query) {
  if (!a.starts) {
    query = {item, item, a.context_lens[item] - 1};
    return true;
  }
  int sequence = item;
  const bool plain = item < a.sequences && a.starts[item] == item && a.starts[item + 1] == item + 1;
  if (!plain && !single_queries) sequence = interval_of(a.starts, a.sequences, item);
  const int start = a.starts[sequence], end = a.starts[sequence + 1];
  if (single_queries && end - start != 1) return false;
  const int token = single_queries ? start : item;
  query = {token, sequence, a.context_lens[sequence] - (end - token)};
  return true;
}

__device__ inline int shared_splits(const Attention& a, int group) {
  return a.shared_blocks[group] * a.block_size / kSplit;
}

// Offsets in the cache of the kSplit keys from `begin` on; -1 for those outside `keys`.
__device__ inline void find_keys(const Attention& a, const RowTile& tile, int begin, KeyRange keys,
                                 int64_t* offsets) {
  for (int i = threadIdx.x; i < kSplit; i += kThreads) {
    const int position = begin + i;
    int64_t offset = -1;
    if (position >= keys.first && position < keys.end) {
      const int block = tile.blocks[position / a.block_size];
      assert(block >= 0 && block < a.num_blocks);
      offset =
          ((int64_t{block} * a.kv_heads + tile.kv_head) * a.block_size + position % a.block_size) * a.dim;
    }
    offsets[i] = offset;
  }
}

// Raw product to score, in powers of two.
__device__ inline float to_score(const Attention& a, float product) {
  constexpr float kLog2E = 1.44269504088896341f;
  return __fmul_rn(__fmul_rn(product, a.scale), kLog2E);
}

__device__ inline int64_t part_index(const Attention& a, const RowTile& tile, int row, int split) {
  const int run_row = tile.first_row + row, head = tile.kv_head * a.group + run_row % a.group;
  const int64_t item = tile.first_item + run_row / a.group - a.first_item;
  return (item * a.heads + head) * a.splits + split;
}

}  // namespace thinktwice::gpu

// Attention of a tile of rows in bfloat16 or float16 on the tensor cores, summed in float32.
//
// The warps share the columns: each multiplies all rows with a quarter of the chunk's keys, and then all
// weights with a quarter of the values' elements. What is computed for a row, and in which order, does not
// depend on how many rows share the tile nor on how many of them are in use.
#pragma once

#include "cuda/merge.h"
#include "cuda/mma.cuh"
#include "cuda/part_feed.cuh"
#include "cuda/rows.cuh"
#include "cuda/tile_memory.cuh"

namespace thinktwice::gpu {

// BlockMemory: a TileMemory. kRowTiles: tiles of 16 rows.
template <typename BlockMemory, int kRowTiles>
struct TensorTile {
  using Memory = BlockMemory;
  using T = typename Memory::Number;
  static constexpr int kRows = 16 * kRowTiles;
  static constexpr int kMaxColumns = Memory::kDim;
  static constexpr int kColumnTiles = Memory::kDim / (8 * kWarps);  // tiles of 8 elements of a warp
  static constexpr int kKeyTiles = kChunk / (8 * kWarps);           // tiles of 8 keys of a warp
  static constexpr int kSteps = kRowTiles < 4 ? 8 : 2;  // of a product at a time: registers hold no more
  static_assert(kKeyTiles == 2 && kColumnTiles % 2 == 0, "loaded two at a time");
  static_assert(kRows <= Memory::kRows, "more rows than the memory has");

  Memory& memory;
  const int lane, warp;
  float sums[kRowTiles][kColumnTiles][4];
  float totals[kRowTiles][4];  // sums of weights; all columns are alike
  float best[kRowTiles][2];    // of the rows lane / 4 and lane / 4 + 8

  __device__ explicit TensorTile(Memory& block_memory)
      : memory(block_memory),
        lane(static_cast<int>(threadIdx.x) % 32),
        warp(static_cast<int>(threadIdx.x) / 32) {}

  // Sums over the keys of the feed's current part for its rows, whose queries are in the memory or will be
  // visible from the next barrier on. Calls queries_read() when they are not needed any more, with values yet
  // to be added up: time for what comes next to arrive.
  template <typename Feed, typename Body>
  __device__ void attend(const Attention& a, Feed& feed, const Body& queries_read) {
    constexpr int kOthers = 2 * Memory::kAhead - 1;  // groups of copies younger than the one that is needed
    clear();
    const KeyRange keys = feed.current().keys;
    for (int start = keys.first / kChunk * kChunk; start < keys.end; start += kChunk) {
      float scores[kRowTiles][kKeyTiles][4];
      wait_for_all_but<kOthers>();  // the keys
      __syncthreads();
      multiply_keys(memory.keys[feed.place], scores);
      find_best(a, start, scores);
      __syncthreads();
      feed.copy_keys();
      if (start + kChunk >= keys.end) queries_read();
      weigh(scores);
      wait_for_all_but<kOthers>();  // the values
      __syncthreads();
      add_values(memory.values[feed.place]);
      __syncthreads();
      feed.copy_values();
    }
  }

  // Calls body(row tile, half, row): a lane has two rows per row tile, lane / 4 and 8 below.
  template <typename Body>
  __device__ void for_rows(const Body& body) const {
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m)
#pragma unroll
      for (int half = 0; half < 2; ++half) body(m, half, 16 * m + 8 * half + lane / 4);
  }

  // The first of the two successive elements of the head that entry 0 or 2 of a column tile belongs to.
  __device__ int column(int column_tile) const {
    return (warp * kColumnTiles + column_tile) * 8 + lane % 4 * 2;
  }

  __device__ void store_part(const Attention& a, const RowTile& tile, int split) const {
    for_rows([&](int m, int half, int row) {
      if (row >= tile.rows) return;
      const int64_t part = part_index(a, tile, row, split);
#pragma unroll
      for (int c = 0; c < kColumnTiles; ++c)
        if (column(c) < a.dim)
          *reinterpret_cast<float2*>(a.part_sums + part * a.dim + column(c)) =
              make_float2(sums[m][c][2 * half], sums[m][c][2 * half + 1]);
      if (warp == 0 && lane % 4 == 0) a.part_states[part] = make_float2(best[m][half], totals[m][2 * half]);
    });
  }

 private:
  __device__ void clear() {
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m) {
      best[m][0] = best[m][1] = -INFINITY;
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        totals[m][e] = 0.0f;
#pragma unroll
        for (int c = 0; c < kColumnTiles; ++c) sums[m][c][e] = 0.0f;
      }
    }
  }

  __device__ void multiply_keys(const typename Memory::Chunk& keys,
                                float (&scores)[kRowTiles][kKeyTiles][4]) const {
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m)
#pragma unroll
      for (int n = 0; n < kKeyTiles; ++n)
#pragma unroll
        for (int e = 0; e < 4; ++e) scores[m][n][e] = 0.0f;
    const T* const key = &keys[warp * 16 + lane / 16 * 8 + lane % 8][lane / 8 % 2 * 8];
    const T* const q = &memory.q[lane % 16][lane / 16 * 8];
#pragma unroll kSteps
    for (int d = 0; d < Memory::kDim; d += 16) {
      uint32_t k_part[4];
      load_matrices(k_part, key + d);
#pragma unroll
      for (int m = 0; m < kRowTiles; ++m) {
        uint32_t q_part[4];
        load_matrices(q_part, q + 16 * m * Memory::kPitch + d);
        multiply_add<T>(scores[m][0], q_part, k_part[0], k_part[1]);
        multiply_add<T>(scores[m][1], q_part, k_part[2], k_part[3]);
      }
    }
  }

  // Scores of the visible keys, -inf of the others, and the warp's maximum of each row.
  __device__ void find_best(const Attention& a, int start, float (&scores)[kRowTiles][kKeyTiles][4]) {
    for_rows([&](int m, int half, int row) {
      const int position = memory.positions[row], low = first_key(a, position);
      float highest = -INFINITY;
#pragma unroll
      for (int n = 0; n < kKeyTiles; ++n)
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const int key = start + warp * 16 + n * 8 + lane % 4 * 2 + e;
          float& score = scores[m][n][2 * half + e];
          score = key >= low && key <= position ? to_score(a, score) : -INFINITY;
          highest = fmaxf(highest, score);
        }
      highest = fmaxf(highest, __shfl_xor_sync(0xffffffffu, highest, 1));
      highest = fmaxf(highest, __shfl_xor_sync(0xffffffffu, highest, 2));
      if (lane % 4 == 0) memory.best[warp][row] = highest;
    });
  }

  // Turns scores into weights relative to the row's new maximum, and what was summed before with them.
  __device__ void weigh(const float (&scores)[kRowTiles][kKeyTiles][4]) {
    for_rows([&](int m, int half, int row) {
      float now = best[m][half];
#pragma unroll
      for (int w = 0; w < kWarps; ++w) now = fmaxf(now, memory.best[w][row]);
      const float base = finite_base(now), decay = exp2f(__fsub_rn(best[m][half], base));
      best[m][half] = now;
#pragma unroll
      for (int e = 2 * half; e < 2 * half + 2; ++e) {
        totals[m][e] *= decay;
#pragma unroll
        for (int c = 0; c < kColumnTiles; ++c) sums[m][c][e] *= decay;
      }
#pragma unroll
      for (int n = 0; n < kKeyTiles; ++n) {
        const float low = exp2f(__fsub_rn(scores[m][n][2 * half], base));
        const float high = exp2f(__fsub_rn(scores[m][n][2 * half + 1], base));
        *reinterpret_cast<uint32_t*>(&memory.weights[row][warp * 16 + n * 8 + lane % 4 * 2]) =
            Pair<T>::pack(low, high);
      }
    });
  }

  // The weights are summed by the same instruction as the values: as their product with ones.
  __device__ void add_values(const typename Memory::Chunk& values) {
    const T* const weight = &memory.weights[lane % 16][lane / 16 * 8];
    const T* const value = &values[lane % 16][warp * kColumnTiles * 8 + lane / 16 * 8];
#pragma unroll
    for (int k = 0; k < kChunk; k += 16) {
      uint32_t weights[kRowTiles][4];
#pragma unroll
      for (int m = 0; m < kRowTiles; ++m) {
        load_matrices(weights[m], weight + 16 * m * Memory::kWeightPitch + k);
        multiply_add<T>(totals[m], weights[m], Pair<T>::kOnes, Pair<T>::kOnes);
      }
#pragma unroll
      for (int c = 0; c < kColumnTiles; c += 2) {
        uint32_t v_part[4];
        load_matrices_transposed(v_part, value + k * Memory::kPitch + c * 8);
#pragma unroll
        for (int m = 0; m < kRowTiles; ++m) {
          multiply_add<T>(sums[m][c], weights[m], v_part[0], v_part[1]);
          multiply_add<T>(sums[m][c + 1], weights[m], v_part[2], v_part[3]);
        }
      }
    }
  }
};

}  // namespace thinktwice::gpu

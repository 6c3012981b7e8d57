// Attention of a tile of rows in bfloat16 or float16 on the tensor cores, summed in float32.
//
// The warps share the columns: each multiplies all rows with a quarter of the chunk's keys, and then all
// weights with a quarter of the values' elements. What is computed for a row, and in which order, does not
// depend on how many rows share the tile nor on how many of them are in use.
#pragma once

#include "cuda/merge.h"
#include "cuda/mma.cuh"
#include "cuda/rows.cuh"

namespace thinktwice::gpu {

// kMaxDim: 64, 128 or 256, zeros beyond the head's elements. kRowTiles: tiles of 16 rows. kAhead: chunks of
// keys and values that are copied before they are needed.
template <typename T, int kMaxDim, int kRowTiles, int kAhead>
struct TensorTile {
  static constexpr int kRows = 16 * kRowTiles;
  static constexpr int kMaxColumns = kMaxDim;
  static constexpr int kPitch = kMaxDim + 8;  // spreads the rows over the banks of shared memory
  static constexpr int kWeightPitch = kChunk + 8;
  static constexpr int kColumnTiles = kMaxDim / (8 * kWarps);  // tiles of 8 elements of a warp
  static constexpr int kKeyTiles = kChunk / (8 * kWarps);      // tiles of 8 keys of a warp
  static_assert(kKeyTiles == 2 && kColumnTiles % 2 == 0, "loaded two at a time");

  struct Shared {
    alignas(16) T keys[kAhead][kChunk][kPitch];
    alignas(16) T values[kAhead][kChunk][kPitch];
    alignas(16) T q[kRows][kPitch];
    alignas(16) T weights[kRows][kWeightPitch];
    float best[kWarps][kRows];  // each warp's share of the chunk's maximum
    int positions[kRows];
    int64_t offsets[kSplit];
  };

  Shared& shared;
  const int lane, warp;
  float sums[kRowTiles][kColumnTiles][4];
  float totals[kRowTiles][4];  // sums of weights; all columns are alike
  float best[kRowTiles][2];    // of the rows lane / 4 and lane / 4 + 8

  __device__ explicit TensorTile(void* memory)
      : shared(*static_cast<Shared*>(memory)),
        lane(static_cast<int>(threadIdx.x) % 32),
        warp(static_cast<int>(threadIdx.x) / 32) {}

  // Brings the queries in; once per tile. The next barrier makes them visible.
  __device__ void load_queries(const Attention& a, const RowTile& tile) {
    const auto* const q = static_cast<const T*>(a.q);
    const bool wide =
        (reinterpret_cast<uintptr_t>(q) | (a.q_token_stride | a.q_head_stride) * sizeof(T)) % sizeof(uint4) ==
        0;
    for (int i = threadIdx.x; i < kRows * kMaxDim / 8; i += kThreads) {
      const int row = i / (kMaxDim / 8), d = i % (kMaxDim / 8) * 8, run_row = tile.first_row + row;
      const int64_t token = tile.first_token + run_row / a.group;
      const int64_t head = tile.kv_head * a.group + run_row % a.group;
      const T* const from = q + token * a.q_token_stride + head * a.q_head_stride + d;
      T* const to = &shared.q[row][d];
      if (row >= tile.rows || d >= a.dim)
        *reinterpret_cast<uint4*>(to) = make_uint4(0, 0, 0, 0);
      else if (wide)
        *reinterpret_cast<uint4*>(to) = *reinterpret_cast<const uint4*>(from);
      else
        for (int e = 0; e < 8; ++e) to[e] = from[e];
    }
    for (int row = threadIdx.x; row < kRows; row += kThreads)
      shared.positions[row] = row < tile.rows ? tile.position(a, row) : -1;
  }

  // Adds up one split's keys for the tile's rows. All threads have passed a barrier since the split before.
  __device__ void attend(const Attention& a, const RowTile& tile, KeyRange keys) {
    const int begin = keys.first / kSplit * kSplit;
    int start = keys.first / kChunk * kChunk;
    clear();
    find_keys(a, tile, begin, keys, shared.offsets);
    __syncthreads();
    // Copies are counted, so there is a group to commit even where nothing is left to copy.
    const auto load_chunk = [&](auto& to, const void* cache, int first) {
      if (first < keys.end)
        load(a, to, cache, first - begin);
      else
        commit_copies();
    };
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      load_chunk(shared.keys[i], a.k_cache, start + i * kChunk);
      load_chunk(shared.values[i], a.v_cache, start + i * kChunk);
    }
    for (int place = 0; start < keys.end; start += kChunk, place = (place + 1) % kAhead) {
      float scores[kRowTiles][kKeyTiles][4];
      wait_for_all_but<2 * kAhead -
                       1>();  // the keys; their values and later chunks may still be on their way
      __syncthreads();
      multiply_keys(a, shared.keys[place], scores);
      find_best(a, start, scores);
      __syncthreads();
      load_chunk(shared.keys[place], a.k_cache, start + kAhead * kChunk);
      weigh(scores);
      wait_for_all_but<2 * kAhead - 1>();  // the values
      __syncthreads();
      add_values(shared.values[place]);
      __syncthreads();
      load_chunk(shared.values[place], a.v_cache, start + kAhead * kChunk);
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

  // Starts the copy of a chunk's keys or values, as one group.
  __device__ void load(const Attention& a, T (&to)[kChunk][kPitch], const void* cache, int first) const {
    constexpr int kUnits = kMaxDim / 8;
#pragma unroll
    for (int i = 0; i < kChunk * kUnits / kThreads; ++i) {
      const int unit = static_cast<int>(threadIdx.x) + i * kThreads, key = unit / kUnits,
                d = unit % kUnits * 8;
      const int64_t offset = shared.offsets[first + key];
      const bool used = offset >= 0 && d < a.dim;
      copy_async(&to[key][d], static_cast<const T*>(cache) + (used ? offset + d : 0), used);
    }
    commit_copies();
  }

  __device__ void multiply_keys(const Attention& a, const T (&keys)[kChunk][kPitch],
                                float (&scores)[kRowTiles][kKeyTiles][4]) const {
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m)
#pragma unroll
      for (int n = 0; n < kKeyTiles; ++n)
#pragma unroll
        for (int e = 0; e < 4; ++e) scores[m][n][e] = 0.0f;
    const T* const key = &keys[warp * 16 + lane / 16 * 8 + lane % 8][lane / 8 % 2 * 8];
    const T* const q = &shared.q[lane % 16][lane / 16 * 8];
#pragma unroll
    for (int d = 0; d < kMaxDim; d += 16) {
      if (d >= a.dim) break;
      uint32_t k_part[4];
      load_matrices(k_part, key + d);
#pragma unroll
      for (int m = 0; m < kRowTiles; ++m) {
        uint32_t q_part[4];
        load_matrices(q_part, q + 16 * m * kPitch + d);
        multiply_add<T>(scores[m][0], q_part, k_part[0], k_part[1]);
        multiply_add<T>(scores[m][1], q_part, k_part[2], k_part[3]);
      }
    }
  }

  // Scores of the visible keys, -inf of the others, and the warp's maximum of each row.
  __device__ void find_best(const Attention& a, int start, float (&scores)[kRowTiles][kKeyTiles][4]) {
    for_rows([&](int m, int half, int row) {
      const int position = shared.positions[row], low = first_key(a, position);
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
      if (lane % 4 == 0) shared.best[warp][row] = highest;
    });
  }

  // Turns scores into weights relative to the row's new maximum, and what was summed before with them.
  __device__ void weigh(const float (&scores)[kRowTiles][kKeyTiles][4]) {
    for_rows([&](int m, int half, int row) {
      float now = best[m][half];
#pragma unroll
      for (int w = 0; w < kWarps; ++w) now = fmaxf(now, shared.best[w][row]);
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
        *reinterpret_cast<uint32_t*>(&shared.weights[row][warp * 16 + n * 8 + lane % 4 * 2]) =
            Pair<T>::pack(low, high);
      }
    });
  }

  // The weights are summed by the same instruction as the values: as their product with ones.
  __device__ void add_values(const T (&values)[kChunk][kPitch]) {
    const T* const weight = &shared.weights[lane % 16][lane / 16 * 8];
    const T* const value = &values[lane % 16][warp * kColumnTiles * 8 + lane / 16 * 8];
#pragma unroll
    for (int k = 0; k < kChunk; k += 16) {
      uint32_t weights[kRowTiles][4];
#pragma unroll
      for (int m = 0; m < kRowTiles; ++m) {
        load_matrices(weights[m], weight + 16 * m * kWeightPitch + k);
        multiply_add<T>(totals[m], weights[m], Pair<T>::kOnes, Pair<T>::kOnes);
      }
#pragma unroll
      for (int c = 0; c < kColumnTiles; c += 2) {
        uint32_t v_part[4];
        load_matrices_transposed(v_part, value + k * kPitch + c * 8);
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

// Attention of a few rows in float32, by ordinary multiply-adds.
#pragma once

#include "cuda/merge.h"
#include "cuda/rows.cuh"

namespace thinktwice::gpu {

template <int kMaxDim>
struct PlainTile {
  static constexpr int kRows = 8;
  static constexpr int kPitch = kMaxDim + 4;  // spreads the rows over the banks of shared memory
  static constexpr int kColumns = (kMaxDim + kThreads - 1) / kThreads;

  struct Shared {
    alignas(16) float cached[kChunk][kPitch];  // keys, then values
    alignas(16) float q[kRows][kMaxDim];
    float weights[kRows][kChunk];
    float decay[kRows], best[kRows], total[kRows];
    int positions[kRows];
    int64_t offsets[kSplit];
  };

  Shared& shared;
  float sums[kRows][kColumns];

  __device__ explicit PlainTile(void* memory) : shared(*static_cast<Shared*>(memory)) {}

  // Brings the queries in and clears the sums. The next barrier makes them visible.
  __device__ void load_queries(const Attention& a, const RowTile& tile) {
    const auto* const q = static_cast<const float*>(a.q);
    for (int i = threadIdx.x; i < kRows * kMaxDim; i += kThreads) {
      const int row = i / kMaxDim, d = i % kMaxDim, run_row = tile.first_row + row;
      const int64_t token = tile.first_token + run_row / a.group;
      const int64_t head = tile.kv_head * a.group + run_row % a.group;
      const bool used = row < tile.rows && d < a.dim;
      shared.q[row][d] = used ? q[token * a.q_token_stride + head * a.q_head_stride + d] : 0.0f;
    }
    const int row = threadIdx.x;
    if (row < kRows) {
      shared.best[row] = -INFINITY;
      shared.total[row] = 0.0f;
      shared.positions[row] = row < tile.rows ? tile.position(a, row) : -1;
    }
#pragma unroll
    for (int r = 0; r < kRows; ++r)
#pragma unroll
      for (int c = 0; c < kColumns; ++c) sums[r][c] = 0.0f;
  }

  // Adds up one split's keys for the tile's rows.
  __device__ void attend(const Attention& a, const RowTile& tile, KeyRange keys) {
    const int begin = keys.first / kSplit * kSplit;
    find_keys(a, tile, begin, keys, shared.offsets);
    __syncthreads();
    for (int start = keys.first / kChunk * kChunk; start < keys.end; start += kChunk) {
      load(a, a.k_cache, start - begin);
      __syncthreads();
      multiply_keys(a);
      __syncthreads();
      load(a, a.v_cache, start - begin);
      weigh(a, start);
      __syncthreads();
      add_values(a);
      __syncthreads();
    }
  }

  __device__ void store_part(const Attention& a, const RowTile& tile, int split) const {
#pragma unroll
    for (int row = 0; row < kRows; ++row) {
      if (row >= tile.rows) break;
      const int64_t part = part_index(a, tile, row, split);
#pragma unroll
      for (int c = 0; c < kColumns; ++c) {
        const int d = static_cast<int>(threadIdx.x) + c * kThreads;
        if (d < a.dim) a.part_sums[part * a.dim + d] = sums[row][c];
      }
      if (threadIdx.x == 0) a.part_states[part] = make_float2(shared.best[row], shared.total[row]);
    }
  }

 private:
  __device__ void load(const Attention& a, const void* cache, int first) {
    const int units = a.dim / 4;
    for (int i = threadIdx.x; i < kChunk * units; i += kThreads) {
      const int key = i / units, d = i % units * 4;
      const int64_t offset = shared.offsets[first + key];
      float4 value = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
      if (offset >= 0)
        value = *reinterpret_cast<const float4*>(static_cast<const float*>(cache) + offset + d);
      *reinterpret_cast<float4*>(&shared.cached[key][d]) = value;
    }
  }

  // Two threads per key, with half of the rows each.
  __device__ void multiply_keys(const Attention& a) {
    constexpr int kHalf = kRows / 2;
    const int key = threadIdx.x % kChunk, first = static_cast<int>(threadIdx.x) / kChunk * kHalf;
    float products[kHalf] = {};
#pragma unroll 2
    for (int d = 0; d < a.dim; d += 4) {
      const float4 k = *reinterpret_cast<const float4*>(&shared.cached[key][d]);
#pragma unroll
      for (int r = 0; r < kHalf; ++r) {
        const float4 q = *reinterpret_cast<const float4*>(&shared.q[first + r][d]);
        products[r] = fmaf(q.x, k.x, products[r]);
        products[r] = fmaf(q.y, k.y, products[r]);
        products[r] = fmaf(q.z, k.z, products[r]);
        products[r] = fmaf(q.w, k.w, products[r]);
      }
    }
#pragma unroll
    for (int r = 0; r < kHalf; ++r) shared.weights[first + r][key] = products[r];
  }

  // A warp per row: its products become weights relative to its running maximum.
  __device__ void weigh(const Attention& a, int start) {
    const int lane = threadIdx.x % 32;
    for (int row = threadIdx.x / 32; row < kRows; row += kWarps) {
      const int position = shared.positions[row], low = first_key(a, position);
      float scores[2];
      float best = shared.best[row];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int key = start + lane + 32 * i;
        const bool visible = key >= low && key <= position;
        scores[i] = visible ? to_score(a, shared.weights[row][lane + 32 * i]) : -INFINITY;
        best = fmaxf(best, scores[i]);
      }
      for (int step = 16; step > 0; step /= 2) best = fmaxf(best, __shfl_xor_sync(0xffffffffu, best, step));
      const float base = finite_base(best);
      float total = 0.0f;
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const float weight = exp2f(__fsub_rn(scores[i], base));
        shared.weights[row][lane + 32 * i] = weight;
        total += weight;
      }
      for (int step = 16; step > 0; step /= 2) total += __shfl_xor_sync(0xffffffffu, total, step);
      if (lane == 0) {
        const float decay = exp2f(__fsub_rn(shared.best[row], base));
        shared.decay[row] = decay;
        shared.total[row] = fmaf(shared.total[row], decay, total);
        shared.best[row] = best;
      }
      __syncwarp();
    }
  }

  __device__ void add_values(const Attention& a) {
#pragma unroll
    for (int c = 0; c < kColumns; ++c) {
      const int d = static_cast<int>(threadIdx.x) + c * kThreads;
      if (d >= a.dim) break;
#pragma unroll
      for (int r = 0; r < kRows; ++r) sums[r][c] *= shared.decay[r];
#pragma unroll 8
      for (int key = 0; key < kChunk; ++key) {
        const float value = shared.cached[key][d];
#pragma unroll
        for (int r = 0; r < kRows; ++r) sums[r][c] = fmaf(shared.weights[r][key], value, sums[r][c]);
      }
    }
  }
};

}  // namespace thinktwice::gpu

// Shared memory of a block that computes attention on the tensor cores.
#pragma once

#include "cuda/mma.cuh"
#include "cuda/rows.cuh"

namespace thinktwice::gpu {

// kMaxDim: 64, 128 or 256, zeros beyond the head's elements. kMostRows: of a tile, a multiple of 16. kCopied:
// chunks of keys and values that are copied before they are needed.
template <typename T, int kMaxDim, int kMostRows, int kCopied>
struct TileMemory {
  using Number = T;
  static constexpr int kDim = kMaxDim, kRows = kMostRows, kAhead = kCopied;
  static constexpr int kPitch = kMaxDim + 8;  // spreads the rows over the banks of shared memory
  static constexpr int kWeightPitch = kChunk + 8;
  using Chunk = T[kChunk][kPitch];

  alignas(16) Chunk keys[kAhead];
  alignas(16) Chunk values[kAhead];
  alignas(16) T q[kRows][kPitch];
  alignas(16) T weights[kRows][kWeightPitch];
  float best[kWarps][kRows];  // each warp's share of the chunk's maximum
  int positions[kRows];
  // A ring of the parts that are known, and where their keys are: three, and the last one that was worked on.
  static constexpr int kParts = 4;
  KnownPart parts[kParts];
  int64_t offsets[kParts][kSplit];
};

// Starts the copy of a chunk's keys or values.
template <typename Memory>
__device__ void copy_chunk(const Attention& a, typename Memory::Chunk& to, const void* cache,
                           const int64_t* offsets) {
  using T = typename Memory::Number;
  constexpr int kUnits = Memory::kDim / 8;
#pragma unroll
  for (int i = 0; i < kChunk * kUnits / kThreads; ++i) {
    const int unit = static_cast<int>(threadIdx.x) + i * kThreads, key = unit / kUnits, d = unit % kUnits * 8;
    const int64_t offset = offsets[key];
    const bool used = offset >= 0 && d < a.dim;
    copy_async(&to[key][d], static_cast<const T*>(cache) + (used ? offset + d : 0), used);
  }
}

// A tile's queries and positions on their way from global to shared memory, in registers.
template <typename Memory>
class Queries {
 public:
  // Reads the rows' queries; nothing waits for them yet.
  __device__ void load(const Attention& a, const RowTile& tile) {
    const auto* const q = static_cast<const T*>(a.q);
    const bool wide =
        (reinterpret_cast<uintptr_t>(q) | (a.q_token_stride | a.q_head_stride) * sizeof(T)) % sizeof(uint4) ==
        0;
    for_units([&](int row, int d, uint4& unit) {
      unit = make_uint4(0, 0, 0, 0);
      if (row >= tile.rows || d >= a.dim) return;
      const int run_row = tile.first_row + row;
      const int64_t token = tile.first_token + run_row / a.group;
      const int64_t head = tile.kv_head * a.group + run_row % a.group;
      const T* const from = q + token * a.q_token_stride + head * a.q_head_stride + d;
      if (wide) {
        unit = *reinterpret_cast<const uint4*>(from);
      } else {
#pragma unroll
        for (int e = 0; e < 8; ++e) reinterpret_cast<T*>(&unit)[e] = from[e];
      }
    });
    const int row = threadIdx.x;
    position = row < tile.rows ? tile.position(a, row) : -1;
  }

  // The next barrier makes them visible. All threads have passed one since the tile before was read.
  __device__ void store(Memory& memory) {
    for_units(
        [&](int row, int d, const uint4& unit) { *reinterpret_cast<uint4*>(&memory.q[row][d]) = unit; });
    if (threadIdx.x < Memory::kRows) memory.positions[threadIdx.x] = position;
  }

 private:
  using T = typename Memory::Number;
  static constexpr int kRowUnits = Memory::kDim / 8;
  static constexpr int kUnits = Memory::kRows * kRowUnits / kThreads;
  static_assert(Memory::kRows <= kThreads && kUnits * kThreads == Memory::kRows * kRowUnits,
                "evenly shared out");

  uint4 units[kUnits];
  int position;

  template <typename Body>
  __device__ void for_units(const Body& body) {
#pragma unroll
    for (int i = 0; i < kUnits; ++i) {
      const int unit = static_cast<int>(threadIdx.x) + i * kThreads;
      body(unit / kRowUnits, unit % kRowUnits * 8, units[i]);
    }
  }
};

}  // namespace thinktwice::gpu

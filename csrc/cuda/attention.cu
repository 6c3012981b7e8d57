// Attention over the paged cache: decoding, decoding with a shared prefix, and prefill.
//
// A row's keys are cut into splits at multiples of kSplit, each split into chunks at multiples of kChunk. The
// chunks of a split are taken in order with an online softmax, the splits are merged in order. This order is
// the same for every kernel here, so a row's bits depend on its own sequence alone.
#include <type_traits>

#include "cuda/kernels.h"
#include "cuda/launch.cuh"
#include "cuda/merge.h"
#include "cuda/plain_tile.cuh"
#include "cuda/rows.cuh"
#include "cuda/tensor_tile.cuh"

namespace thinktwice::gpu {
namespace {

// One split of one tile's keys, stored as a part for merge_kernel.
template <typename Tile>
__device__ void attend_part(const Attention& a, const RowTile& rows, KeyRange keys, int split, void* memory) {
  Tile tile(memory);
  tile.load_queries(a, rows);
  tile.attend(a, rows, keys);
  tile.store_part(a, rows, split);
}

// Blocks: (item and tile of its rows, KV head, split). Of a group's splits only those that it does not share.
template <typename Tile>
__global__ void __launch_bounds__(kThreads) decode_kernel(Attention a, bool single_queries) {
  extern __shared__ uint4 memory[];
  const int tiles = (a.group + Tile::kRows - 1) / Tile::kRows;
  const int item = a.first_item + static_cast<int>(blockIdx.x) / tiles, split = blockIdx.z;
  Query query;
  if (!find_query(a, single_queries, item, query)) return;
  const int end = query.position + 1;
  const KeyRange keys = split_range(split, first_key(a, query.position), end);
  if (keys.first >= keys.end) return;
  if (a.group_offsets && split < shared_splits(a, interval_of(a.group_offsets, a.groups, query.sequence)))
    return;
  const int first_row = static_cast<int>(blockIdx.x) % tiles * Tile::kRows;
  const RowTile rows{query.token,
                     item,
                     first_row,
                     min(Tile::kRows, a.group - first_row),
                     static_cast<int>(blockIdx.y),
                     query.position,
                     nullptr,
                     a.block_tables + int64_t{query.sequence} * a.table_width};
  attend_part<Tile>(a, rows, keys, split, memory);
}

// Blocks: (tile of a group's rows, KV head, split). Keys that a window hides from a member are masked; only
// decode_kernel skips them.
template <typename Tile>
__global__ void __launch_bounds__(kThreads) shared_prefix_kernel(Attention a) {
  extern __shared__ uint4 memory[];
  RowTile rows;
  const int group = find_tile(a.group_offsets, a.groups, a.group, Tile::kRows, blockIdx.x, rows);
  const int split = blockIdx.z;
  if (group < 0 || split >= shared_splits(a, group)) return;
  rows.first_item = rows.first_token;
  if (!keep_items(a, rows)) return;
  rows.kv_head = blockIdx.y;
  rows.context_lens = a.context_lens + rows.first_token;
  rows.blocks = a.block_tables + int64_t{rows.first_token} * a.table_width;
  attend_part<Tile>(a, rows, {split * kSplit, split * kSplit + kSplit}, split, memory);
}

__device__ inline void store(float* to, float x) { *to = x; }
__device__ inline void store(__nv_bfloat16* to, float x) { *to = __float2bfloat16_rn(x); }
__device__ inline void store(__half* to, float x) { *to = __float2half_rn(x); }

// A warp per item and query head: merges its parts in order.
template <typename T>
__global__ void __launch_bounds__(kThreads) merge_kernel(Attention a, bool single_queries) {
  constexpr int kMaxColumns = 256 / 32;
  const int lane = threadIdx.x % 32;
  const int64_t index = int64_t{blockIdx.x} * kWarps + threadIdx.x / 32;
  if (index >= int64_t{a.items} * a.heads) return;
  const int item = a.first_item + static_cast<int>(index / a.heads), head = static_cast<int>(index % a.heads);
  Query query;
  if (!find_query(a, single_queries, item, query)) return;
  SoftmaxState state;
  float sums[kMaxColumns] = {};
  for (int split = first_key(a, query.position) / kSplit; split * kSplit <= query.position; ++split) {
    const int64_t part = index * a.splits + split;
    const float2 part_state = a.part_states[part];
    const MergeWeights weights = merge_states(state, {part_state.x, part_state.y});
#pragma unroll
    for (int c = 0; c < kMaxColumns; ++c) {
      const int d = lane + 32 * c;
      if (d < a.dim) sums[c] = merge_sums(sums[c], a.part_sums[part * a.dim + d], weights);
    }
  }
  T* const out = static_cast<T*>(a.out) + (int64_t{query.token} * a.heads + head) * a.dim;
#pragma unroll
  for (int c = 0; c < kMaxColumns; ++c) {
    const int d = lane + 32 * c;
    if (d < a.dim) store(out + d, __fdiv_rn(sums[c], state.total));
  }
}

// The sums of a tile's splits so far, merged in order.
template <typename Tile>
struct MergedTile {
  float (*sums)[Tile::kMaxColumns];  // shared memory, [rows][elements]; each entry belongs to one lane
  SoftmaxState states[Tile::kRows / 16][2];

  __device__ void add(const Tile& part) {
    part.for_rows([&](int m, int half, int row) {
      const MergeWeights weights =
          merge_states(states[m][half], {part.best[m][half], part.totals[m][2 * half]});
#pragma unroll
      for (int c = 0; c < Tile::kColumnTiles; ++c)
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          float& sum = sums[row][part.column(c) + e];
          sum = merge_sums(sum, part.sums[m][c][2 * half + e], weights);
        }
    });
  }
};

// Blocks: (tile of a sequence's rows, KV head). Sequences with one query are left to decode_kernel.
template <typename Tile, typename T>
__global__ void __launch_bounds__(kThreads) prefill_kernel(Attention a) {
  extern __shared__ uint4 memory[];
  RowTile rows;
  const int sequence = find_tile(a.starts, a.sequences, a.group, Tile::kRows, blockIdx.x, rows);
  if (sequence < 0 || a.starts[sequence + 1] - a.starts[sequence] == 1) return;
  rows.kv_head = blockIdx.y;
  rows.first_position = a.context_lens[sequence] - (a.starts[sequence + 1] - a.starts[sequence]);
  rows.context_lens = nullptr;
  rows.blocks = a.block_tables + int64_t{sequence} * a.table_width;
  const int first = first_key(a, rows.position(a, 0)), end = rows.position(a, rows.rows - 1) + 1;

  Tile tile(memory);
  using Row = float[Tile::kMaxColumns];
  MergedTile<Tile> merged{
      reinterpret_cast<Row*>(reinterpret_cast<char*>(memory) + sizeof(typename Tile::Shared)), {}};
  for (int i = threadIdx.x; i < Tile::kRows * Tile::kMaxColumns; i += kThreads)
    (&merged.sums[0][0])[i] = 0.0f;
  tile.load_queries(a, rows);
  for (int split = first / kSplit; split * kSplit < end; ++split) {
    tile.attend(a, rows, split_range(split, first, end));
    merged.add(tile);
  }
  tile.for_rows([&](int m, int half, int row) {
    if (row >= rows.rows) return;
    const int run_row = rows.first_row + row;
    const int64_t token = rows.first_token + run_row / a.group;
    const int64_t head = rows.kv_head * a.group + run_row % a.group;
    T* const out = static_cast<T*>(a.out) + (token * a.heads + head) * a.dim;
#pragma unroll
    for (int c = 0; c < Tile::kColumnTiles; ++c)
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int d = tile.column(c) + e;
        if (d < a.dim) store(out + d, __fdiv_rn(merged.sums[row][d], merged.states[m][half].total));
      }
  });
}

template <typename Tile>
cudaError_t decode_parts(const Attention& a, bool single_queries, cudaStream_t stream) {
  const int tiles = (a.group + Tile::kRows - 1) / Tile::kRows;
  return launch(decode_kernel<Tile>, grid_of(int64_t{a.items} * tiles, a.kv_heads, a.splits), kThreads,
                sizeof(typename Tile::Shared), stream, a, single_queries);
}

template <typename Tile>
cudaError_t shared_parts(const Attention& a, cudaStream_t stream) {
  const int tiles = most_tiles(a.tokens, a.groups, a.group, Tile::kRows);
  return launch(shared_prefix_kernel<Tile>, grid_of(tiles, a.kv_heads, a.splits), kThreads,
                sizeof(typename Tile::Shared), stream, a);
}

template <typename T>
cudaError_t merge(const Attention& a, bool single_queries, cudaStream_t stream) {
  const int64_t warps = int64_t{a.items} * a.heads;
  return launch(merge_kernel<T>, grid_of((warps + kWarps - 1) / kWarps), kThreads, 0, stream, a,
                single_queries);
}

template <typename Tile, typename T>
cudaError_t prefill(const Attention& a, cudaStream_t stream) {
  const int tiles = most_tiles(a.tokens, a.sequences, a.group, Tile::kRows);
  const size_t merged_bytes = Tile::kRows * Tile::kMaxColumns * sizeof(float);
  return launch(prefill_kernel<Tile, T>, grid_of(tiles, a.kv_heads), kThreads,
                sizeof(typename Tile::Shared) + merged_bytes, stream, a);
}

// The tiles for numbers of type T and heads of up to kMaxDim elements: as many rows as registers and shared
// memory hold. A prefill also keeps its merged sums there.
template <typename T, int kMaxDim>
struct Built {
  using Number = T;
  using Decode = TensorTile<T, kMaxDim, 1>;
  using Prefix = TensorTile<T, kMaxDim, kMaxDim == 256 ? 2 : 4>;
  using Prefill = TensorTile<T, kMaxDim, kMaxDim == 256 ? 1 : 4>;
};

template <int kMaxDim>
struct Built<float, kMaxDim> {
  using Number = float;
  using Decode = PlainTile<kMaxDim == 64 ? 128 : kMaxDim>;
  using Prefix = Decode;
};

// Calls run(Built) with the smallest size of a head that the kernels are built for.
template <typename T, typename Run>
cudaError_t with_dim(int dim, const Run& run) {
  if (dim <= 64) return run(Built<T, 64>());
  if (dim <= 128) return run(Built<T, 128>());
  return run(Built<T, 256>());
}

template <typename Run>
cudaError_t with_type(Type type, int dim, const Run& run) {
  if (type == Type::kFloat) return with_dim<float>(dim, run);
  if (type == Type::kBFloat16) return with_dim<__nv_bfloat16>(dim, run);
  return with_dim<__half>(dim, run);
}

}  // namespace

cudaError_t launch_decode(const Attention& a, Type type, bool single_queries, cudaStream_t stream) {
  return with_type(type, a.dim, [&](auto built) {
    using BuiltFor = decltype(built);
    return in_turn([&] { return decode_parts<typename BuiltFor::Decode>(a, single_queries, stream); },
                   [&] { return merge<typename BuiltFor::Number>(a, single_queries, stream); });
  });
}

cudaError_t launch_prefill(const Attention& a, Type type, cudaStream_t stream) {
  return with_type(type, a.dim, [&](auto built) {
    using BuiltFor = decltype(built);
    if constexpr (std::is_same_v<typename BuiltFor::Number, float>)
      return cudaErrorInvalidValue;
    else
      return prefill<typename BuiltFor::Prefill, typename BuiltFor::Number>(a, stream);
  });
}

cudaError_t launch_grouped_decode(const Attention& a, Type type, cudaStream_t stream) {
  return with_type(type, a.dim, [&](auto built) {
    using BuiltFor = decltype(built);
    return in_turn([&] { return shared_parts<typename BuiltFor::Prefix>(a, stream); },
                   [&] { return decode_parts<typename BuiltFor::Decode>(a, false, stream); },
                   [&] { return merge<typename BuiltFor::Number>(a, false, stream); });
  });
}

}  // namespace thinktwice::gpu

// Attention over the paged cache: decoding, of which parts.cu lists the parts, and prefill.
//
// A row's keys are cut into splits at multiples of kSplit, each split into chunks at multiples of kChunk. The
// chunks of a split are taken in order with an online softmax, the splits are merged in order. This order is
// the same for every kernel here, so a row's bits depend on its own sequence alone.
#include <algorithm>
#include <type_traits>

#include "cuda/kernels.h"
#include "cuda/launch.cuh"
#include "cuda/merge.h"
#include "cuda/plain_tile.cuh"
#include "cuda/rows.cuh"
#include "cuda/tensor_tile.cuh"

namespace thinktwice::gpu {
namespace {

// One split of one tile's keys, stored for merge_kernel; in the smallest tile that holds the rows.
template <typename Tile, typename... Larger>
__device__ void attend_part(const Attention& a, const RowTile& rows, KeyRange keys, int split, void* memory) {
  if constexpr (sizeof...(Larger) > 0)
    if (rows.rows > Tile::kRows) return attend_part<Larger...>(a, rows, keys, split, memory);
  Tile tile(memory);
  tile.load_queries(a, rows);
  tile.attend(a, rows, keys);
  tile.store_part(a, rows, split);
}

// Tiles of more and more rows.
template <typename... Tiles>
struct TileSet {
  static constexpr int kRows = std::max({Tiles::kRows...});
  static constexpr size_t kBytes = std::max({sizeof(typename Tiles::Shared)...});

  static __device__ void attend(const Attention& a, const RowTile& rows, KeyRange keys, int split,
                                void* memory) {
    attend_part<Tiles...>(a, rows, keys, split, memory);
  }
};

// The rows and keys of a part that this launch takes; false if there are none. Keys that a window hides from
// a member of a group are masked; only those of one item are skipped.
__device__ inline bool find_part(const Attention& a, bool single_queries, const Part& part, RowTile& rows,
                                 KeyRange& keys) {
  rows.first_row = part.first_row;
  rows.rows = part.rows;
  if (part.run < 0) {
    rows.first_token = rows.first_item = a.group_offsets[-1 - part.run];
    rows.context_lens = a.context_lens + rows.first_token;
    rows.blocks = a.block_tables + int64_t{rows.first_token} * a.table_width;
    keys = {part.split * kSplit, part.split * kSplit + kSplit};
    return keep_items(a, rows);
  }
  Query query;
  const bool taken = part.run >= a.first_item && part.run < a.first_item + a.items;
  if (!taken || !find_query(a, single_queries, part.run, query)) return false;
  rows.first_token = query.token;
  rows.first_item = part.run;
  rows.first_position = query.position;
  rows.context_lens = nullptr;
  rows.blocks = a.block_tables + int64_t{query.sequence} * a.table_width;
  keys = split_range(part.split, first_key(a, query.position), query.position + 1);
  return true;
}

// Any number of blocks, which take the parts in turn; the KV heads of a part are neighbours. Shared memory
// has room for two or three blocks: asking for two keeps ptxas from spilling in order to fit more.
template <typename Tiles>
__global__ void __launch_bounds__(kThreads, 2) parts_kernel(Attention a, bool single_queries) {
  extern __shared__ uint4 memory[];
  const int64_t count = int64_t{a.parts->run} * a.kv_heads;
  for (int64_t i = blockIdx.x; i < count; i += gridDim.x) {
    const Part part = a.parts[1 + i / a.kv_heads];
    RowTile rows;
    KeyRange keys;
    if (!find_part(a, single_queries, part, rows, keys)) continue;
    rows.kv_head = static_cast<int>(i % a.kv_heads);
    Tiles::attend(a, rows, keys, part.split, memory);
    __syncthreads();  // the next part overwrites what is read here
  }
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

// Blocks: (tile of a sequence's rows, KV head). Sequences with one query are left to parts_kernel.
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

template <typename Tiles>
cudaError_t attend_parts(const Attention& a, Type type, bool single_queries, cudaStream_t stream) {
  assert(Tiles::kRows == part_rows(type, a.dim));
  return launch_resident(parts_kernel<Tiles>, most_parts(a, type) * a.kv_heads, kThreads, Tiles::kBytes,
                         stream, a, single_queries);
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
  using Parts =
      TileSet<TensorTile<T, kMaxDim, 1, 2>, TensorTile<T, kMaxDim, 2, 2>, TensorTile<T, kMaxDim, 4, 2>>;
  using Prefill = TensorTile<T, kMaxDim, 4, 1>;
};

template <typename T>
struct Built<T, 256> {
  using Number = T;
  using Parts = TileSet<TensorTile<T, 256, 1, 1>, TensorTile<T, 256, 2, 1>>;
  using Prefill = TensorTile<T, 256, 1, 1>;
};

template <int kMaxDim>
struct Built<float, kMaxDim> {
  using Number = float;
  using Parts = TileSet<PlainTile<kMaxDim == 64 ? 128 : kMaxDim>>;
};

template <>
struct Built<float, 256> {
  using Number = float;
  using Parts = TileSet<PlainTile<256>>;
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
    return in_turn([&] { return attend_parts<typename BuiltFor::Parts>(a, type, single_queries, stream); },
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

}  // namespace thinktwice::gpu

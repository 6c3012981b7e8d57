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
#include "cuda/part_feed.cuh"
#include "cuda/plain_tile.cuh"
#include "cuda/rows.cuh"
#include "cuda/tensor_tile.cuh"

namespace thinktwice::gpu {
namespace {

// The parts of the list that a block takes: every one as many after the last as there are blocks. The KV
// heads of a part are neighbours.
class ListedParts {
 public:
  __device__ explicit ListedParts(const Attention& attention)
      : a(attention), count(a.parts->run * a.kv_heads), index(static_cast<int>(blockIdx.x)) {}

  // Without rows or keys where there is none left.
  __device__ KnownPart next() {
    while (index < count) {
      const int listed = index;
      index += static_cast<int>(gridDim.x);
      KnownPart found{};
      if (find(a.parts[1 + listed / a.kv_heads], found)) {
        found.rows.kv_head = listed % a.kv_heads;
        return found;
      }
    }
    return {};
  }

 private:
  const Attention& a;
  const int count;
  int index;

  // The rows and keys that this launch takes; false if there are none. Keys that a window hides from a member
  // of a group are masked; only those of one item are skipped.
  __device__ bool find(const Part& part, KnownPart& found) const {
    RowTile& rows = found.rows;
    rows.first_token = part.token;
    rows.first_row = part.first_row;
    rows.rows = part.rows;
    rows.blocks = a.block_tables + int64_t{part.sequence} * a.table_width;
    found.split = part.split;
    if (part.run < 0) {
      rows.first_item = part.token;
      rows.context_lens = a.context_lens + part.token;
      found.keys = {part.split * kSplit, part.split * kSplit + kSplit};
      return keep_items(a, rows);
    }
    rows.first_item = part.run;
    rows.first_position = part.position;
    found.keys = split_range(part.split, first_key(a, part.position), part.position + 1);
    return part.run >= a.first_item && part.run < a.first_item + a.items;
  }
};

// The splits of a tile's keys, in order.
class TileSplits {
 public:
  __device__ TileSplits(const RowTile& tile, KeyRange keys)
      : rows(tile), all(keys), split(keys.first / kSplit) {}

  __device__ KnownPart next() {
    if (split * kSplit >= all.end) return {};
    const KnownPart found{rows, split_range(split, all.first, all.end), split};
    ++split;
    return found;
  }

 private:
  const RowTile rows;
  const KeyRange all;
  int split;
};

// Numbers in float32: a part at a time.
template <typename Tile>
struct PlainParts {
  static constexpr int kRows = Tile::kRows;
  static constexpr size_t kBytes = sizeof(typename Tile::Shared);

  static __device__ void attend(const Attention& a, void* memory) {
    ListedParts parts(a);
    for (KnownPart part = parts.next(); part.exists(); part = parts.next()) {
      Tile tile(memory);
      tile.load_queries(a, part.rows);
      tile.attend(a, part.rows, part.keys);
      tile.store_part(a, part.rows, part.split);
      __syncthreads();  // the next part overwrites what is read here
    }
  }
};

// Each part in the smallest tile that holds its rows: of so many times 16.
template <typename Memory, int... kRowTiles>
struct TensorParts {
  static constexpr int kRows = Memory::kRows;
  static constexpr size_t kBytes = sizeof(Memory);
  using Feed = PartFeed<Memory, ListedParts>;

  static __device__ void attend(const Attention& a, void* block_memory) {
    Memory& memory = *static_cast<Memory*>(block_memory);
    Feed feed(a, memory, ListedParts(a));
    Queries<Memory> queries;
    queries.load(a, feed.current().rows);
    for (; feed.current().exists(); feed.advance()) {
      queries.store(memory);
      attend_in<kRowTiles...>(a, memory, feed, queries);
    }
  }

 private:
  template <int kTiles, int... kMore>
  static __device__ void attend_in(const Attention& a, Memory& memory, Feed& feed, Queries<Memory>& queries) {
    if constexpr (sizeof...(kMore) > 0)
      if (feed.current().rows.rows > 16 * kTiles) return attend_in<kMore...>(a, memory, feed, queries);
    TensorTile<Memory, kTiles> tile(memory);
    tile.attend(a, feed, [&] { queries.load(a, feed.next().rows); });
    tile.store_part(a, feed.current().rows, feed.current().split);
  }
};

// Any number of blocks, which take the parts in turn; results are stored for merge_kernel. Shared memory has
// room for two or three blocks: asking for two keeps ptxas from spilling in order to fit more.
template <typename Parts>
__global__ void __launch_bounds__(kThreads, 2) parts_kernel(Attention a) {
  extern __shared__ uint4 memory[];
  Parts::attend(a, memory);
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
__global__ void __launch_bounds__(kThreads, 2) prefill_kernel(Attention a) {
  extern __shared__ uint4 memory[];
  RowTile rows;
  const int sequence = find_tile(a.starts, a.sequences, a.group, Tile::kRows, blockIdx.x, rows);
  if (sequence < 0 || a.starts[sequence + 1] - a.starts[sequence] == 1) return;
  rows.kv_head = blockIdx.y;
  rows.first_position = a.context_lens[sequence] - (a.starts[sequence + 1] - a.starts[sequence]);
  rows.context_lens = nullptr;
  rows.blocks = a.block_tables + int64_t{sequence} * a.table_width;
  const int first = first_key(a, rows.position(a, 0)), end = rows.position(a, rows.rows - 1) + 1;

  using Memory = typename Tile::Memory;
  Memory& shared = *reinterpret_cast<Memory*>(memory);
  Tile tile(shared);
  using Row = float[Tile::kMaxColumns];
  MergedTile<Tile> merged{reinterpret_cast<Row*>(reinterpret_cast<char*>(memory) + sizeof(Memory)), {}};
  for (int i = threadIdx.x; i < Tile::kRows * Tile::kMaxColumns; i += kThreads)
    (&merged.sums[0][0])[i] = 0.0f;
  Queries<Memory> queries;
  queries.load(a, rows);
  queries.store(shared);
  PartFeed<Memory, TileSplits> feed(a, shared, TileSplits(rows, {first, end}));
  for (; feed.current().exists(); feed.advance()) {
    tile.attend(a, feed, [] {});
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

template <typename Parts>
cudaError_t attend_parts(const Attention& a, Type type, cudaStream_t stream) {
  assert(Parts::kRows == part_rows(type, a.dim));
  return launch_resident(parts_kernel<Parts>, most_parts(a, type) * a.kv_heads, kThreads, Parts::kBytes,
                         stream, a);
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
                sizeof(typename Tile::Memory) + merged_bytes, stream, a);
}

// The tiles for numbers of type T and heads of up to kMaxDim elements: as many rows as registers and shared
// memory hold. A prefill also keeps its merged sums there.
template <typename T, int kMaxDim>
struct Built {
  using Number = T;
  using Parts = TensorParts<TileMemory<T, kMaxDim, 64, 2>, 1, 2, 4>;
  using Prefill = TensorTile<TileMemory<T, kMaxDim, 64, 1>, 4>;
};

template <typename T>
struct Built<T, 256> {
  using Number = T;
  using Parts = TensorParts<TileMemory<T, 256, 32, 1>, 1, 2>;
  using Prefill = TensorTile<TileMemory<T, 256, 16, 1>, 1>;
};

template <int kMaxDim>
struct Built<float, kMaxDim> {
  using Number = float;
  using Parts = PlainParts<PlainTile<kMaxDim == 64 ? 128 : kMaxDim>>;
};

template <>
struct Built<float, 256> {
  using Number = float;
  using Parts = PlainParts<PlainTile<256>>;
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
    return in_turn([&] { return attend_parts<typename BuiltFor::Parts>(a, type, stream); },
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

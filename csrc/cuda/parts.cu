// Which parts the attention of decoding rows is made of: for a group the splits that its members share, for
// an item those that it reads alone. Lengths and groups are known on the GPU only.
#include "cuda/launch.cuh"
#include "cuda/rows.cuh"

namespace thinktwice::gpu {
namespace {

constexpr int kListThreads = 256;
constexpr int kListWarps = kListThreads / 32;
constexpr int kSizes = kSplit / kChunk * part_rows(Type::kHalf, 64) / 16;  // of a part, in chunks of 16 rows

__device__ inline int part_size(KeyRange keys, int rows) {
  const int chunks = (keys.end - 1) / kChunk - keys.first / kChunk + 1;
  return chunks * ((rows + 15) / 16);
}

// Calls body(part, size) for all parts; a warp has a group's tile or an item, its lanes the splits.
template <typename Body>
__device__ void for_parts(const Attention& a, int tile_rows, bool single_queries, const Body& body) {
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
  const int tiles = a.group_offsets ? most_tiles(a.tokens, a.groups, a.group, tile_rows) : 0;
  for (int tile = warp; tile < tiles; tile += kListWarps) {
    RowTile rows;
    const int group = find_tile(a.group_offsets, a.groups, a.group, tile_rows, tile, rows);
    const int splits = group < 0 ? 0 : shared_splits(a, group);
    for (int split = lane; split < splits; split += 32)
      body(Part{-1 - group, rows.first_row, rows.rows, split}, part_size({0, kSplit}, rows.rows));
  }
  for (int item = warp; item < a.items; item += kListWarps) {
    Query query;
    if (!find_query(a, single_queries, item, query)) continue;
    const int first = first_key(a, query.position), end = query.position + 1;
    const int shared =
        a.group_offsets ? shared_splits(a, interval_of(a.group_offsets, a.groups, query.sequence)) : 0;
    for (int split = max(shared, first / kSplit) + lane; split * kSplit < end; split += 32)
      for (int row = 0; row < a.group; row += tile_rows) {
        const int rows = min(tile_rows, a.group - row);
        body(Part{item, row, rows, split}, part_size(split_range(split, first, end), rows));
      }
  }
}

// One block: counts the parts of each size, then puts each where its size stands. Equal ones come in any
// order, which no result depends on.
__global__ void __launch_bounds__(kListThreads)
    list_parts_kernel(Attention a, int tile_rows, bool single_queries, int64_t room) {
  __shared__ int places[kSizes];
  for (int i = threadIdx.x; i < kSizes; i += kListThreads) places[i] = 0;
  __syncthreads();
  for_parts(a, tile_rows, single_queries, [&](const Part&, int size) { atomicAdd(&places[size - 1], 1); });
  __syncthreads();
  if (threadIdx.x == 0) {
    int before = 0;
    for (int i = kSizes - 1; i >= 0; --i) {
      const int count = places[i];
      places[i] = before;
      before += count;
    }
    assert(before <= room);
    a.parts[0] = {before, 0, 0, 0};
  }
  __syncthreads();
  for_parts(a, tile_rows, single_queries,
            [&](const Part& part, int size) { a.parts[1 + atomicAdd(&places[size - 1], 1)] = part; });
}

}  // namespace

int64_t most_parts(const Attention& a, Type type) {
  const int tile_rows = part_rows(type, a.dim);
  const int64_t own = int64_t{a.items} * ((a.group + tile_rows - 1) / tile_rows);
  return (own + (a.group_offsets ? most_tiles(a.tokens, a.groups, a.group, tile_rows) : 0)) * a.splits;
}

cudaError_t launch_list_parts(const Attention& a, Type type, bool single_queries, cudaStream_t stream) {
  return launch(list_parts_kernel, grid_of(1), kListThreads, 0, stream, a, part_rows(type, a.dim),
                single_queries, most_parts(a, type));
}

}  // namespace thinktwice::gpu

// Attention over the paged cache on the CPU: decoding, chunked prefill and mixtures of both.
#include "cpu/attention.h"

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <limits>
#include <optional>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "common/parallel.h"
#include "common/tensor_utils.h"

namespace thinktwice {
namespace {

using c10::BFloat16;
using c10::Half;

#define THINKTWICE_KERNELS "cpu/attention_kernels.inc"
#include "common/for_each_isa.h"
#undef THINKTWICE_KERNELS

void check_sequence(const char* op, const Attention& a, int64_t num_blocks, int64_t sequence, int64_t queries,
                    int64_t length, const int32_t* blocks, int64_t width) {
  const int64_t used = (length + a.block_size - 1) / a.block_size;
  check(queries >= 0 && queries <= length && used <= width, op, ": sequence ", sequence, " has ", queries,
        " queries, a context of ", length, " tokens and a table of ", width, " blocks");
  for (int64_t b = 0; b < used; ++b)
    check(blocks[b] >= 0 && blocks[b] < num_blocks, op, ": block ", blocks[b], " of sequence ", sequence,
          " lies outside the cache of ", num_blocks, " blocks");
}

std::vector<Tile> make_tiles(const Attention& a, int64_t num_blocks, const Tensor& block_tables,
                             const Tensor& context_lens, const Tensor& cu_seqlens_q) {
  const auto* const tables = block_tables.const_data_ptr<int32_t>();
  const auto* const lens = context_lens.const_data_ptr<int32_t>();
  const auto* const starts = cu_seqlens_q.const_data_ptr<int32_t>();
  const int64_t width = block_tables.size(1), tile_tokens = std::max<int64_t>(1, kRowsPerTile / a.group);
  std::vector<Tile> tiles;
  for (int64_t s = 0; s < context_lens.size(0); ++s) {
    const int64_t queries = starts[s + 1] - starts[s];
    const int32_t* const blocks = tables + s * width;
    check_sequence("paged_attention", a, num_blocks, s, queries, lens[s], blocks, width);
    for (int64_t t = 0; t < queries; t += tile_tokens)
      for (int64_t head = 0; head < a.kv_heads; ++head)
        tiles.push_back(
            {starts[s] + t, lens[s] - queries + t, std::min(tile_tokens, queries - t), head, blocks});
  }
  return tiles;
}

// Cuts every group into tiles of members whose rows share one reading of the keys, of every KV head.
std::vector<Members> make_members(const Attention& a, int64_t num_blocks,
                                  const std::vector<const int32_t*>& tables, int64_t width,
                                  const Tensor& context_lens, const Tensor& group_offsets,
                                  const Tensor& shared_blocks) {
  const auto* const lens = context_lens.const_data_ptr<int32_t>();
  const auto* const offsets = group_offsets.const_data_ptr<int32_t>();
  const auto* const shared = shared_blocks.const_data_ptr<int32_t>();
  const int64_t most = std::max<int64_t>(1, kRowsPerTile / a.group);
  std::vector<Members> tiles;
  for (int64_t g = 0; g < shared_blocks.numel(); ++g)
    check(offsets[g] <= offsets[g + 1], "grouped_decode_attention: group_offsets must not fall");
  for (int64_t g = 0; g < shared_blocks.numel(); ++g) {
    const int64_t shared_keys = shared[g] * a.block_size;
    check(shared[g] >= 0, "grouped_decode_attention: shared_blocks of group ", g, " is ", shared[g],
          ", must be at least 0");
    for (int64_t s = offsets[g]; s < offsets[g + 1]; ++s) {
      check_sequence("grouped_decode_attention", a, num_blocks, s, 1, lens[s], tables[s], width);
      check(shared_keys <= lens[s] && std::equal(tables[s], tables[s] + shared[g], tables[offsets[g]]),
            "grouped_decode_attention: sequence ", s, " does not start with the ", shared[g],
            " shared blocks of group ", g);
    }
    for (int64_t s = offsets[g]; s < offsets[g + 1]; s += most)
      for (int64_t head = 0; head < a.kv_heads; ++head)
        tiles.push_back({s, std::min(most, offsets[g + 1] - s), head, shared_keys / kChunk * kChunk, lens + s,
                         tables.data() + s});
  }
  return tiles;
}

// Calls attend(tile, workspace) for every tile; the costliest first, so that no thread is left with one when
// the others are done.
template <typename TileType, typename Rows, typename Cost, typename Attend>
void run_tiles(const std::vector<TileType>& tiles, int64_t dim, const Rows& rows_of, const Cost& cost_of,
               const Attend& attend) {
  int64_t rows = 0;
  std::vector<std::pair<int64_t, const TileType*>> order;
  for (const TileType& tile : tiles) {
    rows = std::max<int64_t>(rows, rows_of(tile));
    order.emplace_back(cost_of(tile), &tile);
  }
  std::stable_sort(order.begin(), order.end(),
                   [](const auto& x, const auto& y) { return x.first > y.first; });
  parallel_tasks(static_cast<int64_t>(order.size()), 1,
                 [&](int64_t i) { attend(*order[i].second, thread_workspace(rows, dim)); });
}

template <typename T>
void run(const Attention& a, const std::vector<Tile>& tiles) {
  const auto attend_tile = ISA_DISPATCH(attend<T, T>);
  run_tiles(
      tiles, a.dim, [&](const Tile& tile) { return tile.tokens * a.group; },
      [](const Tile& tile) { return (tile.first_position + tile.tokens) * (tile.tokens + 1); },
      [&](const Tile& tile, const Workspace& work) { attend_tile(a, tile, work); });
}

template <typename T>
void run(const Attention& a, const std::vector<Members>& tiles) {
  const auto attend_tile = ISA_DISPATCH(attend_members<T, T>);
  run_tiles(
      tiles, a.dim, [&](const Members& tile) { return tile.count * a.group; },
      [](const Members& tile) {
        int64_t keys = tile.shared_keys;
        for (int64_t m = 0; m < tile.count; ++m) keys += tile.context_lens[m];
        return keys;
      },
      [&](const Members& tile, const Workspace& work) { attend_tile(a, tile, work); });
}

template <typename TileType>
void run_in_type(const char* op, ScalarType dtype, const Attention& a, const std::vector<TileType>& tiles) {
  if (dtype == ScalarType::Float) return run<float>(a, tiles);
  if (dtype == ScalarType::BFloat16) return run<BFloat16>(a, tiles);
  check(dtype == ScalarType::Half, op, ": type ", torch::headeronly::toString(dtype),
        " is not one of float32, bfloat16, float16");
  run<Half>(a, tiles);
}

void check_inputs(const char* op, const Tensor& q, const Tensor& k_cache, const Tensor& v_cache,
                  const Tensor& block_tables, const Tensor& context_lens, int64_t window) {
  const ScalarType dtype = q.scalar_type();
  check(k_cache.dim() == 4 && v_cache.dim() == 4 && k_cache.is_contiguous() && v_cache.is_contiguous(), op,
        ": k_cache and v_cache must be contiguous [blocks, kv_heads, block_size, head_dim]");
  for (int64_t d = 0; d < 4; ++d)
    check(k_cache.size(d) == v_cache.size(d), op, ": k_cache and v_cache differ in shape");
  check(q.dim() == 3 && q.size(2) == k_cache.size(3) && (q.stride(2) == 1 || q.size(2) == 1), op,
        ": q must be [tokens, heads, ", k_cache.size(3), "], its last dimension contiguous");
  check(q.size(1) % k_cache.size(1) == 0, op, ": ", q.size(1), " query heads cannot share ", k_cache.size(1),
        " KV heads evenly");
  check(k_cache.scalar_type() == dtype && v_cache.scalar_type() == dtype, op,
        ": q and the cache must have one type");
  check(window >= 0, op, ": window must not be negative");
  const int64_t sequences = context_lens.numel();
  check_vector(context_lens, (std::string(op) + ": context_lens").c_str(), ScalarType::Int, sequences);
  check(block_tables.dim() == 2 && block_tables.size(0) == sequences && block_tables.is_contiguous() &&
            block_tables.is_cpu() && block_tables.scalar_type() == ScalarType::Int,
        op, ": block_tables must be a contiguous int32 CPU tensor [sequences, blocks]");
}

Attention describe(const Tensor& q, const Tensor& k_cache, const Tensor& v_cache, Tensor& out, double scale,
                   int64_t window) {
  return {q.const_data_ptr(),
          k_cache.const_data_ptr(),
          v_cache.const_data_ptr(),
          out.mutable_data_ptr(),
          q.stride(0),
          q.stride(1),
          q.size(1),
          k_cache.size(1),
          q.size(1) / k_cache.size(1),
          q.size(2),
          k_cache.size(2),
          window,
          static_cast<float>(scale)};
}

Tensor paged_attention(Tensor q, Tensor k_cache, Tensor v_cache, Tensor block_tables, Tensor context_lens,
                       Tensor cu_seqlens_q, double scale, int64_t window, std::optional<Tensor> parts) {
  const char* const op = "paged_attention";
  check(!parts, op, ": a list of parts is for CUDA");
  check_inputs(op, q, k_cache, v_cache, block_tables, context_lens, window);
  const int64_t sequences = context_lens.numel();
  check_vector(cu_seqlens_q, "paged_attention: cu_seqlens_q", ScalarType::Int, sequences + 1);
  const auto* const starts = cu_seqlens_q.const_data_ptr<int32_t>();
  check(starts[0] == 0 && starts[sequences] == q.size(0), op, ": cu_seqlens_q must run from 0 to ",
        q.size(0));
  Tensor out = new_tensor({q.size(0), q.size(1), q.size(2)}, q.scalar_type());
  const Attention a = describe(q, k_cache, v_cache, out, scale, window);
  run_in_type(op, q.scalar_type(), a,
              make_tiles(a, k_cache.size(0), block_tables, context_lens, cu_seqlens_q));
  return out;
}

Tensor grouped_decode_attention(Tensor q, Tensor k_cache, Tensor v_cache, Tensor block_tables,
                                Tensor context_lens, Tensor group_offsets, Tensor shared_blocks, double scale,
                                int64_t window, std::optional<Tensor> parts) {
  const char* const op = "grouped_decode_attention";
  check(!parts, op, ": a list of parts is for CUDA");
  check_inputs(op, q, k_cache, v_cache, block_tables, context_lens, window);
  const int64_t sequences = context_lens.numel(), groups = shared_blocks.numel();
  check(q.size(0) == sequences, op, ": q has ", q.size(0), " queries for ", sequences, " sequences");
  check_vector(shared_blocks, "grouped_decode_attention: shared_blocks", ScalarType::Int, groups);
  check_vector(group_offsets, "grouped_decode_attention: group_offsets", ScalarType::Int, groups + 1);
  const auto* const offsets = group_offsets.const_data_ptr<int32_t>();
  check(offsets[0] == 0 && offsets[groups] == sequences, op, ": group_offsets must run from 0 to ",
        sequences);
  Tensor out = new_tensor({q.size(0), q.size(1), q.size(2)}, q.scalar_type());
  const Attention a = describe(q, k_cache, v_cache, out, scale, window);
  std::vector<const int32_t*> tables;
  for (int64_t s = 0; s < sequences; ++s)
    tables.push_back(block_tables.const_data_ptr<int32_t>() + s * block_tables.size(1));
  run_in_type(op, q.scalar_type(), a,
              make_members(a, k_cache.size(0), tables, block_tables.size(1), context_lens, group_offsets,
                           shared_blocks));
  return out;
}

}  // namespace

void attend_in_float(ScalarType cache_type, const Attention& a, const Tile& tile) {
  const auto attend_tile = cache_type == ScalarType::Float      ? ISA_DISPATCH(attend<float, float>)
                           : cache_type == ScalarType::BFloat16 ? ISA_DISPATCH(attend<BFloat16, float>)
                                                                : ISA_DISPATCH(attend<Half, float>);
  attend_tile(a, tile, thread_workspace(tile.tokens * a.group, a.dim));
}

void attend_in_float(ScalarType cache_type, const Attention& a, const Members& tile) {
  const auto attend_tile = cache_type == ScalarType::Float ? ISA_DISPATCH(attend_members<float, float>)
                           : cache_type == ScalarType::BFloat16
                               ? ISA_DISPATCH(attend_members<BFloat16, float>)
                               : ISA_DISPATCH(attend_members<Half, float>);
  attend_tile(a, tile, thread_workspace(tile.count * a.group, a.dim));
}

}  // namespace thinktwice

STABLE_TORCH_LIBRARY_IMPL(thinktwice, CPU, m) {
  m.impl("paged_attention", TORCH_BOX(&thinktwice::paged_attention));
  m.impl("grouped_decode_attention", TORCH_BOX(&thinktwice::grouped_decode_attention));
}

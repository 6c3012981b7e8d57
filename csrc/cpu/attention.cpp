// Attention over the paged cache on the CPU: decoding, chunked prefill and mixtures of both.
#include "cpu/attention.h"

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>
#include <vector>

#include "cpu/parallel.h"
#include "tensor_utils.h"

namespace thinktwice {
namespace {

using c10::BFloat16;
using c10::Half;

constexpr int64_t kRowsPerTile = 64;  // rows that share one reading of the keys

#define THINKTWICE_KERNELS "cpu/attention_kernels.inc"
#include "cpu/for_each_isa.h"
#undef THINKTWICE_KERNELS

std::vector<Tile> make_tiles(const Attention& a, int64_t num_blocks, const Tensor& block_tables,
                             const Tensor& context_lens, const Tensor& cu_seqlens_q) {
  const auto* const tables = block_tables.const_data_ptr<int32_t>();
  const auto* const lens = context_lens.const_data_ptr<int32_t>();
  const auto* const starts = cu_seqlens_q.const_data_ptr<int32_t>();
  const int64_t width = block_tables.size(1), tile_tokens = std::max<int64_t>(1, kRowsPerTile / a.group);
  std::vector<Tile> tiles;
  for (int64_t s = 0; s < context_lens.size(0); ++s) {
    const int64_t queries = starts[s + 1] - starts[s], used = (lens[s] + a.block_size - 1) / a.block_size;
    check(queries >= 0 && queries <= lens[s] && used <= width, "paged_attention: sequence ", s, " has ",
          queries, " queries, a context of ", lens[s], " tokens and a table of ", width, " blocks");
    const int32_t* const blocks = tables + s * width;
    for (int64_t b = 0; b < used; ++b)
      check(blocks[b] >= 0 && blocks[b] < num_blocks, "paged_attention: block ", blocks[b], " of sequence ",
            s, " lies outside the cache of ", num_blocks, " blocks");
    for (int64_t t = 0; t < queries; t += tile_tokens)
      for (int64_t head = 0; head < a.kv_heads; ++head)
        tiles.push_back(
            {starts[s] + t, lens[s] - queries + t, std::min(tile_tokens, queries - t), head, blocks});
  }
  return tiles;
}

template <typename T>
void run(const Attention& a, const std::vector<Tile>& tiles) {
  const auto attend = ISA_DISPATCH(attend<T>);
  int64_t rows = 0;
  for (const Tile& tile : tiles) rows = std::max(rows, tile.tokens * a.group);
  // The longest first, so that no thread is left with one when the others are done.
  std::vector<int64_t> order(tiles.size());
  for (size_t i = 0; i < order.size(); ++i) order[i] = static_cast<int64_t>(i);
  const auto cost = [&tiles](int64_t i) {
    return (tiles[i].first_position + tiles[i].tokens) * (tiles[i].tokens + 1);
  };
  std::stable_sort(order.begin(), order.end(), [&cost](int64_t i, int64_t j) { return cost(i) > cost(j); });
  parallel_tasks(static_cast<int64_t>(tiles.size()), 1,
                 [&](int64_t i) { attend(a, tiles[order[i]], thread_workspace(rows, a.dim)); });
}

Tensor paged_attention(Tensor q, Tensor k_cache, Tensor v_cache, Tensor block_tables, Tensor context_lens,
                       Tensor cu_seqlens_q, double scale, int64_t window, double softcap) {
  const ScalarType dtype = q.scalar_type();
  check(k_cache.dim() == 4 && v_cache.dim() == 4 && k_cache.is_contiguous() && v_cache.is_contiguous(),
        "paged_attention: k_cache and v_cache must be contiguous [blocks, kv_heads, block_size, head_dim]");
  for (int64_t d = 0; d < 4; ++d)
    check(k_cache.size(d) == v_cache.size(d), "paged_attention: k_cache and v_cache differ in shape");
  check(q.dim() == 3 && q.size(2) == k_cache.size(3) && (q.stride(2) == 1 || q.size(2) == 1),
        "paged_attention: q must be [tokens, heads, ", k_cache.size(3), "], its last dimension contiguous");
  check(q.size(1) % k_cache.size(1) == 0, "paged_attention: ", q.size(1), " query heads cannot share ",
        k_cache.size(1), " KV heads evenly");
  check(k_cache.scalar_type() == dtype && v_cache.scalar_type() == dtype,
        "paged_attention: q and the cache must have one type");
  check(window >= 0 && softcap >= 0, "paged_attention: window and softcap must not be negative");
  const int64_t sequences = context_lens.numel();
  check_vector(context_lens, "paged_attention: context_lens", ScalarType::Int, sequences);
  check_vector(cu_seqlens_q, "paged_attention: cu_seqlens_q", ScalarType::Int, sequences + 1);
  check(block_tables.dim() == 2 && block_tables.size(0) == sequences && block_tables.is_contiguous() &&
            block_tables.is_cpu() && block_tables.scalar_type() == ScalarType::Int,
        "paged_attention: block_tables must be a contiguous int32 CPU tensor [sequences, blocks]");
  const auto* const starts = cu_seqlens_q.const_data_ptr<int32_t>();
  check(starts[0] == 0 && starts[sequences] == q.size(0), "paged_attention: cu_seqlens_q must run from 0 to ",
        q.size(0));

  Tensor out = new_tensor({q.size(0), q.size(1), q.size(2)}, dtype);
  const Attention a{q.const_data_ptr(),
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
                    static_cast<float>(scale),
                    static_cast<float>(softcap)};
  const std::vector<Tile> tiles = make_tiles(a, k_cache.size(0), block_tables, context_lens, cu_seqlens_q);
  if (dtype == ScalarType::Float)
    run<float>(a, tiles);
  else if (dtype == ScalarType::BFloat16)
    run<BFloat16>(a, tiles);
  else if (dtype == ScalarType::Half)
    run<Half>(a, tiles);
  else
    check(false, "paged_attention: type ", torch::headeronly::toString(dtype),
          " is not one of float32, bfloat16, float16");
  return out;
}

}  // namespace
}  // namespace thinktwice

STABLE_TORCH_LIBRARY_IMPL(thinktwice, CPU, m) {
  m.impl("paged_attention", TORCH_BOX(&thinktwice::paged_attention));
}

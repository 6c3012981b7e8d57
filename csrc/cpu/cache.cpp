// Moving keys and values: new tokens into their slots, forked blocks into their copies.
#include "cpu/cache.h"

#include <cstring>

#include "common/parallel.h"
#include "common/tensor_utils.h"

namespace thinktwice {
namespace {

constexpr int64_t kGrainBytes = 256 * 1024;  // less than this is not worth another thread

void write_kv(Tensor k, Tensor v, Tensor k_cache, Tensor v_cache, Tensor slots) {
  const int64_t tokens = slots.numel();
  check_vector(slots, "write_kv: slots", ScalarType::Long, tokens);
  check_caches("write_kv", k_cache, v_cache, 4);
  check_rows("write_kv", "k", k, k_cache, tokens, k_cache.size(1));
  check_rows("write_kv", "v", v, k_cache, tokens, k_cache.size(1));
  const int64_t heads = k_cache.size(1), block_size = k_cache.size(2);
  const auto* slot = slots.const_data_ptr<int64_t>();
  check_slots("write_kv", slot, tokens, k_cache);

  const int64_t element = static_cast<int64_t>(k_cache.element_size());
  const int64_t row_bytes = k_cache.size(3) * element;
  const TokenRows from_k(k, element), from_v(v, element);
  auto* const to_k = static_cast<char*>(k_cache.mutable_data_ptr());
  auto* const to_v = static_cast<char*>(v_cache.mutable_data_ptr());
  const auto write_token = [&](int64_t t) {
    const int64_t first = slot[t] / block_size * heads * block_size + slot[t] % block_size;
    for (int64_t h = 0; h < heads; ++h) {
      const int64_t to = (first + h * block_size) * row_bytes;
      std::memcpy(to_k + to, from_k.data + t * from_k.token_stride + h * from_k.head_stride, row_bytes);
      std::memcpy(to_v + to, from_v.data + t * from_v.token_stride + h * from_v.head_stride, row_bytes);
    }
  };
  parallel_tasks(tokens, 1 + kGrainBytes / (2 * heads * row_bytes), write_token);
}

void copy_blocks(Tensor k_cache, Tensor v_cache, Tensor pairs) {
  check_caches("copy_blocks", k_cache, v_cache, 5);
  check(pairs.is_cpu() && pairs.dim() == 2 && pairs.size(1) == 2 && pairs.scalar_type() == ScalarType::Long &&
            pairs.is_contiguous(),
        "copy_blocks: pairs must be a contiguous int64 CPU tensor [pairs, 2]");
  const int64_t layers = k_cache.size(0), blocks = k_cache.size(1), n = pairs.size(0);
  const auto* pair = pairs.const_data_ptr<int64_t>();
  for (int64_t i = 0; i < 2 * n; ++i)
    check(pair[i] >= 0 && pair[i] < blocks, "copy_blocks: block ", pair[i], " lies outside the cache of ",
          blocks, " blocks");

  const int64_t block_bytes =
      k_cache.size(2) * k_cache.size(3) * k_cache.size(4) * static_cast<int64_t>(k_cache.element_size());
  auto* const k = static_cast<char*>(k_cache.mutable_data_ptr());
  auto* const v = static_cast<char*>(v_cache.mutable_data_ptr());
  // A layer's copies run in their order: a block may be copied into and then from.
  const auto copy_layer = [&](int64_t layer) {
    const int64_t base = layer * blocks * block_bytes;
    for (int64_t i = 0; i < n; ++i) {
      const int64_t from = base + pair[2 * i] * block_bytes, to = base + pair[2 * i + 1] * block_bytes;
      std::memmove(k + to, k + from, block_bytes);
      std::memmove(v + to, v + from, block_bytes);
    }
  };
  parallel_tasks(layers, 1 + kGrainBytes / (1 + 2 * n * block_bytes), copy_layer);
}

}  // namespace
}  // namespace thinktwice

STABLE_TORCH_LIBRARY_IMPL(thinktwice, CPU, m) {
  m.impl("write_kv", TORCH_BOX(&thinktwice::write_kv));
  m.impl("copy_blocks", TORCH_BOX(&thinktwice::copy_blocks));
}

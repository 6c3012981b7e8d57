// Moving keys and values: new tokens into their slots, forked blocks into their copies.
#include <cstring>

#include "cpu/parallel.h"
#include "tensor_utils.h"

namespace thinktwice {
namespace {

constexpr int64_t kGrainBytes = 256 * 1024;  // less than this is not worth another thread

// Tokens as rows of [heads, head_dim] with any strides but the last.
struct Rows {
  const char* data;
  int64_t token_stride, head_stride;  // bytes

  Rows(const Tensor& rows, int64_t element)
      : data(static_cast<const char*>(rows.const_data_ptr())),
        token_stride(rows.stride(0) * element),
        head_stride(rows.stride(1) * element) {}
};

void check_rows(const Tensor& rows, const char* name, const Tensor& cache, int64_t tokens) {
  check(rows.is_cpu() && rows.dim() == 3 && rows.scalar_type() == cache.scalar_type(), "write_kv: ", name,
        " must be a CPU tensor [tokens, kv_heads, head_dim] of the cache's type ",
        torch::headeronly::toString(cache.scalar_type()));
  check(rows.size(0) == tokens && rows.size(1) == cache.size(1) && rows.size(2) == cache.size(3),
        "write_kv: ", name, " is [", rows.size(0), ", ", rows.size(1), ", ", rows.size(2), "], expected [",
        tokens, ", ", cache.size(1), ", ", cache.size(3), "]");
  check(rows.stride(2) == 1 || rows.size(2) == 1, "write_kv: the last dimension of ", name,
        " must be contiguous");
}

void check_caches(const char* op, const Tensor& k_cache, const Tensor& v_cache, int64_t dim) {
  bool same = k_cache.dim() == dim && v_cache.dim() == dim &&
              k_cache.scalar_type() == v_cache.scalar_type() && k_cache.is_cpu() && v_cache.is_cpu() &&
              k_cache.is_contiguous() && v_cache.is_contiguous();
  for (int64_t d = 0; same && d < dim; ++d) same = k_cache.size(d) == v_cache.size(d);
  check(same, op, ": k_cache and v_cache must be contiguous CPU tensors of ", dim,
        " dimensions, equal in shape and type");
}

void write_kv(Tensor k, Tensor v, Tensor k_cache, Tensor v_cache, Tensor slots) {
  const int64_t tokens = slots.numel();
  check_vector(slots, "write_kv: slots", ScalarType::Long, tokens);
  check_caches("write_kv", k_cache, v_cache, 4);
  check_rows(k, "k", k_cache, tokens);
  check_rows(v, "v", k_cache, tokens);
  const int64_t blocks = k_cache.size(0), heads = k_cache.size(1), block_size = k_cache.size(2);
  const auto* slot = slots.const_data_ptr<int64_t>();
  for (int64_t t = 0; t < tokens; ++t)
    check(slot[t] >= 0 && slot[t] < blocks * block_size, "write_kv: slot ", slot[t], " of token ", t,
          " lies outside the cache of ", blocks * block_size, " slots");

  const int64_t element = static_cast<int64_t>(k_cache.element_size());
  const int64_t row_bytes = k_cache.size(3) * element;
  const Rows from_k(k, element), from_v(v, element);
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

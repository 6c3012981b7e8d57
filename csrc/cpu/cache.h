// What the ops that write into the cache ask of their arguments.
#pragma once

#include "common/tensor_utils.h"

namespace thinktwice {

// Tokens as rows of [heads, head_dim] with any strides but the last.
struct TokenRows {
  const char* data;
  int64_t token_stride, head_stride;  // bytes

  TokenRows(const Tensor& rows, int64_t element)
      : data(static_cast<const char*>(rows.const_data_ptr())),
        token_stride(rows.stride(0) * element),
        head_stride(rows.stride(1) * element) {}
};

inline void check_rows(const char* op, const char* name, const Tensor& rows, const Tensor& cache,
                       int64_t tokens, int64_t heads) {
  check(rows.is_cpu() && rows.dim() == 3 && rows.scalar_type() == cache.scalar_type(), op, ": ", name,
        " must be a CPU tensor [tokens, heads, head_dim] of the cache's type ",
        torch::headeronly::toString(cache.scalar_type()));
  check(rows.size(0) == tokens && rows.size(1) == heads && rows.size(2) == cache.size(3), op, ": ", name,
        " is [", rows.size(0), ", ", rows.size(1), ", ", rows.size(2), "], expected [", tokens, ", ", heads,
        ", ", cache.size(3), "]");
  check(rows.stride(2) == 1 || rows.size(2) == 1, op, ": the last dimension of ", name,
        " must be contiguous");
}

inline void check_caches(const char* op, const Tensor& k_cache, const Tensor& v_cache, int64_t dim) {
  bool same = k_cache.dim() == dim && v_cache.dim() == dim &&
              k_cache.scalar_type() == v_cache.scalar_type() && k_cache.is_cpu() && v_cache.is_cpu() &&
              k_cache.is_contiguous() && v_cache.is_contiguous();
  for (int64_t d = 0; same && d < dim; ++d) same = k_cache.size(d) == v_cache.size(d);
  check(same, op, ": k_cache and v_cache must be contiguous CPU tensors of ", dim,
        " dimensions, equal in shape and type");
}

inline void check_slots(const char* op, const int64_t* slots, int64_t tokens, const Tensor& cache) {
  const int64_t size = cache.size(0) * cache.size(2);
  for (int64_t t = 0; t < tokens; ++t)
    check(slots[t] >= 0 && slots[t] < size, op, ": slot ", slots[t], " of token ", t,
          " lies outside the cache of ", size, " slots");
}

}  // namespace thinktwice

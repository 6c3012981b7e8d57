// The arguments of the op `advance` on either device; its rule: advance.h.
#pragma once

#include <initializer_list>
#include <optional>

#include "advance.h"
#include "common/tensor_utils.h"

namespace thinktwice {

using OptionalTensor = std::optional<Tensor>;

constexpr int64_t kStateRows = 6;  // tokens, positions, draws, left, slots, counts

inline void check_advance(const Tensor& tensor, const char* name, const Tensor& state, ScalarType dtype,
                          std::initializer_list<int64_t> sizes) {
  bool ok = tensor.is_cuda() == state.is_cuda() && tensor.scalar_type() == dtype && tensor.is_contiguous() &&
            tensor.dim() == static_cast<int64_t>(sizes.size()) &&
            (!tensor.is_cuda() || tensor.get_device_index() == state.get_device_index());
  int64_t d = 0;
  for (const int64_t size : sizes) ok = ok && tensor.size(d++) == size;
  check(ok, "advance: ", name, " does not fit the ", state.size(1), " rows of the state");
}

inline Advance describe_advance(const OptionalTensor& drawn, const OptionalTensor& drawn_logps,
                                const OptionalTensor& drawn_entropies, const Tensor& stop_ids,
                                const Tensor& block_tables, int64_t block_size, int64_t spare_slot,
                                Tensor& state, Tensor& context_lens, Tensor& new_tokens, Tensor& new_logps,
                                Tensor& new_entropies) {
  check(state.dim() == 2 && state.size(0) == kStateRows && state.scalar_type() == ScalarType::Long &&
            (state.stride(1) == 1 || state.size(1) == 1),
        "advance: state must be int64 [", kStateRows, ", rows], each row of it contiguous");
  const int64_t rows = state.size(1), steps = new_tokens.size(0);
  check(drawn.has_value() == drawn_logps.has_value() && drawn.has_value() == drawn_entropies.has_value(),
        "advance: what was drawn is given whole or not at all");
  if (drawn) {
    check_advance(*drawn, "drawn", state, ScalarType::Long, {rows});
    check_advance(*drawn_logps, "drawn_logps", state, ScalarType::Float, {rows});
    check_advance(*drawn_entropies, "drawn_entropies", state, ScalarType::Float, {rows});
  }
  check_advance(stop_ids, "stop_ids", state, ScalarType::Long, {stop_ids.numel()});
  check_advance(block_tables, "block_tables", state, ScalarType::Int, {rows, block_tables.size(1)});
  check_advance(context_lens, "context_lens", state, ScalarType::Int, {rows});
  check_advance(new_tokens, "new_tokens", state, ScalarType::Long, {steps, rows});
  check_advance(new_logps, "new_logps", state, ScalarType::Float, {steps, rows});
  check_advance(new_entropies, "new_entropies", state, ScalarType::Float, {steps, rows});
  auto* const first = state.mutable_data_ptr<int64_t>();
  const int64_t stride = state.stride(0);
  return {drawn ? drawn->const_data_ptr<int64_t>() : nullptr,
          drawn ? drawn_logps->const_data_ptr<float>() : nullptr,
          drawn ? drawn_entropies->const_data_ptr<float>() : nullptr,
          stop_ids.const_data_ptr<int64_t>(),
          block_tables.const_data_ptr<int32_t>(),
          rows,
          steps,
          stop_ids.numel(),
          block_tables.size(1),
          block_size,
          spare_slot,
          first,
          first + stride,
          first + 2 * stride,
          first + 3 * stride,
          first + 4 * stride,
          first + 5 * stride,
          context_lens.mutable_data_ptr<int32_t>(),
          new_tokens.mutable_data_ptr<int64_t>(),
          new_logps.mutable_data_ptr<float>(),
          new_entropies.mutable_data_ptr<float>()};
}

}  // namespace thinktwice

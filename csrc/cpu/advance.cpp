// `advance` on the CPU.
#include "advance_op.h"

namespace thinktwice {
namespace {

void advance(OptionalTensor drawn, OptionalTensor drawn_logps, OptionalTensor drawn_entropies,
             Tensor stop_ids, Tensor block_tables, int64_t block_size, int64_t spare_slot, Tensor state,
             Tensor context_lens, Tensor new_tokens, Tensor new_logps, Tensor new_entropies) {
  const Advance work =
      describe_advance(drawn, drawn_logps, drawn_entropies, stop_ids, block_tables, block_size, spare_slot,
                       state, context_lens, new_tokens, new_logps, new_entropies);
  for (int64_t row = 0; row < work.rows; ++row) advance_row(work, row);
}

}  // namespace
}  // namespace thinktwice

STABLE_TORCH_LIBRARY_IMPL(thinktwice, CPU, m) { m.impl("advance", TORCH_BOX(&thinktwice::advance)); }

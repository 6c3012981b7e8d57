// SiLU on its own, by the rule that the gates of an MLP have. float32.
#include <algorithm>
#include <cstring>
#include <vector>

#include "cpu/parallel.h"
#include "tensor_utils.h"

namespace thinktwice {
namespace {

using c10::BFloat16;
using c10::Half;

constexpr int64_t kPart = 8192;  // elements that a task takes

#define THINKTWICE_KERNELS "cpu/gate_kernels.inc"
#include "cpu/for_each_isa.h"
#undef THINKTWICE_KERNELS

Tensor silu(Tensor x) {
  check(x.is_cpu() && x.is_contiguous() && x.scalar_type() == ScalarType::Float,
        "silu: x must be a contiguous float32 CPU tensor");
  const int64_t size = x.numel();
  Tensor out = new_tensor({size}, ScalarType::Float);
  const std::vector<float> ones(kPart, 1.0f);
  const auto* const from = x.const_data_ptr<float>();
  auto* const to = out.mutable_data_ptr<float>();
  parallel_tasks((size + kPart - 1) / kPart, 1, [&](int64_t part) {
    const int64_t i = part * kPart;
    ISA_DISPATCH(gate_row)(from + i, ones.data(), std::min(kPart, size - i), to + i);
  });
  return out;
}

}  // namespace
}  // namespace thinktwice

STABLE_TORCH_LIBRARY_IMPL(thinktwice, CPU, m) { m.impl("silu", TORCH_BOX(&thinktwice::silu)); }

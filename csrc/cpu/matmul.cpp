// Products with packed weights on the CPU, and their packing.
#include "cpu/matmul.h"

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <cstring>
#include <type_traits>

#include "common/parallel.h"
#include "common/tensor_utils.h"

namespace thinktwice {
namespace {

using c10::BFloat16;
using c10::Half;

constexpr int64_t kInputsAtOnce = 256;  // so that a panel's part and its rows' stay in the first-level cache
constexpr int64_t kRowsAtOnce = 256;    // so that their inputs stay in the second-level cache
constexpr int64_t kTaskWork = 1 << 18;  // multiplications worth taking as a task

#define THINKTWICE_KERNELS "cpu/matmul_kernels.inc"
#include "common/for_each_isa.h"
#undef THINKTWICE_KERNELS

void begin_sums(const Rows& rows, int64_t begin, int64_t end, Start start, const float* bias) {
  if (start == Start::kOutput) return;
  const int64_t first = begin * kPanel, bytes = (end - begin) * kPanel * static_cast<int64_t>(sizeof(float));
  for (int64_t r = 0; r < rows.count; ++r) {
    float* const y = rows.y + r * rows.y_stride + first;
    if (start == Start::kBias)
      std::memcpy(y, bias + first, bytes);
    else
      std::memset(y, 0, bytes);
  }
}

Rows part(const Rows& rows, int64_t first, int64_t count) {
  return {rows.x + first * rows.x_stride, rows.x_stride, rows.y + first * rows.y_stride, rows.y_stride,
          count};
}

// Writes the rows of `weight` as outputs first, first + 1, ... of `packed`.
template <typename T>
void pack(const T* weight, int64_t row_stride, int64_t rows, int64_t inputs, T* packed, int64_t first) {
  constexpr int64_t kBlock = 64;
  parallel_tasks((rows + kPanel - 1) / kPanel, 4, [&](int64_t task) {
    const int64_t end = std::min(rows, (task + 1) * kPanel);
    for (int64_t i = 0; i < inputs; i += kBlock)
      for (int64_t r = task * kPanel; r < end; ++r) {
        T* const to = packed + (first + r) / kPanel * inputs * kPanel + (first + r) % kPanel;
        const T* const from = weight + r * row_stride;
        for (int64_t j = i; j < std::min(inputs, i + kBlock); ++j) to[j * kPanel] = from[j];
      }
  });
}

void check_packed(const char* op, const Tensor& packed) {
  const ScalarType type = packed.scalar_type();
  check(packed.is_cpu() && packed.dim() == 3 && packed.size(2) == kPanel && packed.is_contiguous(), op,
        ": packed must be a contiguous CPU tensor [panels, inputs, ", kPanel, "]");
  check(type == ScalarType::Float || type == ScalarType::BFloat16 || type == ScalarType::Half, op, ": type ",
        torch::headeronly::toString(type), " is not one of float32, bfloat16, float16");
}

void pack_weight(Tensor weight, Tensor packed, int64_t first) {
  const char* const op = "pack_weight";
  check_packed(op, packed);
  check(weight.is_cpu() && weight.dim() == 2 && weight.size(1) == packed.size(1) &&
            (weight.stride(1) == 1 || weight.size(1) == 1) && weight.scalar_type() == packed.scalar_type(),
        op, ": weight must be a CPU tensor [outputs, ", packed.size(1), "] of the type of packed");
  check(first >= 0 && first + weight.size(0) <= packed.size(0) * kPanel, op, ": outputs ", first, " to ",
        first + weight.size(0), " lie outside ", packed.size(0), " panels of ", kPanel);
  const auto run = [&](auto zero) {
    using T = decltype(zero);
    pack(static_cast<const T*>(weight.const_data_ptr()), weight.stride(0), weight.size(0), weight.size(1),
         static_cast<T*>(packed.mutable_data_ptr()), first);
  };
  if (weight.element_size() == 4) return run(uint32_t{});
  run(uint16_t{});
}

Tensor packed_linear(Tensor x, Tensor packed, int64_t outputs) {
  const char* const op = "packed_linear";
  check_packed(op, packed);
  check(x.is_cpu() && x.dim() == 2 && x.size(1) == packed.size(1) && x.is_contiguous() &&
            x.scalar_type() == ScalarType::Float,
        op, ": x must be a contiguous float32 CPU tensor [rows, ", packed.size(1), "]");
  check(outputs > 0 && (outputs + kPanel - 1) / kPanel == packed.size(0), op, ": ", packed.size(0),
        " panels do not hold ", outputs, " outputs");
  const int64_t padded = packed.size(0) * kPanel;
  Tensor y = new_tensor({x.size(0), padded}, ScalarType::Float);
  const PackedWeights weights{packed.const_data_ptr(), packed.scalar_type(), outputs, packed.size(1)};
  multiply_in_parallel(weights,
                       {static_cast<const float*>(x.const_data_ptr()), x.size(1),
                        static_cast<float*>(y.mutable_data_ptr()), padded, x.size(0)},
                       Start::kZero, nullptr);
  return torch::stable::narrow(y, 1, 0, outputs);
}

}  // namespace

void multiply(const PackedWeights& weights, const Rows& rows, int64_t begin, int64_t end, Start start,
              const float* bias) {
  begin_sums(rows, begin, end, start, bias);
  const auto add = weights.type == ScalarType::Float      ? ISA_DISPATCH(add_products<float>)
                   : weights.type == ScalarType::BFloat16 ? ISA_DISPATCH(add_products<BFloat16>)
                                                          : ISA_DISPATCH(add_products<Half>);
  for (int64_t r = 0; r < rows.count; r += kRowsAtOnce)
    add(weights, part(rows, r, std::min(kRowsAtOnce, rows.count - r)), begin, end);
}

void multiply_in_parallel(const PackedWeights& weights, const Rows& rows, Start start, const float* bias) {
  const int64_t panels = weights.panels(), blocks = (rows.count + kRowsAtOnce - 1) / kRowsAtOnce;
  // Several tasks per thread even out threads of different speed; each is worth taking.
  const int64_t shares = 8 * static_cast<int64_t>(torch::stable::get_num_threads());
  const int64_t panel_work =
      std::max<int64_t>(1, std::min(rows.count, kRowsAtOnce) * weights.inputs * kPanel);
  const int64_t grain = std::max({int64_t{1}, blocks * panels / shares, kTaskWork / panel_work});
  const int64_t parts = (panels + grain - 1) / grain;
  parallel_tasks(blocks * parts, 1, [&](int64_t task) {
    const int64_t first = task / parts * kRowsAtOnce, begin = task % parts * grain;
    multiply(weights, part(rows, first, std::min(kRowsAtOnce, rows.count - first)), begin,
             std::min(panels, begin + grain), start, bias);
  });
}

}  // namespace thinktwice

STABLE_TORCH_LIBRARY_IMPL(thinktwice, CPU, m) {
  m.impl("pack_weight", TORCH_BOX(&thinktwice::pack_weight));
  m.impl("packed_linear", TORCH_BOX(&thinktwice::packed_linear));
}

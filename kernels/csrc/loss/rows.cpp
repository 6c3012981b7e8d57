// Softmax statistics of rows of logits and their gradient, each in one pass over the logits.
#include "loss/rows.h"

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <optional>
#include <tuple>
#include <type_traits>

#include "common/parallel.h"
#include "common/tensor_utils.h"

namespace thinktwice {
namespace {

using c10::BFloat16;
using c10::Half;

constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();

#define THINKTWICE_KERNELS "loss/rows_kernels.inc"
#include "common/for_each_isa.h"
#undef THINKTWICE_KERNELS

// Beside the double ones: the float kernels of this machine's instruction set.
using thinktwice::block_gradient;
using thinktwice::block_max;
using thinktwice::block_sums;
using thinktwice::narrow;
using thinktwice::widen;

float block_max(const float* values, int n) { return ISA_DISPATCH(block_max)(values, n); }

BlockSums block_sums(const float* values, int n, float shift, float inverse_temperature, bool want_moment) {
  return ISA_DISPATCH(block_sums)(values, n, shift, inverse_temperature, want_moment);
}

template <typename T>
void widen(const T* logits, const float* bias, float softcap, int n, float* values, float* slopes) {
  ISA_DISPATCH(widen<T>)(logits, bias, softcap, n, values, slopes);
}

double block_gradient(const float* values, const float* slopes, int n, const Slopes<float>& g, float* out) {
  return ISA_DISPATCH(block_gradient)(values, slopes, n, g, out);
}

template <typename O>
void narrow(const float* values, int n, O* out) {
  ISA_DISPATCH(narrow<O>)(values, n, out);
}

// One row's logits and how they become a distribution; A is the type it is computed in.
template <typename T, typename A>
struct Row {
  const T* logits;
  int64_t size;
  int64_t target;
  const A* bias;  // null: none
  A softcap;      // 0: none
  double temperature;

  bool has_target() const { return target >= 0 && target < size; }

  // A temperature that makes no distribution gives NaN.
  A inverse_temperature() const { return static_cast<A>(temperature > 0 ? 1 / temperature : kNaN); }

  // The logits after bias and soft cap: themselves, or written to `buffer`.
  const A* values(int64_t start, int n, A* buffer, A* slopes) const {
    if constexpr (std::is_same_v<T, A>)
      if (!bias && softcap == 0) return logits + start;
    widen(logits + start, bias ? bias + start : nullptr, softcap, n, buffer, slopes);
    return buffer;
  }
};

struct RowStatistics {
  double logp, lse, entropy;
};

// The sums with a new shift, `step` / temperature above the old.
void move_shift(BlockSums& sums, double step) {
  const double factor = std::exp(-step);
  const double total = sums.ones + sums.rest;
  sums.moment = factor * (sums.moment - step * total);
  sums.rest = factor * total;
  sums.ones = 0.0;
}

template <typename T, typename A>
RowStatistics row_statistics_of(const Row<T, A>& row, bool want_entropy) {
  constexpr A lowest = -std::numeric_limits<A>::infinity();
  A buffer[kBlock];
  A best = lowest;
  const A inverse = row.inverse_temperature();
  double chosen = kNaN;
  BlockSums sums;
  for (int64_t start = 0; start < row.size; start += kBlock) {
    const int n = static_cast<int>(std::min<int64_t>(kBlock, row.size - start));
    const A* const values = row.values(start, n, buffer, nullptr);
    const A highest = block_max(values, n);
    if (highest > best) {
      if (best != lowest) move_shift(sums, (static_cast<double>(highest) - best) * inverse);
      best = highest;
    }
    const BlockSums part = block_sums(values, n, best == lowest ? A{0} : best, inverse, want_entropy);
    sums.ones += part.ones;
    sums.rest += part.rest;
    sums.moment += part.moment;
    if (row.target >= start && row.target < start + n) chosen = values[row.target - start];
  }
  const double shift = best == lowest ? 0.0 : best;
  const double log_total = std::log1p(sums.ones - 1.0 + sums.rest);
  return {(chosen - shift) / row.temperature - log_total, shift / row.temperature + log_total,
          log_total - sums.moment / (sums.ones + sums.rest)};
}

struct RowFlow {
  double lse, entropy, d_logp, d_entropy;
};

// The gradient at the target, before the soft cap's slope. `others` is the sum over the other tokens: a row's
// gradient adds up to 0, and where p is nearly 1 that gives 1 - p with all its digits.
double target_gradient(double scaled, double temperature, const RowFlow& flow, double others) {
  const double log_p = scaled - flow.lse, p = std::exp(log_p);
  if (p > 0.5) return -others;
  const double entropy_slope = p == 0 || flow.d_entropy == 0 ? 0 : p * (log_p + flow.entropy);
  return (flow.d_logp * (1 - p) - flow.d_entropy * entropy_slope) / temperature;
}

// `out` may be the row itself.
template <typename T, typename A, typename O>
void row_gradient_of(const Row<T, A>& row, const RowFlow& flow, O* out) {
  if (flow.d_logp == 0 && flow.d_entropy == 0) {
    std::fill(out, out + row.size, static_cast<O>(0.0f));
    return;
  }
  A buffer[kBlock], slopes[kBlock], result[kBlock];
  const double d_logp = row.has_target() || flow.d_logp == 0 ? flow.d_logp : kNaN;
  const Slopes<A> g{static_cast<A>(flow.lse * row.temperature), row.inverse_temperature(),
                    static_cast<A>(d_logp / row.temperature),
                    static_cast<A>(flow.d_entropy / row.temperature), static_cast<A>(flow.entropy)};
  const A* const slope = row.softcap == 0 ? nullptr : slopes;
  double others = 0.0, chosen = kNaN, chosen_slope = 1.0;
  for (int64_t start = 0; start < row.size; start += kBlock) {
    const int n = static_cast<int>(std::min<int64_t>(kBlock, row.size - start));
    const A* const values = row.values(start, n, buffer, slopes);
    A* to = result;
    if constexpr (std::is_same_v<A, O>) to = out + start;
    const bool holds_target = row.target >= start && row.target < start + n;
    const int at = holds_target ? static_cast<int>(row.target - start) : n;
    others += block_gradient(values, slope, at, g, to);
    if (holds_target) {
      chosen = values[at];
      if (slope) chosen_slope = slope[at];
      to[at] = 0;  // until all others are known
      others += block_gradient(values + at + 1, slope ? slope + at + 1 : nullptr, n - at - 1, g, to + at + 1);
    }
    if constexpr (!std::is_same_v<A, O>) narrow(to, n, out + start);
  }
  if (!row.has_target()) return;
  const double gradient = target_gradient(chosen / row.temperature, row.temperature, flow, others);
  out[row.target] = static_cast<O>(static_cast<A>(gradient * chosen_slope));
}

// Calls body with a value of the C++ type that `dtype` stands for.
template <typename Body>
void with_floating_type(ScalarType dtype, const char* name, const Body& body) {
  if (dtype == ScalarType::Float) return body(float{});
  if (dtype == ScalarType::BFloat16) return body(BFloat16{});
  if (dtype == ScalarType::Half) return body(Half{});
  check(dtype == ScalarType::Double, name, " is of type ", torch::headeronly::toString(dtype),
        ": pass float32, bfloat16, float16 or float64");
  body(double{});
}

template <typename T>
using Accumulator = std::conditional_t<std::is_same_v<T, double>, double, float>;

void check_matrix(const Tensor& tensor, const char* name) {
  check(tensor.is_cpu() && tensor.dim() == 2 && tensor.size(1) > 0 &&
            (tensor.stride(1) == 1 || tensor.size(1) == 1),
        name, " must be a matrix on the CPU with a contiguous last dimension that is not empty");
}

struct Head {
  const Tensor& targets;
  const std::optional<Tensor>& bias;
  const Tensor& temperature;
  double softcap;
};

void check_head(const Tensor& logits, const Head& head) {
  check_matrix(logits, "logits");
  check_vector(head.targets, "targets", ScalarType::Long, logits.size(0));
  const bool one = head.temperature.dim() == 1 && head.temperature.size(0) == 1;
  check_vector(head.temperature, "temperature", ScalarType::Double, one ? 1 : logits.size(0));
  if (!head.bias) return;
  const bool wide = logits.scalar_type() == ScalarType::Double;
  check_vector(*head.bias, "bias", wide ? ScalarType::Double : ScalarType::Float, logits.size(1));
}

template <typename T>
Row<T, Accumulator<T>> row_of(const Tensor& logits, const Head& head, int64_t i) {
  using A = Accumulator<T>;
  return {static_cast<const T*>(logits.const_data_ptr()) + i * logits.stride(0),
          logits.size(1),
          head.targets.const_data_ptr<int64_t>()[i],
          head.bias ? static_cast<const A*>(head.bias->const_data_ptr()) : nullptr,
          static_cast<A>(head.softcap),
          head.temperature.const_data_ptr<double>()[head.temperature.size(0) == 1 ? 0 : i]};
}

int64_t rows_at_a_time(int64_t size) { return 1 + 16384 / size; }

std::tuple<Tensor, Tensor, Tensor> row_statistics(Tensor logits, Tensor targets, std::optional<Tensor> bias,
                                                  Tensor temperature, double softcap, bool want_entropy) {
  const Head head{targets, bias, temperature, softcap};
  check_head(logits, head);
  const int64_t rows = logits.size(0);
  const ScalarType dtype =
      logits.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  const std::tuple<Tensor, Tensor, Tensor> results{new_tensor({rows}, dtype), new_tensor({rows}, dtype),
                                                   new_tensor({want_entropy ? rows : 0}, dtype)};
  with_floating_type(logits.scalar_type(), "logits", [&](auto zero) {
    using T = decltype(zero);
    using A = Accumulator<T>;
    auto* const logps = static_cast<A*>(std::get<0>(results).mutable_data_ptr());
    auto* const lse = static_cast<A*>(std::get<1>(results).mutable_data_ptr());
    auto* const entropy = static_cast<A*>(std::get<2>(results).mutable_data_ptr());
    parallel_tasks(rows, rows_at_a_time(logits.size(1)), [&](int64_t i) {
      const RowStatistics found = row_statistics_of(row_of<T>(logits, head, i), want_entropy);
      logps[i] = static_cast<A>(found.logp);
      lse[i] = static_cast<A>(found.lse);
      if (want_entropy) entropy[i] = static_cast<A>(found.entropy);
    });
  });
  return results;
}

const double* optional_numbers(const std::optional<Tensor>& numbers, const char* name, int64_t size) {
  if (!numbers) return nullptr;
  check_vector(*numbers, name, ScalarType::Double, size);
  return numbers->const_data_ptr<double>();
}

const int64_t* checked_rows(const std::optional<Tensor>& rows, const Tensor& logits) {
  if (!rows) return nullptr;
  check_vector(*rows, "rows", ScalarType::Long, rows->numel());
  const auto* const indices = rows->const_data_ptr<int64_t>();
  for (int64_t i = 0; i < rows->numel(); ++i)
    check(indices[i] >= (i > 0 ? indices[i - 1] + 1 : 0) && indices[i] < logits.size(0),
          "rows must rise and lie in the ", logits.size(0), " rows of the logits; entry ", i, " is ",
          indices[i]);
  return indices;
}

void row_gradient(Tensor logits, Tensor targets, std::optional<Tensor> bias, Tensor temperature,
                  double softcap, Tensor lse, std::optional<Tensor> entropy, std::optional<Tensor> d_logps,
                  std::optional<Tensor> d_entropy, std::optional<Tensor> rows, Tensor out) {
  const Head head{targets, bias, temperature, softcap};
  check_head(logits, head);
  check_matrix(out, "out");
  const int64_t all = logits.size(0), chosen = rows ? rows->numel() : all;
  check_vector(lse, "lse", ScalarType::Double, all);
  check(!d_entropy || entropy, "d_entropy needs the entropy of every row");
  const double* const entropies = optional_numbers(entropy, "entropy", all);
  const double* const logp_flows = optional_numbers(d_logps, "d_logps", all);
  const double* const entropy_flows = optional_numbers(d_entropy, "d_entropy", all);
  const int64_t* const indices = checked_rows(rows, logits);
  const bool in_place = out.const_data_ptr() == logits.const_data_ptr() && out.size(0) == all &&
                        out.stride(0) == logits.stride(0) && out.scalar_type() == logits.scalar_type();
  check(out.size(1) == logits.size(1) && (in_place || out.size(0) == chosen), "out is [", out.size(0), ", ",
        out.size(1), "], expected [", chosen, ", ", logits.size(1), "] or the logits themselves");
  const auto* const lses = lse.const_data_ptr<double>();
  with_floating_type(logits.scalar_type(), "logits", [&](auto logit) {
    with_floating_type(out.scalar_type(), "out", [&](auto zero) {
      auto* const to = static_cast<decltype(zero)*>(out.mutable_data_ptr());
      parallel_tasks(chosen, rows_at_a_time(logits.size(1)), [&](int64_t i) {
        const int64_t row = indices ? indices[i] : i;
        const RowFlow flow{lses[row], entropies ? entropies[row] : 0.0, logp_flows ? logp_flows[row] : 0.0,
                           entropy_flows ? entropy_flows[row] : 0.0};
        row_gradient_of(row_of<decltype(logit)>(logits, head, row), flow,
                        to + (in_place ? row : i) * out.stride(0));
      });
    });
  });
}

}  // namespace
}  // namespace thinktwice

STABLE_TORCH_LIBRARY_IMPL(thinktwice_loss, CPU, m) {
  m.impl("row_statistics", TORCH_BOX(&thinktwice::row_statistics));
  m.impl("row_gradient", TORCH_BOX(&thinktwice::row_gradient));
}

// The policy-gradient loss with its gradient and metrics, and group-relative advantages.
#include "loss/sequence_loss.h"

#include <algorithm>
#include <cstdint>
#include <optional>
#include <tuple>
#include <vector>

#include "cpu/parallel.h"
#include "loss/advantages.h"
#include "tensor_utils.h"

namespace thinktwice {
namespace {

std::vector<double> as_doubles(const Tensor& tensor, const char* name) {
  const int64_t size = tensor.numel();
  if (tensor.scalar_type() == ScalarType::Double) {
    check_vector(tensor, name, ScalarType::Double, size);
    const auto* const values = tensor.const_data_ptr<double>();
    return {values, values + size};
  }
  check_vector(tensor, name, ScalarType::Float, size);
  const auto* const values = tensor.const_data_ptr<float>();
  return {values, values + size};
}

// In double, but rounded to the type of the rewards.
std::vector<double> advantages_of(const Tensor& rewards, const Tensor& group_ids, int64_t scale_rewards,
                                  double eps) {
  std::vector<double> values = as_doubles(rewards, "rewards");
  check_vector(group_ids, "group_ids", ScalarType::Long, rewards.numel());
  check(scale_rewards >= 0 && scale_rewards <= static_cast<int64_t>(ScaleRewards::kBatch),
        "unknown scale_rewards ", scale_rewards);
  to_advantages(values, group_ids.const_data_ptr<int64_t>(), static_cast<ScaleRewards>(scale_rewards), eps);
  if (rewards.scalar_type() == ScalarType::Float)
    for (double& value : values) value = static_cast<float>(value);
  return values;
}

Tensor group_advantages(Tensor rewards, Tensor group_ids, int64_t scale_rewards, double eps) {
  const std::vector<double> values = advantages_of(rewards, group_ids, scale_rewards, eps);
  Tensor result = new_tensor({rewards.numel()}, rewards.scalar_type());
  if (rewards.scalar_type() == ScalarType::Double)
    std::copy(values.begin(), values.end(), result.mutable_data_ptr<double>());
  else
    std::copy(values.begin(), values.end(), result.mutable_data_ptr<float>());
  return result;
}

const int64_t* checked_offsets(const Tensor& cu_seqlens, int64_t tokens) {
  check_vector(cu_seqlens, "cu_seqlens", ScalarType::Long, cu_seqlens.numel());
  const int64_t last = cu_seqlens.numel() - 1;
  check(last >= 0, "cu_seqlens is empty, expected the offsets of the sequences, from 0");
  const auto* const offsets = cu_seqlens.const_data_ptr<int64_t>();
  check(offsets[0] == 0 && offsets[last] == tokens && std::is_sorted(offsets, offsets + last + 1),
        "cu_seqlens must rise from 0 to the number of tokens, ", tokens);
  return offsets;
}

template <typename V>
const V* optional_vector(const std::optional<Tensor>& tensor, const char* name, ScalarType dtype,
                         int64_t size) {
  if (!tensor) return nullptr;
  check_vector(*tensor, name, dtype, size);
  return static_cast<const V*>(tensor->const_data_ptr());
}

// The tensor arguments of the op beside the advantages.
struct LossTensors {
  const Tensor &logps, &cu_seqlens, &weights;
  const std::optional<Tensor>&old_logps, &ref_logps, &rollout_logps, &entropy, &loss_mask, &guide_mask;
};

using LossResults = std::tuple<Tensor, Tensor, Tensor>;

template <typename F>
LossResults sequence_loss_of(const LossTensors& in, const std::vector<double>& advantages,
                             const LossOptions& options, bool want_gradient) {
  const ScalarType dtype = in.logps.scalar_type();
  const int64_t tokens = in.logps.numel(), sequences = in.cu_seqlens.numel() - 1;
  const int64_t* const offsets = checked_offsets(in.cu_seqlens, tokens);
  check_vector(in.logps, "logps", dtype, tokens);
  check_vector(in.weights, "weights", ScalarType::Double, in.weights.numel());
  const auto given = static_cast<int64_t>(advantages.size());
  check(given == sequences || given == tokens, "there are ", given, " advantages, expected ", sequences,
        " or ", tokens);
  check(in.weights.numel() == sequences || in.weights.numel() == tokens, "there are ", in.weights.numel(),
        " weights, expected ", sequences, " or ", tokens);
  check(options.beta == 0 || in.ref_logps, "beta needs ref_logps");
  check(options.entropy_coef == 0 || in.entropy, "entropy_coef needs the entropy");
  check(options.rollout_is == RolloutIs::kNone || in.rollout_logps, "rollout_is needs rollout_logps");

  const bool want_entropy_gradient = want_gradient && options.entropy_coef != 0;
  Tensor partials = torch::stable::full({sequences, kPartialCount}, 0.0, ScalarType::Double);
  Tensor d_logps = new_tensor({want_gradient ? tokens : 0}, dtype);
  Tensor d_entropy = new_tensor({want_entropy_gradient ? tokens : 0}, dtype);
  const LossBatch<F> batch{
      in.logps.const_data_ptr<F>(),
      optional_vector<F>(in.old_logps, "old_logps", dtype, tokens),
      optional_vector<F>(in.ref_logps, "ref_logps", dtype, tokens),
      optional_vector<F>(in.rollout_logps, "rollout_logps", dtype, tokens),
      optional_vector<F>(in.entropy, "entropy", dtype, tokens),
      optional_vector<bool>(in.loss_mask, "loss_mask", ScalarType::Bool, tokens),
      optional_vector<bool>(in.guide_mask, "guide_mask", ScalarType::Bool, tokens),
      advantages.data(),
      in.weights.const_data_ptr<double>(),
      given == sequences,
      in.weights.numel() == sequences,
      want_gradient ? d_logps.mutable_data_ptr<F>() : nullptr,
      want_entropy_gradient ? d_entropy.mutable_data_ptr<F>() : nullptr,
  };
  auto* const sums = partials.mutable_data_ptr<double>();
  constexpr int64_t kGrainTokens = 2048;
  parallel_tasks(sequences, 1 + kGrainTokens * sequences / std::max<int64_t>(tokens, 1), [&](int64_t s) {
    SequenceLoss<F>(batch, options, s, offsets[s], offsets[s + 1], sums + s * kPartialCount).compute();
  });
  return {partials, d_logps, d_entropy};
}

LossResults sequence_loss(Tensor logps, Tensor advantages, std::optional<Tensor> group_ids,
                          int64_t scale_rewards, double eps, Tensor cu_seqlens, Tensor weights,
                          std::optional<Tensor> old_logps, std::optional<Tensor> ref_logps,
                          std::optional<Tensor> rollout_logps, std::optional<Tensor> entropy,
                          std::optional<Tensor> loss_mask, std::optional<Tensor> guide_mask, Tensor options,
                          bool want_gradient) {
  check_vector(options, "options", ScalarType::Double, kOptionCount);
  const LossOptions decoded(options.const_data_ptr<double>());
  const LossTensors in{logps,         cu_seqlens, weights,   old_logps, ref_logps,
                       rollout_logps, entropy,    loss_mask, guide_mask};
  const std::vector<double> values = group_ids ? advantages_of(advantages, *group_ids, scale_rewards, eps)
                                               : as_doubles(advantages, "advantages");
  if (logps.scalar_type() == ScalarType::Double)
    return sequence_loss_of<double>(in, values, decoded, want_gradient);
  check(logps.scalar_type() == ScalarType::Float, "logps must be float32 or float64");
  return sequence_loss_of<float>(in, values, decoded, want_gradient);
}

}  // namespace
}  // namespace thinktwice

STABLE_TORCH_LIBRARY_IMPL(thinktwice_loss, CPU, m) {
  m.impl("sequence_loss", TORCH_BOX(&thinktwice::sequence_loss));
  m.impl("group_advantages", TORCH_BOX(&thinktwice::group_advantages));
}

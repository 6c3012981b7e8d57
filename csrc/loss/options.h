// The options of the loss as backends/cpu.py passes them: LossOptions.encode() of
// kernels/thinktwice_kernels/options.py, one float64 a field, NaN for None.
#pragma once

#include <cmath>
#include <cstdint>

namespace thinktwice {

// In the order of LossOptions' fields; a test holds them against each other.
enum Option : int64_t {
  kPolicyLoss,
  kImportanceSamplingLevel,
  kEpsilonLow,
  kEpsilonHigh,
  kDualClip,
  kDelta,
  kSapoTemperaturePos,
  kSapoTemperatureNeg,
  kRolloutIs,
  kRolloutIsCap,
  kRolloutIsFloor,
  kGuideFallback,
  kReleasedCodeCompat,
  kBeta,
  kKlEstimator,
  kEntropyCoef,
  kLossAggMode,
  kMaxResponseLength,
  kOptionCount,
};

// The choices, in the order of the Literal types in options.py; likewise held against them.
enum class PolicyLoss { kClip, kCispo, kSapo };
enum class ImportanceSamplingLevel { kToken, kSequence };
enum class KlEstimator { kK1, kK2, kK3 };
enum class RolloutIs { kNone, kTokenTruncate, kTokenMask, kSequenceTruncate, kSequenceMask };
enum class GuideFallback { kMask, kClip };
enum class ScaleRewards { kNone, kGroup, kBatch };

// The columns of what is added up per sequence: PARTIALS of backends/__init__.py, likewise.
enum Partial : int64_t {
  kLoss,
  kTokens,
  kComputed,
  kGuided,
  kWithGradient,
  kClipLow,
  kClipHigh,
  kRatio,
  kApproxKl,
  kKlRef,
  kMismatch,
  kEntropy,
  kRatioMax,
  kPartialCount,
};

struct LossOptions {
  PolicyLoss policy_loss;
  double epsilon_low, epsilon_high;
  double ceiling;  // of the ratio where A < 0, by dual_clip or delta; inf: none
  double sapo_temperature_pos, sapo_temperature_neg;
  RolloutIs rollout_is;
  double rollout_is_cap, rollout_is_floor;
  bool fallback_to_ratio;  // guide_fallback = "clip"
  bool released_code_compat;
  double beta, entropy_coef;
  KlEstimator kl_estimator;
  bool sequence_ratio, sequence_rollout, truncated_rollout;

  explicit LossOptions(const double* values)
      : policy_loss(static_cast<PolicyLoss>(values[kPolicyLoss])),
        epsilon_low(values[kEpsilonLow]),
        epsilon_high(values[kEpsilonHigh]),
        ceiling(std::fmin(values[kDualClip], values[kDelta])),  // at most one is given, and fmin drops NaN
        sapo_temperature_pos(values[kSapoTemperaturePos]),
        sapo_temperature_neg(values[kSapoTemperatureNeg]),
        rollout_is(static_cast<RolloutIs>(values[kRolloutIs])),
        rollout_is_cap(values[kRolloutIsCap]),
        rollout_is_floor(std::isnan(values[kRolloutIsFloor]) ? 0.0 : values[kRolloutIsFloor]),
        fallback_to_ratio(static_cast<GuideFallback>(values[kGuideFallback]) == GuideFallback::kClip),
        released_code_compat(values[kReleasedCodeCompat] != 0),
        beta(values[kBeta]),
        entropy_coef(values[kEntropyCoef]),
        kl_estimator(static_cast<KlEstimator>(values[kKlEstimator])),
        sequence_ratio(static_cast<ImportanceSamplingLevel>(values[kImportanceSamplingLevel]) ==
                       ImportanceSamplingLevel::kSequence),
        sequence_rollout(rollout_is == RolloutIs::kSequenceTruncate ||
                         rollout_is == RolloutIs::kSequenceMask),
        truncated_rollout(rollout_is == RolloutIs::kTokenTruncate ||
                          rollout_is == RolloutIs::kSequenceTruncate) {
    if (std::isnan(ceiling)) ceiling = INFINITY;
  }

  // Whether a token without advantage has no share in the loss.
  bool skips() const { return beta == 0 && entropy_coef == 0; }
};

}  // namespace thinktwice

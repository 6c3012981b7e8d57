// What one token adds to the loss, and its derivative; the definitions stand in
// kernels/thinktwice_kernels/reference/objectives.py. Every NaN that goes in comes out.
#pragma once

#include <algorithm>
#include <cmath>

#include "loss/options.h"

namespace thinktwice {

// An objective and its derivative with respect to logp or, where it depends on a ratio, to the log-ratio.
struct Term {
  double value = 0.0, slope = 0.0;
  bool flows = false;  // whether a gradient comes from it
};

// e^x and e^x - 1, each to full precision.
struct Exponential {
  double value, minus_one;

  explicit Exponential(double x) {
    minus_one = std::expm1(x);
    value = minus_one > -0.5 ? 1.0 + minus_one : std::exp(x);
  }
};

struct Clipped {
  bool low = false, high = false;
};

inline Clipped clipped(double ratio, double advantage, const LossOptions& o) {
  const bool above = ratio > 1.0 + o.epsilon_high;
  if (o.policy_loss == PolicyLoss::kSapo) return {};
  if (o.policy_loss == PolicyLoss::kCispo) return {false, above};
  return {advantage < 0 && ratio < 1.0 - o.epsilon_low, advantage > 0 && above};
}

inline Term clip_objective(double ratio, double advantage, const LossOptions& o) {
  const Clipped at = clipped(ratio, advantage, o);
  if (advantage < 0 && ratio > o.ceiling) return {-advantage * o.ceiling, 0.0, false};
  if (at.low) return {-advantage * (1.0 - o.epsilon_low), 0.0, false};
  if (at.high) return {-advantage * (1.0 + o.epsilon_high), 0.0, false};
  return {-advantage * ratio, -advantage * ratio, true};
}

inline Term cispo_objective(double ratio, double logp, double advantage, const LossOptions& o) {
  const double bound = 1.0 + o.epsilon_high, weight = ratio > bound ? bound : ratio;
  return {-weight * advantage * logp, -weight * advantage, true};
}

inline Term sapo_objective(double log_ratio, double advantage, const LossOptions& o) {
  // From here on the sigmoid is 1 and its slope 0; the ratio would go on to inf, and 0 * inf.
  constexpr double kLimit = 60.0;
  const double tau = advantage > 0 ? o.sapo_temperature_pos : o.sapo_temperature_neg;
  const Exponential ratio(log_ratio > kLimit ? kLimit : log_ratio);
  const double gate = 1.0 / (1.0 + std::exp(-tau * ratio.minus_one));
  const double slope = gate * (1.0 - gate) * 4.0 * ratio.value;
  return {-advantage * gate * 4.0 / tau, -advantage * slope, true};
}

inline Term surrogate(double log_ratio, double ratio, double logp, double advantage, const LossOptions& o) {
  switch (o.policy_loss) {
    case PolicyLoss::kCispo:
      return cispo_objective(ratio, logp, advantage, o);
    case PolicyLoss::kSapo:
      return sapo_objective(log_ratio, advantage, o);
    default:
      return clip_objective(ratio, advantage, o);
  }
}

inline bool too_unlikely_to_shape(double logp, double advantage) {
  return advantage < 0 && std::exp(logp) < 0.01;
}

// Shaping of a guided token.
inline Term shaped(double logp, double advantage, const LossOptions& o) {
  constexpr double kSlope = 2.5e-4, kLimit = 1e-3;
  if (advantage == 0 || too_unlikely_to_shape(logp, advantage)) return {};
  const double p = std::exp(logp);
  const double gamma = o.released_code_compat ? -kLimit : std::clamp(advantage * kSlope, -kLimit, kLimit);
  const double value = -advantage * (p / (p + gamma));
  return {value, value, true};
}

// The constant that a ratio objective is multiplied by.
inline double rollout_weight(double log_weight, const LossOptions& o) {
  const double weight = std::exp(log_weight);
  if (o.truncated_rollout) return std::clamp(weight, o.rollout_is_floor, o.rollout_is_cap);
  return weight < o.rollout_is_floor || weight > o.rollout_is_cap ? 0.0 : weight;
}

inline Term kl_to_reference(double logp, double ref_logp, KlEstimator estimator) {
  const double difference = ref_logp - logp;
  if (estimator == KlEstimator::kK1) return {-difference, 1.0, true};
  if (estimator == KlEstimator::kK2) return {difference * difference / 2.0, -difference, true};
  const double rest = std::expm1(difference);
  return {rest - difference, -rest, true};
}

}  // namespace thinktwice

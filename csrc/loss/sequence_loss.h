// The loss of one sequence, its metrics and its gradient; the definition stands in
// kernels/thinktwice_kernels/reference/loss.py. All arithmetic is in double.
#pragma once

#include <cmath>
#include <cstdint>

#include "loss/objectives.h"
#include "loss/options.h"

namespace thinktwice {

// The inputs of a batch, T tokens of type `F` in S sequences; null pointers: not given, or not wanted.
template <typename F>
struct LossBatch {
  const F *logps, *old_logps, *ref_logps, *rollout_logps, *entropy;  // [T]
  const bool *loss_mask, *guide_mask;                                // [T]
  const double *advantages, *weights;                                // [S] or [T]
  bool advantage_per_sequence, weight_per_sequence;
  F *d_logps, *d_entropy;  // [T], written
};

template <typename F>
class SequenceLoss {
 public:
  // `partials` [kPartialCount] starts at 0.
  SequenceLoss(const LossBatch<F>& batch, const LossOptions& options, int64_t sequence, int64_t begin,
               int64_t end, double* partials)
      : batch_(batch), o_(options), sequence_(sequence), begin_(begin), end_(end), partials_(partials) {}

  void compute() {
    find_flags();
    if (whole()) add_up_ratios();
    for (int64_t t = begin_; t < end_; ++t) add_token(t);
    const bool flows = sequence_flows_ && spreads();
    if (flows) spread_gradient();
    if (!o_.skips())
      partials_[kWithGradient] = partials_[kComputed];
    else if (flows)
      partials_[kWithGradient] += partials_[kComputed] - partials_[kGuided];
  }

 private:
  struct Token {
    bool computed = false, guided = false;
    bool with_ratio = false;  // computed, and not guided or fallen back to the ratio objective
    double logp = 0.0, old_logp = 0.0, advantage = 0.0;

    bool ordinary() const { return computed && !guided; }
  };

  // Whether one token's loss depends on the others of its sequence.
  bool whole() const { return o_.sequence_ratio || o_.sequence_rollout; }

  // Whether the gradient flows through the mean log-ratio of the sequence.
  bool spreads() const { return o_.sequence_ratio && o_.policy_loss != PolicyLoss::kCispo; }

  bool in_loss(int64_t t) const { return !batch_.loss_mask || batch_.loss_mask[t]; }

  double advantage(int64_t t) const {
    return batch_.advantages[batch_.advantage_per_sequence ? sequence_ : t];
  }

  void find_flags() {
    const bool seek_guided = batch_.guide_mask && o_.released_code_compat;
    if (!seek_guided && !(whole() && o_.skips())) return;
    for (int64_t t = begin_; t < end_; ++t) {
      if (!in_loss(t)) continue;
      any_advantage_ |= advantage(t) != 0;
      any_guided_ |= seek_guided && batch_.guide_mask[t];
    }
  }

  // Reads nothing of a token beyond what it is in the loss with, so that the rest may hold inf or NaN.
  Token token(int64_t t) const {
    Token token;
    if (!in_loss(t)) return token;
    token.advantage = advantage(t);
    token.computed = !o_.skips() || (whole() ? any_advantage_ : token.advantage != 0);
    if (!token.computed) return token;
    token.logp = batch_.logps[t];
    token.guided = any_guided_ || (batch_.guide_mask && batch_.guide_mask[t]);
    token.with_ratio =
        !token.guided || (o_.fallback_to_ratio && too_unlikely_to_shape(token.logp, token.advantage));
    if (token.with_ratio) token.old_logp = batch_.old_logps ? batch_.old_logps[t] : token.logp;
    return token;
  }

  void add_up_ratios() {
    double log_ratio = 0.0, log_weight = 0.0;
    for (int64_t t = begin_; t < end_; ++t) {
      const Token now = token(t);
      if (!now.with_ratio) continue;
      ++with_ratio_;
      log_ratio += now.logp - now.old_logp;
      if (o_.sequence_rollout && now.ordinary()) log_weight += now.old_logp - batch_.rollout_logps[t];
    }
    log_ratio_ = with_ratio_ > 0 ? log_ratio / static_cast<double>(with_ratio_) : 0.0;
    ratio_ = std::exp(log_ratio_);
    if (o_.sequence_rollout) rollout_weight_ = rollout_weight(log_weight, o_);
  }

  void add_token(int64_t t) {
    double slope = 0.0, entropy_slope = 0.0;
    if (in_loss(t)) {
      partials_[kTokens] += 1;
      const Token now = token(t);
      if (now.computed) {
        const double weight = batch_.weights[batch_.weight_per_sequence ? sequence_ : t];
        const Term policy = now.with_ratio ? ratio_term(now, t, weight) : shaped_term(now);
        const Term kl = kl_term(now, t);
        double value = policy.value + kl.value;
        slope = weight * (policy.slope + kl.slope);
        if (batch_.entropy) partials_[kEntropy] += batch_.entropy[t];
        if (o_.entropy_coef != 0) {
          value -= o_.entropy_coef * batch_.entropy[t];
          entropy_slope = -o_.entropy_coef * weight;
        }
        partials_[kLoss] += weight * value;
        partials_[kComputed] += 1;
        partials_[kGuided] += now.guided;
      }
    }
    if (batch_.d_logps) batch_.d_logps[t] = static_cast<F>(slope);
    if (batch_.d_entropy) batch_.d_entropy[t] = static_cast<F>(entropy_slope);
  }

  Term shaped_term(const Token& now) {
    const Term term = shaped(now.logp, now.advantage, o_);
    partials_[kWithGradient] += term.flows;
    return term;
  }

  Term kl_term(const Token& now, int64_t t) {
    if (!batch_.ref_logps) return {};
    Term kl = kl_to_reference(now.logp, batch_.ref_logps[t], o_.kl_estimator);
    if (now.ordinary()) partials_[kKlRef] += kl.value;
    if (o_.beta == 0) return {};
    kl.value *= o_.beta;
    kl.slope *= o_.beta;
    return kl;
  }

  // The objective with respect to the token's own logp; a slope that all of the sequence shares is put aside.
  Term ratio_term(const Token& now, int64_t t, double weight) {
    const double difference = now.logp - now.old_logp;
    const Exponential own(difference);
    const double ratio = o_.sequence_ratio ? ratio_ : own.value;
    if (now.ordinary()) add_ratio_metrics(now, t, ratio, own.minus_one - difference);
    const double rollout = now.ordinary() ? rollout_weight_of(now, t) : 1.0;
    if (now.advantage == 0 || rollout == 0) return {};
    Term term = surrogate(o_.sequence_ratio ? log_ratio_ : difference, ratio, now.logp, now.advantage, o_);
    term.value *= rollout;
    // A stopped slope of 0 stays 0 beside a weight of inf.
    term.slope = term.flows ? term.slope * rollout : 0.0;
    if (spreads()) {
      sequence_flows_ |= term.flows;
      sequence_slope_ += weight * term.slope;
      term.slope = 0.0;
    } else {
      partials_[kWithGradient] += term.flows;
    }
    return term;
  }

  double rollout_weight_of(const Token& now, int64_t t) const {
    if (o_.rollout_is == RolloutIs::kNone) return 1.0;
    return o_.sequence_rollout ? rollout_weight_ : rollout_weight(now.old_logp - batch_.rollout_logps[t], o_);
  }

  void add_ratio_metrics(const Token& now, int64_t t, double ratio, double kl) {
    const Clipped at = clipped(ratio, now.advantage, o_);
    partials_[kClipLow] += at.low;
    partials_[kClipHigh] += at.high;
    partials_[kRatio] += ratio;
    partials_[kApproxKl] += kl;
    if (batch_.rollout_logps) partials_[kMismatch] += std::abs(now.old_logp - batch_.rollout_logps[t]);
    double& largest = partials_[kRatioMax];
    if (!std::isnan(largest) && !(ratio <= largest)) largest = ratio;
  }

  void spread_gradient() {
    if (!batch_.d_logps) return;
    const double share = sequence_slope_ / static_cast<double>(with_ratio_);
    for (int64_t t = begin_; t < end_; ++t)
      if (token(t).with_ratio) batch_.d_logps[t] = static_cast<F>(batch_.d_logps[t] + share);
  }

  const LossBatch<F>& batch_;
  const LossOptions& o_;
  const int64_t sequence_, begin_, end_;
  double* const partials_;
  bool any_advantage_ = false, any_guided_ = false;  // only where they matter
  // Of the whole sequence, where they are:
  int64_t with_ratio_ = 0;
  double log_ratio_ = 0.0, ratio_ = 1.0, rollout_weight_ = 1.0;
  bool sequence_flows_ = false;
  double sequence_slope_ = 0.0;
};

}  // namespace thinktwice

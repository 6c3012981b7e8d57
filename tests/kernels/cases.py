"""Options of the loss, each with what makes it matter, for the tests to run through."""

from typing import Any

# Each line: options, and the optional tensors that they need or that make them interesting.
CASES: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "defaults": ({}, ()),
    "clip": ({"epsilon_low": 0.1, "epsilon_high": 0.28}, ("old_logps",)),
    "dual clip": ({"dual_clip": 1.3}, ("old_logps",)),
    "delta": ({"delta": 1.4}, ("old_logps",)),
    "cispo": ({"policy_loss": "cispo", "epsilon_high": 0.5}, ("old_logps",)),
    "sapo": ({"policy_loss": "sapo", "sapo_temperature_pos": 0.8, "sapo_temperature_neg": 1.3}, ("old_logps",)),
    "gspo": ({"importance_sampling_level": "sequence", "epsilon_low": 0.05}, ("old_logps",)),
    "gspo, on policy": ({"importance_sampling_level": "sequence"}, ()),
    "gspo, dual clip": ({"importance_sampling_level": "sequence", "dual_clip": 1.1}, ("old_logps",)),
    "sequence cispo": ({"importance_sampling_level": "sequence", "policy_loss": "cispo"}, ("old_logps",)),
    "sequence sapo": ({"importance_sampling_level": "sequence", "policy_loss": "sapo"}, ("old_logps",)),
    "k1": ({"beta": 0.3, "kl_estimator": "k1"}, ("old_logps", "ref_logps")),
    "k2": ({"beta": 0.3, "kl_estimator": "k2"}, ("old_logps", "ref_logps")),
    "k3": ({"beta": 0.3}, ("old_logps", "ref_logps")),
    "kl as a metric": ({"kl_estimator": "k2"}, ("ref_logps",)),
    "entropy": ({"entropy_coef": 0.2}, ("entropy",)),
    "entropy as a metric": ({}, ("entropy",)),
    "mismatch": ({}, ("rollout_logps",)),
    "token-truncate": ({"rollout_is": "token-truncate", "rollout_is_cap": 1.5}, ("rollout_logps",)),
    "token-mask": (
        {"rollout_is": "token-mask", "rollout_is_cap": 1.5, "rollout_is_floor": 0.5},
        ("old_logps", "rollout_logps"),
    ),
    "sequence-truncate": (
        {"rollout_is": "sequence-truncate", "rollout_is_floor": 0.3},
        ("old_logps", "rollout_logps"),
    ),
    "sequence-mask": ({"rollout_is": "sequence-mask", "rollout_is_cap": 1.2}, ("rollout_logps",)),
    "gspo, sequence-mask": (
        {"rollout_is": "sequence-mask", "importance_sampling_level": "sequence"},
        ("old_logps", "rollout_logps"),
    ),
    "guided": ({"dual_clip": 3.0}, ("guide_mask", "old_logps", "rollout_logps")),
    "guided, corrected": ({"rollout_is": "sequence-truncate"}, ("guide_mask", "old_logps", "rollout_logps")),
    "guided, fallback": ({"guide_fallback": "clip", "dual_clip": 1.5}, ("guide_mask", "old_logps")),
    "guided, fallback, corrected": (
        {"guide_fallback": "clip", "rollout_is": "token-mask", "rollout_is_cap": 0.9},
        ("guide_mask", "old_logps", "rollout_logps"),
    ),
    "guided, released code": ({"released_code_compat": True, "guide_fallback": "clip"}, ("guide_mask", "old_logps")),
    "guided, other numbers": (
        {"shaping_coefficient": 2e-3, "shaping_clamp": 3e-3, "shaping_min_probability": 0.02},
        ("guide_mask", "old_logps"),
    ),
    "guided, with kl": ({"beta": 0.1, "entropy_coef": 0.1}, ("guide_mask", "ref_logps", "entropy")),
    "guided gspo": ({"importance_sampling_level": "sequence"}, ("guide_mask", "old_logps")),
    "normalizer": ({"normalizer": 17}, ("old_logps",)),
}
# Of the public ops, which take dropped tokens out before the kernels see them.
PUBLIC_CASES = CASES | {
    "token-mask, kept": (
        {"rollout_is": "token-mask", "rollout_is_cap": 1.3, "rollout_is_denominator": "kept", "beta": 0.1},
        ("old_logps", "rollout_logps", "ref_logps"),
    ),
    "guided gspo, sequence-mask, kept": (
        {
            "rollout_is": "sequence-mask",
            "rollout_is_cap": 1.2,
            "rollout_is_denominator": "kept",
            "importance_sampling_level": "sequence",
        },
        ("old_logps", "rollout_logps", "guide_mask"),
    ),
}
AGGREGATIONS: list[dict[str, Any]] = [
    {"loss_agg_mode": "token-mean"},
    {"loss_agg_mode": "seq-mean-token-mean"},
    {"loss_agg_mode": "seq-mean-token-sum"},
    {"loss_agg_mode": "seq-mean-token-sum-norm", "max_response_length": 9},
]

"""The published algorithms as arguments of `group_advantages` and `grpo_loss`: plain data.

What belongs to a trainer (sampling, filtering, a teacher) is not here.
"""

from typing import Any, TypedDict


class Preset(TypedDict):
    """Keyword arguments: ``group_advantages(rewards, ids, **preset["group_advantages"])``, and likewise the loss."""

    group_advantages: dict[str, Any]
    grpo_loss: dict[str, Any]


def _preset(scale_rewards: str, **loss: Any) -> Preset:
    return {"group_advantages": {"scale_rewards": scale_rewards}, "grpo_loss": loss}


PRESETS: dict[str, Preset] = {
    # DeepSeekMath, arXiv 2402.03300. Needs `ref_logps`; many leave the KL term out: beta=0.
    "grpo": _preset(
        "group", epsilon_low=0.2, epsilon_high=0.2, beta=0.04, kl_estimator="k3", loss_agg_mode="seq-mean-token-mean"
    ),
    # Dr.GRPO, arXiv 2503.20783. Needs `max_response_length`, the run's limit on a response.
    "dr_grpo": _preset("none", epsilon_low=0.2, epsilon_high=0.2, loss_agg_mode="seq-mean-token-sum-norm"),
    # TRL's loss of this name: the token mean of the batch at hand (the BNPO paper's reward scaling is not part of it).
    "bnpo": _preset("group", epsilon_low=0.2, epsilon_high=0.2, loss_agg_mode="token-mean"),
    # DAPO, arXiv 2503.14476. Dynamic sampling and overlong shaping belong to the trainer.
    "dapo": _preset("group", epsilon_low=0.2, epsilon_high=0.28, loss_agg_mode="token-mean"),
    # MiniMax-M1, arXiv 2506.13585; TRL's recommended bound on the weight, 5, which is 1 + epsilon_high.
    "cispo": _preset("group", policy_loss="cispo", epsilon_high=4.0, loss_agg_mode="token-mean"),
    # GSPO, arXiv 2507.18071, section 5.1.
    "gspo": _preset(
        "group",
        importance_sampling_level="sequence",
        epsilon_low=3e-4,
        epsilon_high=4e-4,
        loss_agg_mode="seq-mean-token-mean",
    ),
    # SAPO, arXiv 2511.20347.
    "sapo": _preset(
        "group",
        policy_loss="sapo",
        sapo_temperature_pos=1.0,
        sapo_temperature_neg=1.05,
        loss_agg_mode="seq-mean-token-mean",
    ),
    # ThinkTwice, arXiv 2604.01591, as its released code trains; the paper's text also has a standard deviation
    # (scale_rewards "group") and a KL term (beta), which its code uses neither of.
    "thinktwice": _preset("none", epsilon_low=0.2, epsilon_high=0.28, dual_clip=3.0, loss_agg_mode="token-mean"),
    # ThinkTuning, arXiv 2508.07616; pass the spliced tokens as `guide_mask`. As the released code computes it: also
    # guide_fallback="clip", released_code_compat=True, and dual_clip=None where nothing is guided.
    "thinktuning": _preset("group", epsilon_low=0.2, epsilon_high=0.2, dual_clip=3.0, loss_agg_mode="token-mean"),
}
"""Name -> arguments. To change one: ``grpo_loss(..., **{**PRESETS["grpo"]["grpo_loss"], "beta": 0.0})``."""

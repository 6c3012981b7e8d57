"""The objective in the words of the ops; needs no torch, since options are checked before that is imported."""

from typing import Any

from thinktwice_fast.config import LOSS_BOUNDS, LossOptions
from thinktwice_fast.thinktuning_options import ThinkTuningOptions

_SHAPING = (
    "shaping_coefficient",
    "shaping_clamp",
    "shaping_min_probability",
    "guide_fallback",
    "released_code_compat",
)


def loss_arguments(
    options: LossOptions, max_response_tokens: int, thinktuning: ThinkTuningOptions, guided: bool
) -> dict[str, Any]:
    """The options as keywords of ``grpo_loss``, without the bounds that the objective does not have.

    ``guided``: there are guided tokens, so that it gets a guide mask.
    """
    arguments: dict[str, Any] = {
        "policy_loss": options.policy_loss,
        "importance_sampling_level": options.importance_sampling_level,
        **{name: getattr(options, name) for name in LOSS_BOUNDS[options.policy_loss]},
        "rollout_is": options.rollout_is,
        "rollout_is_cap": options.rollout_is_cap,
        "rollout_is_floor": options.rollout_is_floor,
        "rollout_is_denominator": options.rollout_is_denominator,
        "beta": options.beta,
        "kl_estimator": options.kl_estimator,
        "entropy_coef": options.entropy_coef,
        "loss_agg_mode": options.loss_agg_mode,
    }
    if options.loss_agg_mode == "seq-mean-token-sum-norm":
        arguments["max_response_length"] = max_response_tokens
    if guided:
        arguments |= {name: getattr(thinktuning, name) for name in _SHAPING}
    elif thinktuning.released_code_compat:
        arguments.pop("dual_clip", None)
    return arguments

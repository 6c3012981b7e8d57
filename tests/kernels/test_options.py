"""What grpo_loss refuses, and that each message names the way out."""

import inspect
from dataclasses import fields
from typing import Any

import pytest
import torch

from tests.kernels.batches import make_batch
from thinktwice_kernels import LossOptions, grpo_loss


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"policy_loss": "ppo"}, "unknown policy_loss 'ppo': choose one of clip, cispo, sapo"),
        ({"importance_sampling_level": "group"}, "choose one of token, sequence"),
        ({"kl_estimator": "k4"}, "choose one of k1, k2, k3"),
        ({"loss_agg_mode": "mean"}, "choose one of token-mean"),
        ({"rollout_is": "truncate"}, "choose one of none, token-truncate"),
        ({"guide_fallback": "drop"}, "choose one of mask, clip"),
        ({"epsilon_low": 1.5}, "from 0 to 1"),
        ({"epsilon_high": float("nan")}, "not negative"),
        ({"dual_clip": 1.0}, "above 1"),
        ({"delta": 1.1}, r"above 1 \+ epsilon_high = 1.2"),
        ({"dual_clip": 3.0, "delta": 4.0}, "set one of them to None"),
        ({"policy_loss": "sapo", "sapo_temperature_pos": 0.0}, "positive"),
        ({"policy_loss": "cispo", "dual_clip": 3.0}, "dual_clip=3.0 has no effect .*leave it at None"),
        ({"policy_loss": "sapo", "delta": 4.0}, "leave it at None"),
        ({"policy_loss": "cispo", "epsilon_low": 0.1}, "leave it at 0.2"),
        ({"policy_loss": "sapo", "epsilon_high": 0.28}, "leave it at 0.2"),
        ({"sapo_temperature_neg": 2.0}, "leave it at 1.05"),
        ({"rollout_is_cap": 3.0}, "leave it at 2.0"),
        ({"rollout_is_floor": 0.5}, "leave it at None"),
        ({"rollout_is": "token-mask", "rollout_is_floor": 5.0}, "from 0 to rollout_is_cap = 2"),
        ({"rollout_is": "token-mask"}, "pass the rollout engine's log-probabilities, or set rollout_is='none'"),
        ({"rollout_is_denominator": "kept"}, "with rollout_is='none': leave it at 'all'"),
        ({"rollout_is": "token-truncate", "rollout_is_denominator": "kept"}, "with rollout_is='token-truncate'"),
        (
            {"rollout_is": "token-mask", "rollout_is_denominator": "kept", "rollout_logps": torch.zeros(5)},
            "the current ones, detached",
        ),
        ({"shaping_clamp": 2.0}, "from 0 to 1"),
        ({"shaping_min_probability": 0.1}, "without guide_mask: leave it at 0.01"),
        ({"released_code_compat": True, "shaping_coefficient": 1e-3}, "with released_code_compat: leave it at 0.00025"),
        ({"guide_fallback": "clip"}, "without guide_mask: leave it at 'mask'"),
        ({"released_code_compat": True}, "without guide_mask: leave it at False"),
        ({"guide_fallback": "clip", "importance_sampling_level": "sequence"}, "importance_sampling_level='token'"),
        ({"beta": 0.1}, "pass them, or set beta=0"),
        ({"kl_estimator": "k1"}, "without ref_logps: leave it at 'k3'"),
        ({"entropy_coef": 0.1}, "return_entropy=True, or set entropy_coef=0"),
        ({"max_response_length": 8}, "leave it at None"),
        ({"loss_agg_mode": "seq-mean-token-sum-norm"}, "pass it as max_response_length"),
        ({"loss_agg_mode": "seq-mean-token-sum-norm", "max_response_length": 0}, "positive number of tokens"),
        ({"normalizer": 0}, "positive count, or None"),
    ],
)
def test_bad_options_are_refused(options: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match) as error:
        grpo_loss(**make_batch([2, 3], 0), **options)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("tensors", "match"),
    [
        ({"logps": torch.zeros(5, 1)}, "one floating-point number per token"),
        ({"logps": torch.zeros(5, dtype=torch.int64)}, "one floating-point number per token"),
        ({"advantages": torch.zeros(3)}, r"one per sequence, \[2\], or one per token, \[5\]"),
        ({"old_logps": torch.zeros(4)}, r"old_logps has shape \[4\]: pass one value per token, \[5\]"),
        ({"loss_mask": torch.zeros(1, 5)}, "loss_mask has shape"),
        ({"cu_seqlens": torch.tensor([0, 2, 4])}, "to the number of tokens, 5: .*ends with 4"),
        ({"cu_seqlens": torch.tensor([1, 2, 5])}, "starts with 1"),
        ({"cu_seqlens": torch.tensor([0, 6, 5])}, "falls in between"),
        ({"cu_seqlens": torch.tensor([0.0, 2.0, 5.0])}, "pass the int32 offsets"),
        ({"cu_seqlens": torch.zeros(0, dtype=torch.int32)}, "pass the int32 offsets"),
    ],
)
def test_bad_tensors_are_refused(tensors: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        grpo_loss(**{**make_batch([2, 3], 0), **tensors})


def test_the_function_and_its_options_agree_on_names_and_defaults() -> None:
    parameters = inspect.signature(grpo_loss).parameters
    for field in fields(LossOptions):
        assert parameters[field.name].default == field.default
        assert parameters[field.name].annotation == field.type

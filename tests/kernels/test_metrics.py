"""combine_metrics: the parts' metrics together are those of the whole."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.kernels.batches import LAYOUTS, make_batch
from tests.kernels.test_loss import split
from thinktwice_kernels import METRICS, combine_metrics, grpo_loss

EVERYTHING = dict.fromkeys(("old_logps", "ref_logps", "rollout_logps", "entropy", "loss_mask", "guide_mask"), True)


@settings(max_examples=40)
@given(
    lengths=LAYOUTS,
    cuts=st.lists(st.integers(0, 3), max_size=2),
    seed=st.integers(0, 10**6),
    options=st.sampled_from(
        [
            {},
            {"beta": 0.1, "rollout_is_denominator": "kept"},
            {"importance_sampling_level": "sequence"},
            {"policy_loss": "cispo", "epsilon_high": 0.5},
        ]
    ),
)
def test_parts_combine_to_the_whole(lengths: list[int], cuts: list[int], seed: int, options: dict[str, Any]) -> None:
    batch = make_batch(lengths, seed, zero_advantages=True, **EVERYTHING)
    options = {"rollout_is": "token-mask", "rollout_is_cap": 1.3, **options}
    whole = grpo_loss(**batch, **options)[1]
    assert whole.keys() == METRICS.keys()
    parts, sizes = [batch], [lengths]
    for cut in cuts:
        at = min(cut, len(sizes[-1]))
        parts[-1:] = split(parts[-1], sizes[-1], at)
        sizes[-1:] = [sizes[-1][:at], sizes[-1][at:]]
    combined = combine_metrics([grpo_loss(**part, **options)[1] for part in parts])
    assert {name: float(value) for name, value in combined.items()} == pytest.approx(
        {name: float(value) for name, value in whole.items()}, rel=1e-12, abs=1e-14
    )
    assert {name: value.dtype for name, value in combined.items()} == {n: v.dtype for n, v in whole.items()}


def test_metrics_without_their_inputs_are_absent() -> None:
    metrics = grpo_loss(**make_batch([2, 3], 0))[1]
    shaping = {"tokens_masked", "tokens_shaped_pos", "tokens_shaped_neg", "shaping_weight_pos", "shaping_weight_neg"}
    corrected = {"tokens_dropped", "rollout_is_mean"}
    assert METRICS.keys() - metrics.keys() == {"kl_ref", "mismatch", "entropy"} | shaping | corrected
    assert combine_metrics([metrics, metrics])["tokens"] == 10


def test_mismatch_leaves_the_drift_of_the_policy_out() -> None:
    batch: dict[str, Any] = {
        "logps": torch.tensor([-1.0, -2.0, -3.0]),
        "advantages": torch.tensor([1.0]),
        "cu_seqlens": torch.tensor([0, 3]),
        "rollout_logps": torch.tensor([-1.25, -2.5, -3.0]),
    }
    assert grpo_loss(**batch)[1]["mismatch"].item() == 0.25
    old = torch.tensor([-1.5, -2.5, -3.5])
    assert grpo_loss(**batch, old_logps=old)[1]["mismatch"].item() == 0.25
    assert grpo_loss(**{**batch, "logps": batch["logps"] - 4}, old_logps=old)[1]["mismatch"].item() == 0.25
    assert grpo_loss(**batch, old_logps=old - 1)[1]["mismatch"].item() == 1.25


def test_a_part_without_tokens_changes_nothing() -> None:
    full, empty = (grpo_loss(**make_batch(lengths, 0, old_logps=True))[1] for lengths in ([2, 3], [0]))
    combined = combine_metrics([empty, full])
    assert all(torch.equal(combined[name], full[name]) for name in full)


def test_what_cannot_be_combined_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one"):
        combine_metrics([])
    parts = [grpo_loss(**make_batch([2], 0, ref_logps=wanted))[1] for wanted in (False, True)]
    with pytest.raises(ValueError, match="same optional tensors"):
        combine_metrics(parts)

"""The loss of sequences on the CPU: its slopes against autograd of the definition, and what it does in float64.

test_loss.py holds both against the formulas, token by token.
"""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.kernels.batches import LAYOUTS, gradients, make_batch
from tests.kernels.cases import CASES
from thinktwice_kernels import reference
from thinktwice_kernels.loss import selected_in_torch, sequence_loss
from thinktwice_kernels.metrics import PARTIALS, totals_of
from thinktwice_kernels.options import LossInputs, LossOptions

SCALES: list[Any] = ["none", "group", "batch", "mean"]
Results = tuple[Tensor, Tensor, Tensor]


def of_case(case: str) -> tuple[dict[str, Any], dict[str, bool]]:
    """The options that the op sees, and what make_batch is to make."""
    given_options, tensors = CASES[case]
    return {k: v for k, v in given_options.items() if k != "normalizer"}, dict.fromkeys(tensors, True)


def inputs_of(batch: dict[str, Any], weights: Tensor) -> LossInputs:
    detached: dict[str, Any] = {
        name: tensor.detach() if isinstance(tensor, Tensor) else tensor for name, tensor in batch.items()
    }
    return LossInputs(**detached, weights=weights)


def run(batch: dict[str, Any], options: dict[str, Any], weights: Tensor, want_gradient: bool = True) -> Results:
    """The totals, and the gradients."""
    partials, *d_tokens = sequence_loss(inputs_of(batch, weights), LossOptions(**options), want_gradient)
    assert partials.shape[1:] == (len(PARTIALS),) and partials.dtype == torch.float64
    return totals_of(partials), d_tokens[0], d_tokens[1]


def partials_of(metrics: dict[str, Tensor], loss: Tensor) -> dict[str, float]:
    """The columns of the sums over all sequences from the reference's metrics."""
    value = {name: float(metric) for name, metric in metrics.items()}
    computed = value["tokens"] - value["tokens_skipped"]
    ordinary = computed - value["tokens_guided"]
    return {
        "loss": float(loss),
        "tokens": value["tokens"],
        "computed": computed,
        "guided": value["tokens_guided"],
        "masked": value.get("tokens_masked", 0.0),
        "shaped_pos": value.get("tokens_shaped_pos", 0.0),
        "shaped_neg": value.get("tokens_shaped_neg", 0.0),
        "dropped": value.get("tokens_dropped", 0.0),
        "with_gradient": value["tokens_with_gradient"],
        "clip_low": value["clip_fraction_low"] * ordinary,
        "clip_high": value["clip_fraction_high"] * ordinary,
        "ratio": value["ratio_mean"] * ordinary,
        "approx_kl": value["approx_kl"] * ordinary,
        "kl_ref": value.get("kl_ref", 0.0) * ordinary,
        "mismatch": value.get("mismatch", 0.0) * ordinary,
        "rollout_is": value.get("rollout_is_mean", 0.0) * ordinary,
        "shaping_pos": value.get("shaping_weight_pos", 0.0) * value.get("tokens_shaped_pos", 0.0),
        "shaping_neg": value.get("shaping_weight_neg", 0.0) * value.get("tokens_shaped_neg", 0.0),
        "entropy": value.get("entropy", 0.0) * computed,
        "ratio_max": value["ratio_max"],
    }


def defined(batch: dict[str, Any], options: dict[str, Any]) -> tuple[dict[str, float], list[Tensor]]:
    """Sums and gradients by the reference in float64, each sequence's terms weighted 1 / its loss tokens."""
    wide = {name: tensor.double().detach() if tensor.is_floating_point() else tensor for name, tensor in batch.items()}
    for name in {"logps", "entropy"} & set(wide):
        wide[name].requires_grad_()
    loss, metrics = reference.grpo_loss(**wide, **options, loss_agg_mode="seq-mean-token-mean", normalizer=1.0)
    return partials_of(metrics, loss.detach()), gradients(loss, wide)


def sequence_weights(batch: dict[str, Any]) -> Tensor:
    mask = batch.get("loss_mask", torch.ones_like(batch["logps"], dtype=torch.bool))
    counts = [int(mask[a:b].sum()) for a, b in zip(batch["cu_seqlens"], batch["cu_seqlens"][1:], strict=False)]
    return 1 / torch.tensor(counts, dtype=torch.float64).clamp(min=1)


def assert_equals_definition(batch: dict[str, Any], options: dict[str, Any], rtol: float, atol: float) -> None:
    totals, d_logps, d_entropy = run(batch, options, sequence_weights(batch))
    want, want_gradients = defined(batch, options)
    assert dict(zip(PARTIALS, totals.tolist(), strict=True)) == pytest.approx(want, rel=1e-10, abs=1e-12)
    assert d_logps.dtype == batch["logps"].dtype
    torch.testing.assert_close(d_logps.double(), want_gradients[0], rtol=rtol, atol=atol)
    if options.get("entropy_coef", 0) != 0:
        torch.testing.assert_close(d_entropy.double(), want_gradients[1], rtol=rtol, atol=atol)
    else:
        assert d_entropy.shape == (0,)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@settings(max_examples=15)
@given(
    lengths=LAYOUTS,
    seed=st.integers(0, 10**6),
    loss_mask=st.booleans(),
    token_advantages=st.booleans(),
    zero_advantages=st.booleans(),
)
def test_equals_the_definition(
    case: str,
    dtype: torch.dtype,
    lengths: list[int],
    seed: int,
    loss_mask: bool,
    token_advantages: bool,
    zero_advantages: bool,
) -> None:
    options, tensors = of_case(case)
    batch = make_batch(
        lengths,
        seed,
        loss_mask=loss_mask,
        token_advantages=token_advantages,
        zero_advantages=zero_advantages,
        **tensors,
    )
    batch = {name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in batch.items()}
    # In fp32 the arithmetic is double and each gradient rounded at most twice, to 6e-8 of its terms.
    rtol, atol = (1e-10, 1e-12) if dtype == torch.float64 else (2.5e-7, 2.5e-7)
    assert_equals_definition(batch, options, rtol, atol)


@pytest.mark.parametrize("case", CASES)
def test_weights_of_selected_tokens(case: str) -> None:
    """Loss and gradient are linear in them, and a token without weight changes no other's term."""
    options, tensors = of_case(case)
    batch = make_batch([4, 0, 3], 5, loss_mask=True, **tensors)
    parsed = LossOptions(**options)
    selected = selected_in_torch(inputs_of(batch, torch.ones(3, dtype=torch.float64)), parsed).inputs

    def weighted(weights: Tensor) -> list[Tensor]:
        partials, *found = sequence_loss(replace(selected, weights=weights), parsed, True, selected=True)
        return [partials[0, 0], *found]

    weights = torch.tensor([1.0, -2.0, 0.5, 3.0, 1.5, -1.0, 2.0], dtype=torch.float64)[: selected.logps.numel()]
    whole, parts = weighted(weights), [weighted(row) for row in weights.diag()]
    for got, *terms in zip(whole, *parts, strict=True):
        torch.testing.assert_close(got, torch.stack(terms).sum(0), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_bad_values_spread_as_the_definition_spreads_them(case: str, bad: float) -> None:
    options, tensors = of_case(case)
    for name in sorted({"logps", "advantages", *tensors} - {"guide_mask"}):
        batch = make_batch([4, 3], 3, **tensors)
        with torch.no_grad():
            batch[name][-1] = bad
        totals, d_logps, _ = run(batch, options, sequence_weights(batch))
        want, want_gradients = defined(batch, options)
        assert totals[0].item() == pytest.approx(want["loss"], rel=1e-10, nan_ok=True), name
        # Beside a number autograd may give NaN, for 0 * inf, and beside NaN the number 0, from clamp. An infinite
        # log-probability has no gradient of the shaping there.
        lost, unknown = d_logps.isnan(), want_gradients[0].isnan()
        known = ~(lost | unknown | (batch["logps"].isinf() & ("guide_mask" in batch)))
        torch.testing.assert_close(d_logps[known], want_gradients[0][known], rtol=1e-10, atol=1e-12)
        if math.isnan(want["loss"]):
            assert torch.equal(lost & unknown, unknown) or not math.isnan(bad), name
        else:
            assert not (lost & ~unknown).any(), name
        assert not d_logps[:4].isnan().any(), "the first sequence holds no bad value"


def test_huge_ratios() -> None:
    for gap in (100.0, 1000.0, -1000.0):
        for policy_loss in ("clip", "cispo", "sapo"):
            options = {"policy_loss": policy_loss, **({"dual_clip": 3.0} if policy_loss == "clip" else {})}
            logps = torch.tensor([-1.0, -1.0], dtype=torch.float64, requires_grad=True)
            batch = {
                "logps": logps,
                "advantages": torch.tensor([1.0, -1.0], dtype=torch.float64),
                "cu_seqlens": torch.tensor([0, 1, 2]),
                "old_logps": logps.detach() - gap,
            }
            totals, d_logps, _ = run(batch, options, torch.ones(2))
            want, want_gradients = defined(batch, options)
            assert totals[0].item() == pytest.approx(want["loss"], rel=1e-12)
            torch.testing.assert_close(d_logps, want_gradients[0], rtol=1e-12, atol=1e-14)
            assert d_logps.isfinite().all()


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_rewards_in_place_of_advantages(scale: Any, dtype: torch.dtype) -> None:
    batch = make_batch([2, 3, 1, 0, 4], 1, old_logps=True)
    rewards, ids = torch.tensor([0.1, 0.7, 0.1, 0.3, 0.1], dtype=dtype), torch.tensor([4, -1, 4, -1, 4])
    batch["advantages"] = reference.group_advantages(rewards, ids, scale_rewards=scale, eps=1e-4)
    want = run(batch, {}, torch.ones(5))
    batch |= {"advantages": None, "rewards": rewards, "group_ids": ids, "scale_rewards": scale, "advantage_eps": 1e-4}
    got = run(batch, {}, torch.ones(5))
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    assert want[0][PARTIALS.index("computed")] == 3


@pytest.mark.parametrize("case", CASES)
def test_what_is_wanted_does_not_change_the_sums(case: str) -> None:
    options, tensors = of_case(case)
    batch = make_batch([700, 0, 1, 1500, 40] * 6, 0, loss_mask=True, **tensors)
    weights = torch.linspace(0.1, 2, 30, dtype=torch.float64)
    both, no_gradient = run(batch, options, weights), run(batch, options, weights, want_gradient=False)
    assert torch.equal(no_gradient[0], both[0]) and no_gradient[1].shape == no_gradient[2].shape == (0,)
    batch["cu_seqlens"] = batch["cu_seqlens"].long()
    assert torch.equal(run(batch, options, weights)[0], both[0])

"""The C++ backend's loss of sequences and its advantages against their definition."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.kernels.batches import LAYOUTS, gradients, make_batch
from tests.kernels.cases import CASES
from thinktwice_kernels import reference
from thinktwice_kernels.backends import PARTIALS, LossInputs, cpu
from thinktwice_kernels.options import LossOptions

SCALES: list[Any] = ["none", "group", "batch"]
Results = tuple[Tensor, Tensor, Tensor]


def of_case(case: str) -> tuple[dict[str, Any], dict[str, bool]]:
    """The options that the backend sees, and what make_batch is to make."""
    given_options, tensors = CASES[case]
    return {k: v for k, v in given_options.items() if k != "normalizer"}, dict.fromkeys(tensors, True)


def run(batch: dict[str, Any], options: dict[str, Any], weights: Tensor, want_gradient: bool = True) -> Results:
    detached: dict[str, Any] = {
        name: tensor.detach() if isinstance(tensor, Tensor) else tensor for name, tensor in batch.items()
    }
    return cpu.sequence_loss(LossInputs(**detached, weights=weights), LossOptions(**options), want_gradient)


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
        "with_gradient": value["tokens_with_gradient"],
        "clip_low": value["clip_fraction_low"] * ordinary,
        "clip_high": value["clip_fraction_high"] * ordinary,
        "ratio": value["ratio_mean"] * ordinary,
        "approx_kl": value["approx_kl"] * ordinary,
        "kl_ref": value.get("kl_ref", 0.0) * ordinary,
        "mismatch": value.get("mismatch", 0.0) * ordinary,
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
    partials, d_logps, d_entropy = run(batch, options, sequence_weights(batch))
    want, want_gradients = defined(batch, options)
    assert partials.shape == (len(batch["cu_seqlens"]) - 1, len(PARTIALS)) and partials.dtype == torch.float64
    totals = [*partials[:, :-1].sum(0).tolist(), max([0.0, *partials[:, -1].tolist()])]
    assert dict(zip(PARTIALS, totals, strict=True)) == pytest.approx(want, rel=1e-10, abs=1e-12)
    assert d_logps.dtype == batch["logps"].dtype
    torch.testing.assert_close(d_logps.double(), want_gradients[0], rtol=rtol, atol=atol)
    if options.get("entropy_coef", 0) != 0:
        torch.testing.assert_close(d_entropy.double(), want_gradients[1], rtol=rtol, atol=atol)
    else:
        assert d_entropy.shape == (0,)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@settings(max_examples=15, deadline=None)
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
def test_weights_may_be_one_per_token(case: str) -> None:
    options, tensors = of_case(case)
    batch = make_batch([4, 0, 3], 5, loss_mask=True, **tensors)
    per_sequence = torch.tensor([0.5, 7.0, -2.0], dtype=torch.float64)
    per_token = per_sequence.repeat_interleave(batch["cu_seqlens"].diff())
    same = zip(run(batch, options, per_sequence), run(batch, options, per_token), strict=True)
    assert all(torch.equal(a, b) for a, b in same)
    # Loss and gradient are linear in the weights, and a token without weight changes no other's term.
    total = [torch.zeros_like(x) for x in run(batch, options, per_token)]
    for t, weight in enumerate(torch.tensor([1.0, -2.0, 0.5, 3.0, 1.5, -1.0, 2.0], dtype=torch.float64)):
        alone = torch.zeros(7, dtype=torch.float64)
        alone[t] = weight
        total = [a + b for a, b in zip(total, run(batch, options, alone), strict=True)]
        per_token[t] = weight
    for got, want in zip(run(batch, options, per_token)[1:], total[1:], strict=True):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)
    loss = run(batch, options, per_token)[0][:, 0]
    torch.testing.assert_close(loss, total[0][:, 0], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("case", CASES)
def test_unread_values_do_not_matter(case: str) -> None:
    options, tensors = of_case(case)
    clean, dirty = (make_batch([4, 3, 5], 3, **tensors) for _ in range(2))
    unread = torch.arange(12) % 3 == 1
    clean["loss_mask"] = dirty["loss_mask"] = ~unread
    with torch.no_grad():
        for i, name in enumerate(sorted({"logps", *tensors} - {"guide_mask"})):
            dirty[name][unread] = [math.nan, math.inf, -math.inf][i % 3]
    results = zip(run(clean, options, torch.ones(3)), run(dirty, options, torch.ones(3)), strict=True)
    assert all(torch.equal(a, b) for a, b in results)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_bad_values_spread_as_the_definition_spreads_them(case: str, bad: float) -> None:
    options, tensors = of_case(case)
    for name in sorted({"logps", "advantages", *tensors} - {"guide_mask"}):
        batch = make_batch([4, 3], 3, **tensors)
        with torch.no_grad():
            batch[name][-1] = bad
        partials, d_logps, _ = run(batch, options, sequence_weights(batch))
        want, want_gradients = defined(batch, options)
        assert partials[:, 0].sum().item() == pytest.approx(want["loss"], rel=1e-10, nan_ok=True), name
        # Beside a number autograd may give NaN, for 0 * inf, and beside NaN the number 0, from clamp.
        lost, unknown = d_logps.isnan(), want_gradients[0].isnan()
        known = ~(lost | unknown)
        torch.testing.assert_close(d_logps[known], want_gradients[0][known], rtol=1e-10, atol=1e-12)
        if math.isnan(want["loss"]):
            assert torch.equal(lost & unknown, unknown) or not math.isnan(bad), name
        else:
            assert not (lost & ~unknown).any(), name
        assert not partials[0].isnan().any(), "the first sequence holds no bad value"


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
            partials, d_logps, _ = run(batch, options, torch.ones(2))
            want, want_gradients = defined(batch, options)
            assert partials[:, 0].sum().item() == pytest.approx(want["loss"], rel=1e-12)
            torch.testing.assert_close(d_logps, want_gradients[0], rtol=1e-12, atol=1e-14)
            assert d_logps.isfinite().all()


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_rewards_in_place_of_advantages(scale: Any, dtype: torch.dtype) -> None:
    batch = make_batch([2, 3, 1, 0, 4], 1, old_logps=True)
    rewards, ids = torch.tensor([0.1, 0.7, 0.1, 0.3, 0.1], dtype=dtype), torch.tensor([4, -1, 4, -1, 4])
    batch["advantages"] = cpu.group_advantages(rewards, ids, scale, 1e-4)
    want = run(batch, {}, torch.ones(5))
    batch |= {"advantages": None, "rewards": rewards, "group_ids": ids, "scale_rewards": scale, "advantage_eps": 1e-4}
    got = run(batch, {}, torch.ones(5))
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    assert want[0][:, PARTIALS.index("computed")].tolist() == [0, 3, 0, 0, 0]


@pytest.mark.parametrize("case", CASES)
def test_threads_and_gradients_do_not_change_the_sums(case: str) -> None:
    options, tensors = of_case(case)
    batch = make_batch([700, 0, 1, 1500, 40] * 6, 0, loss_mask=True, **tensors)
    weights = torch.linspace(0.1, 2, 30, dtype=torch.float64)
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    several = run(batch, options, weights)
    torch.set_num_threads(1)
    one, no_gradient = run(batch, options, weights), run(batch, options, weights, want_gradient=False)
    torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(several, one, strict=True))
    assert torch.equal(no_gradient[0], one[0]) and no_gradient[1].shape == no_gradient[2].shape == (0,)
    batch["cu_seqlens"] = batch["cu_seqlens"].long()
    assert torch.equal(run(batch, options, weights)[0], one[0])


def test_bad_arguments_are_one_clear_line() -> None:
    batch = make_batch([2, 3], 0)
    with pytest.raises(RuntimeError, match="cu_seqlens must rise from 0 to the number of tokens, 5"):
        run({**batch, "cu_seqlens": torch.tensor([0, 3, 2, 5])}, {}, torch.ones(3))
    with pytest.raises(RuntimeError, match="there are 3 advantages, expected 2 or 5"):
        run({**batch, "advantages": torch.ones(3)}, {}, torch.ones(2))
    with pytest.raises(RuntimeError, match="there are 4 weights, expected 2 or 5"):
        run(batch, {}, torch.ones(4))
    with pytest.raises(RuntimeError, match="beta needs ref_logps"):
        run(batch, {"beta": 0.1}, torch.ones(2))


finite = st.floats(-100, 100, allow_nan=False, width=32)


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@settings(max_examples=60, deadline=None)
@given(
    rows=st.lists(st.tuples(finite, st.sampled_from([-(2**40), -1, 0, 3, 2**40])), max_size=24),
    eps=st.sampled_from([1e-6, 0.5]),
)
def test_advantages_equal_the_definition(
    scale: Any, dtype: torch.dtype, rows: list[tuple[float, int]], eps: float
) -> None:
    rewards = torch.tensor([r for r, _ in rows], dtype=dtype)
    ids = torch.tensor([i for _, i in rows], dtype=torch.int64)
    got = cpu.group_advantages(rewards, ids, scale, eps)
    assert got.dtype == dtype
    want = reference.group_advantages(rewards.double(), ids, scale_rewards=scale, eps=eps).to(dtype)
    torch.testing.assert_close(got, want, rtol=1e-6 if dtype == torch.float32 else 1e-10, atol=1e-10)


@pytest.mark.parametrize("scale", SCALES)
def test_equal_rewards_give_exactly_zero_and_nan_stays_in_its_group(scale: Any) -> None:
    rewards = torch.tensor([1e6 + 0.1] * 7 + [0.1, 0.4, 1.0], dtype=torch.float64)
    ids = torch.tensor([5] * 7 + [2, 2, 9])
    advantages = cpu.group_advantages(rewards, ids, scale, 1e-6)
    assert not advantages[:7].any() and advantages[9] == 0 and advantages[7] < 0 < advantages[8]
    rewards[2] = math.nan
    advantages = cpu.group_advantages(rewards, ids, scale, 1e-6)
    assert advantages[:7].isnan().all() and (scale == "batch" or not advantages[7:].isnan().any())

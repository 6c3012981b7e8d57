"""The Triton kernels in Triton's interpreter, against the reference in float64.

Triton looks at TRITON_INTERPRET when it is imported, so this file is skipped without it, and test_aot.py runs it in a
process that has it. Blocks are small here, so that small inputs take several steps and several programs.
"""

import math
import os
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs TRITON_INTERPRET=1", allow_module_level=True)

from tests.kernels.batches import LAYOUTS, gradients, make_batch
from tests.kernels.cases import AGGREGATIONS, CASES
from tests.kernels.interpreter import patch_language_once, round_bfloat16_to_nearest
from tests.kernels.shaping import Options, check_released_code, check_tables, check_unguided
from thinktwice_kernels import launch, reference
from thinktwice_kernels.launch import accumulation_dtype
from thinktwice_kernels.metrics import metrics_of, totals_of
from thinktwice_kernels.options import LossInputs, LossOptions, Selection, loss_weights, select_tokens_in_torch
from thinktwice_kernels.rows import Head
from thinktwice_kernels.triton.advantages import group_advantages_in_triton
from thinktwice_kernels.triton.loss import sequence_loss_in_triton
from thinktwice_kernels.triton.rows import row_gradient_in_triton, row_statistics_in_triton
from thinktwice_kernels.triton.scale import scale_in_triton
from thinktwice_kernels.triton.selection import select_tokens_in_triton

patch_language_once()
round_bfloat16_to_nearest()
ROWS = 5
SPLIT = pytest.mark.parametrize("processors", [1, 132], ids=["a program to a row", "several programs to a row"])
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 2e-6}


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("row_statistics", "row_gradient", "scale"):
        monkeypatch.setitem(launch.SHAPES, name, launch.Shape(num_warps=1, vectors=1))
    for name in ("sequence_loss", "group_advantages", "select_tokens"):
        monkeypatch.setitem(launch.SHAPES, name, launch.Shape(num_warps=1, block=4))


@pytest.fixture(autouse=True)
def poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """New tensors hold NaN until something is written to them."""

    def poisoned(allocate: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def allocate_nan(*args: Any, **kwargs: Any) -> Tensor:
            tensor = allocate(*args, **kwargs)
            return tensor.fill_(math.nan) if tensor.is_floating_point() else tensor

        return allocate_nan

    for name in ("empty", "empty_like"):
        monkeypatch.setattr(torch, name, poisoned(getattr(torch, name)))


@pytest.fixture
def set_processors(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    return lambda count: monkeypatch.setattr(launch, "processors", lambda _: count)


def logits_of(size: int, dtype: torch.dtype, scale: float = 3.0, rows: int = ROWS) -> Tensor:
    return (torch.randn(rows, size, dtype=torch.float64, generator=torch.Generator().manual_seed(size)) * scale).to(
        dtype
    )


def head_of(size: int, plain: bool) -> Head:
    if plain:
        return Head(temperature=0.7)
    return Head(torch.linspace(-1, 1, size).bfloat16(), torch.tensor([0.5, 1.0, 1.5, 2.0, 0.9]), 4.0)


def expected_rows(
    logits: Tensor, targets: Tensor, head: Head, d_logps: Tensor, d_entropy: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Log-probabilities, log-sum-exp, entropy and the gradient of the logits, in float64."""
    leaf = logits.detach().double().clone().requires_grad_()
    values = leaf if head.bias is None else leaf + head.bias.double()
    if head.softcap is not None:
        values = head.softcap * torch.tanh(values / head.softcap)
    tau = head.temperature.double() if isinstance(head.temperature, Tensor) else head.temperature
    logps, entropy = reference.token_logprobs(values, targets, temperature=tau, return_entropy=True)
    lse = (values / (tau[:, None] if isinstance(tau, Tensor) else tau)).logsumexp(-1)
    (gradient,) = torch.autograd.grad((logps * d_logps.double() + entropy * d_entropy.double()).sum(), leaf)
    return logps.detach(), lse.detach(), entropy.detach(), gradient


def error(found: Tensor | None, expected: Tensor) -> float:
    assert found is not None
    return float((found.double() - expected).norm() / expected.norm())


@pytest.mark.parametrize(("size", "processors"), [(7, 1), (33, 1), (300, 1), (300, 132)])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("plain", [True, False], ids=["plain", "bias, temperatures, soft cap"])
def test_rows(
    plain: bool, dtype: torch.dtype, size: int, processors: int, set_processors: Callable[[int], None]
) -> None:
    set_processors(processors)
    logits, targets, head = logits_of(size, dtype), torch.arange(ROWS), head_of(size, plain)
    kind = accumulation_dtype(logits)
    d_logps, d_entropy = torch.linspace(-1, 2, ROWS, dtype=kind), torch.linspace(1, -1, ROWS, dtype=kind)
    expected = expected_rows(logits, targets, head, d_logps, d_entropy)
    logps, lse, entropy = row_statistics_in_triton(logits, targets, head, True)
    out = torch.empty_like(logits, dtype=kind)
    row_gradient_in_triton(logits, targets, head, lse, entropy, d_logps, d_entropy, None, out)
    for found, value in zip((logps, lse, entropy, out), expected, strict=True):
        assert error(found, value) < TOLERANCE[dtype]
    assert row_statistics_in_triton(logits, targets, head, False)[2] is None


@pytest.mark.parametrize("given", [(True, False), (False, True)], ids=["logps", "entropy"])
def test_one_incoming_gradient(given: tuple[bool, bool]) -> None:
    logits, targets = logits_of(33, torch.float64), torch.arange(ROWS)
    both = torch.linspace(1, 2, ROWS).double() * given[0], torch.linspace(1, -2, ROWS).double() * given[1]
    *_, expected = expected_rows(logits, targets, Head(), *both)
    _, lse, entropy = row_statistics_in_triton(logits, targets, Head(), True)
    d_logps, d_entropy = (x if there else None for x, there in zip(both, given, strict=True))
    out = torch.empty_like(logits)
    row_gradient_in_triton(logits, targets, Head(), lse, entropy, d_logps, d_entropy, None, out)
    assert error(out, expected) < 1e-12


@pytest.mark.parametrize("where", ["all", "some", "in place", "all in place"])
def test_rows_that_have_a_gradient(where: str) -> None:
    dtype = torch.float64 if where.endswith("place") else torch.float32
    wide = torch.full((ROWS, 400), 7.0, dtype=dtype)
    wide[:, :300] = logits_of(300, dtype)
    logits, targets = wide[:, :300], torch.arange(ROWS)  # a row stride above V
    d_logps = torch.tensor([1.0, 0, -2, 3, 0], dtype=dtype)
    d_entropy = torch.tensor([0.0, 0, 1, 2, 0], dtype=dtype)
    *_, expected = expected_rows(logits, targets, Head(), d_logps, d_entropy)
    _, lse, entropy = row_statistics_in_triton(logits, targets, Head(), True)
    logits[1] = math.nan  # is not read
    lse[1] = math.nan
    before = logits.clone()
    rows = None if where.startswith("all") else torch.tensor([1, 2, 3])
    out = logits if where.endswith("place") else torch.empty(ROWS if rows is None else 3, 300).bfloat16()
    row_gradient_in_triton(logits, targets, Head(), lse, entropy, d_logps, d_entropy, rows, out)
    found = out[rows] if where == "in place" else out
    assert error(found, expected if rows is None else expected[rows]) < (1e-12 if out is logits else 4e-3)
    assert found[0 if rows is not None else 1].tolist() == [0.0] * 300
    assert (wide[:, 300:] == 7).all()
    if where == "in place":
        assert torch.equal(out[[0, 4]], before[[0, 4]])


@SPLIT
def test_infinities_and_nan(processors: int, set_processors: Callable[[int], None]) -> None:
    set_processors(processors)
    logits = logits_of(300, torch.float32, rows=6)
    logits[0, 7], logits[1, 200] = math.nan, math.inf
    logits[2, :299] = -math.inf
    logits[3, ::2] = -math.inf
    logits[4] = -math.inf
    targets = torch.tensor([0, 0, 299, 2, 0, 3])
    found = row_statistics_in_triton(logits, targets, Head(), True)
    logps, lse, entropy = found
    assert entropy is not None
    for row in (0, 1):
        assert all(math.isnan(x[row]) for x in (logps, lse, entropy))
    assert (logps[2], entropy[2]) == (0, 0)
    assert logps[3] == -math.inf and math.isnan(logps[4])
    out, ones = torch.empty_like(logits), torch.ones(6)
    row_gradient_in_triton(logits, targets, Head(), lse, entropy, ones, ones, None, out)
    assert out[:2].isnan().all()
    assert torch.equal(out[2], torch.zeros(300))
    *_, expected = expected_rows(logits[[3, 5]], targets[[3, 5]], Head(), ones[:2], ones[:2])
    # autograd makes NaN of -inf's entropy
    drawn = logits[[3, 5]] > -math.inf
    drawn[0, 2] = False
    assert error(out[[3, 5]][drawn], expected[drawn]) < 2e-6
    assert (out[3, 4::2] == 0).all() and out[3, 2] == 1


@SPLIT
def test_a_target_out_of_range_is_nan(processors: int, set_processors: Callable[[int], None]) -> None:
    set_processors(processors)
    logits, targets = logits_of(300, torch.float32, rows=4), torch.tensor([-1, 300, 2**40, 3])
    logps, lse, _ = row_statistics_in_triton(logits, targets, Head(), False)
    assert logps.isnan().tolist() == [True, True, True, False]
    assert not lse.isnan().any()
    out = torch.empty_like(logits)
    row_gradient_in_triton(logits, targets, Head(), lse, None, torch.tensor([1.0, 0, 1, 1]), None, None, out)
    assert out.isnan().any(1).tolist() == [True, False, True, False]


def test_large_logits_keep_their_differences() -> None:
    logits = logits_of(300, torch.float32) + 5000
    expected = expected_rows(logits, torch.arange(ROWS), Head(temperature=0.7), torch.ones(ROWS), torch.zeros(ROWS))
    logps, _, entropy = row_statistics_in_triton(logits, torch.arange(ROWS), Head(temperature=0.7), True)
    assert error(logps, expected[0]) < 2e-6
    assert error(entropy, expected[2]) < 2e-6


@pytest.mark.parametrize("rows", [0, 1])
def test_few_rows(rows: int) -> None:
    logits, targets = logits_of(7, torch.float32, rows=rows), torch.zeros(rows).long()
    ones = torch.ones(rows)
    logps, lse, entropy = row_statistics_in_triton(logits, targets, Head(), True)
    out = torch.empty_like(logits)
    row_gradient_in_triton(logits, targets, Head(), lse, entropy, ones, ones, None, out)
    expected = expected_rows(logits, targets, Head(), ones, ones)
    assert torch.allclose(logps.double(), expected[0]) and torch.allclose(out.double(), expected[3], atol=1e-6)
    assert logps.shape == lse.shape == (rows,)


def inputs_of(batch: dict[str, Any], options: LossOptions, normalizer: float | None = None, **more: Any) -> LossInputs:
    values: dict[str, Any] = {"advantages": None} | batch | more
    tensors: dict[str, Any] = {
        name: value.detach() if isinstance(value, Tensor) else value for name, value in values.items()
    }
    logps = tensors["logps"]
    weights = loss_weights(tensors["cu_seqlens"], tensors.get("loss_mask"), options, normalizer, logps)
    return LossInputs(weights=weights, **tensors)


def check_loss(batch: dict[str, Any], options: dict[str, Any], rtol: float = 1e-10, **more: Any) -> None:
    """`sequence_loss` against the reference: loss, metrics and both gradients."""
    options = dict(options)
    normalizer = options.pop("normalizer", None)
    loss, metrics = reference.grpo_loss(**({"advantages": None} | batch), **options, normalizer=normalizer, **more)
    parsed = LossOptions(**options)
    partials, *found_gradients = sequence_loss_in_triton(inputs_of(batch, parsed, normalizer, **more), parsed, True)
    totals = totals_of(partials)
    found = metrics_of(totals, torch.float64, set())
    torch.testing.assert_close(totals[0], loss.detach().double(), rtol=rtol, atol=rtol, equal_nan=True)
    for name, value in metrics.items():
        torch.testing.assert_close(
            found[name].double(),
            value.double(),
            rtol=rtol,
            atol=rtol,
            equal_nan=True,
            msg=name,
        )
    expected = gradients(loss, batch)
    assert (found_gradients[1].numel() > 0) == (parsed.entropy_coef != 0 and batch["logps"].numel() > 0)
    for gradient, value in zip(found_gradients, expected, strict=False):
        if gradient.numel():
            torch.testing.assert_close(gradient, value, rtol=rtol, atol=rtol)


@pytest.mark.parametrize("token_level", [False, True], ids=["advantages of sequences", "of tokens, with mask"])
@pytest.mark.parametrize("case", CASES)
def test_every_option_of_the_loss(case: str, token_level: bool) -> None:
    options, tensors = CASES[case]
    wanted = dict.fromkeys(tensors, True) | {"loss_mask": token_level, "token_advantages": token_level}
    check_loss(make_batch([3, 0, 9, 1], 7, zero_advantages=True, **wanted), options)


@pytest.mark.parametrize("case", ["clip", "k3", "gspo", "guided, released code"])
def test_the_loss_in_fp32(case: str) -> None:
    options, tensors = CASES[case]
    batch = make_batch([3, 9, 1], 7, **dict.fromkeys(tensors, True))
    batch = {k: v.detach().float() if v.is_floating_point() else v for k, v in batch.items()}
    batch["logps"].requires_grad_()
    check_loss(batch, options, rtol=5e-6)


@pytest.mark.parametrize("aggregation", AGGREGATIONS, ids=str)
def test_every_aggregation(aggregation: dict[str, Any]) -> None:
    check_loss(make_batch([3, 0, 6], 5, old_logps=True, loss_mask=True), aggregation)


@settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(LAYOUTS, st.sampled_from(sorted(CASES)), st.integers(0, 99))
def test_any_layout(lengths: list[int], case: str, seed: int) -> None:
    options, tensors = CASES[case]
    batch = make_batch(lengths, seed, loss_mask=seed % 2 == 0, **dict.fromkeys(tensors, True))
    check_loss(batch, options)


def test_guided_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(launch.SHAPES, "sequence_loss", launch.Shape(num_warps=1, block=8192))

    def loss_of(batch: dict[str, Any], options: Options) -> list[Tensor]:
        parsed = LossOptions(**{name: value for name, value in options.items() if name != "normalizer"})
        partials, d_logps, _ = sequence_loss_in_triton(
            inputs_of(batch, parsed, options.get("normalizer")), parsed, True
        )
        return [totals_of(partials)[0], d_logps]

    def gradient(batch: dict[str, Any], options: Options) -> Tensor:
        return loss_of(batch, options)[1]

    check_tables(gradient)
    check_released_code(gradient, exp=lambda x: torch.from_numpy(np.exp(x.numpy())))
    check_unguided(loss_of, make_batch([4, 0, 9, 6], 8, old_logps=True, rollout_logps=True, loss_mask=True))


def test_weights_of_tokens() -> None:
    batch = make_batch([3, 4], 5, old_logps=True)
    options = LossOptions()
    inputs = inputs_of(batch, options)
    spread = LossInputs(**(vars(inputs) | {"weights": inputs.weights.repeat_interleave(torch.tensor([3, 4]))}))
    once, again = (sequence_loss_in_triton(x, options, True) for x in (inputs, spread))
    assert torch.equal(once[0], again[0]) and torch.equal(once[1], again[1])


def test_without_gradient() -> None:
    batch, options = make_batch([3], 5, entropy=True), LossOptions(entropy_coef=0.1)
    inputs = inputs_of(batch, options)
    partials, d_logps, d_entropy = sequence_loss_in_triton(inputs, options, False)
    assert d_logps.shape == d_entropy.shape == (0,)
    assert torch.equal(partials, sequence_loss_in_triton(inputs, options, True)[0])


@pytest.mark.parametrize("lengths", [[], [0], [1], [0, 0]], ids=str)
def test_next_to_nothing(lengths: list[int]) -> None:
    check_loss(make_batch(lengths, 3, old_logps=True, ref_logps=True), {"beta": 0.1})


@pytest.mark.parametrize("case", ["clip", "gspo"])
def test_a_long_sequence(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(launch.SHAPES, "sequence_loss", launch.Shape(num_warps=1, block=8192))
    check_loss(make_batch([65_537, 2], 3, old_logps=True), CASES[case][0])


EVERYTHING = ("old_logps", "ref_logps", "rollout_logps", "entropy")


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("case", ["k3", "gspo, sequence-mask", "token-mask", "sapo", "cispo"])
def test_skipped_tokens_may_hold_anything(case: str, bad: float) -> None:
    batch = make_batch([3, 6], 7, loss_mask=True, **dict.fromkeys(EVERYTHING, True))
    options = LossOptions(**CASES[case][0])
    clean = sequence_loss_in_triton(inputs_of(batch, options), options, True)
    assert not batch["loss_mask"].all()
    for name in ("logps", *EVERYTHING):
        batch[name] = batch[name].detach().masked_fill(~batch["loss_mask"], bad)
    spoilt = sequence_loss_in_triton(inputs_of(batch, options), options, True)
    assert all(torch.equal(x, y) for x, y in zip(clean, spoilt, strict=True))
    assert not any(x.isnan().any() for x in clean)


@pytest.mark.parametrize(
    ("case", "name"),
    [
        ("clip", "logps"),
        ("clip", "old_logps"),
        ("dual clip", "advantages"),
        ("gspo", "logps"),
        ("sapo", "old_logps"),
        ("cispo", "logps"),
        ("k3", "ref_logps"),
        ("entropy", "entropy"),
        ("token-truncate", "rollout_logps"),
        ("sequence-mask", "rollout_logps"),
        ("guided", "logps"),
    ],
)
def test_nan_comes_out_as_nan(case: str, name: str) -> None:
    options, tensors = CASES[case]
    batch = make_batch([3, 6], 7, **dict.fromkeys(tensors, True))
    batch[name] = batch[name].detach().clone()
    batch[name][1] = math.nan
    parsed = LossOptions(**options)
    totals = totals_of(sequence_loss_in_triton(inputs_of(batch, parsed), parsed, True)[0])
    assert math.isnan(totals[0])
    batch["logps"].requires_grad_()
    metrics = reference.grpo_loss(**batch, **options)[1]
    found = metrics_of(totals, torch.float64, set())
    assert {n for n in metrics if math.isnan(found[n])} == {n for n in metrics if math.isnan(metrics[n])}


def check_selection(batch: dict[str, Any], options: LossOptions) -> Selection:
    """`select_tokens` against plain torch, to the last bit."""
    inputs = inputs_of(batch, options)
    tokens = inputs.logps.numel()
    found = select_tokens_in_triton(inputs, tokens, options)
    want = select_tokens_in_torch(inputs, tokens, options)
    assert (found.everything, found.in_loss, found.borders) == (want.everything, want.in_loss, want.borders)
    assert torch.equal(found.rows, want.rows)
    for name, expected in vars(want.inputs).items():
        got = getattr(found.inputs, name)
        if isinstance(expected, Tensor):
            torch.testing.assert_close(got, expected, rtol=0, atol=0, equal_nan=True, msg=name)
        else:
            assert got == expected, name
    return found


SELECTING = ("defaults", "gspo", "k3", "sequence-mask", "guided", "guided, released code", "guided gspo", "entropy")


@pytest.mark.parametrize("token_level", [False, True], ids=["advantages of sequences", "of tokens"])
@pytest.mark.parametrize("case", SELECTING)
@settings(max_examples=6, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(LAYOUTS, st.integers(0, 99), st.booleans())
def test_the_computed_tokens(case: str, token_level: bool, lengths: list[int], seed: int, masked: bool) -> None:
    options, tensors = CASES[case]
    wanted = {**dict.fromkeys(tensors, True), "token_advantages": token_level, "zero_advantages": seed % 3 > 0}
    check_selection(make_batch([*lengths, 6], seed, loss_mask=masked, **wanted), LossOptions(**options))


def test_which_tokens_are_computed() -> None:
    batch = make_batch([3, 4, 2], 5, old_logps=True, token_advantages=True)
    batch["advantages"] = torch.tensor([0, 1, math.nan, 0, -0.0, 0, 0, 2, 0], dtype=torch.float64)
    assert check_selection(batch, LossOptions()).rows.tolist() == [1, 2, 7]
    assert check_selection(batch, LossOptions(importance_sampling_level="sequence")).rows.tolist() == [0, 1, 2, 7, 8]
    assert check_selection(batch, LossOptions(entropy_coef=0.1)).everything
    batch["loss_mask"] = torch.arange(9) != 7
    assert check_selection(batch, LossOptions(importance_sampling_level="sequence")).rows.tolist() == [0, 1, 2]
    assert int(check_selection(batch, LossOptions(entropy_coef=0.1)).in_loss) == 8
    batch["loss_mask"] = torch.zeros(9, dtype=torch.bool)
    assert check_selection(batch, LossOptions()).rows.tolist() == []
    for lengths in ([], [0], [0, 0]):
        assert check_selection(make_batch(lengths, 5, old_logps=True, loss_mask=True), LossOptions()).everything


@pytest.mark.parametrize("size", [0, 1, 127, 128, 512, 515])  # 128 fp32 numbers a block
@pytest.mark.parametrize(
    ("dtype", "out_dtype"),
    [
        *((torch.float32, out) for out in (torch.float32, torch.bfloat16, torch.float16)),
        *((torch.float64, out) for out in (torch.float64, torch.float32, torch.float16)),
        (torch.bfloat16, torch.bfloat16),
    ],
    ids=str,
)
def test_scaling_rounds_as_torch_does(dtype: torch.dtype, out_dtype: torch.dtype, size: int) -> None:
    values = logits_of(size, dtype, rows=1)
    values[0, :5] = torch.tensor([math.nan, math.inf, -math.inf, 3e38, 1e-6])[:size]
    by = torch.tensor(-1 / 3, dtype=accumulation_dtype(values))
    want = (values.to(by.dtype) * by).to(out_dtype)
    beyond = torch.full((size + 9,), 7.0, dtype=out_dtype)
    out = beyond[:size]
    scale_in_triton(values[0], by, out)
    torch.testing.assert_close(out, want[0], rtol=0, atol=0, equal_nan=True)
    assert (beyond[size:] == 7).all()
    if dtype == out_dtype:
        scale_in_triton(values, by, values)
        torch.testing.assert_close(values, want, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("scale", ["none", "group", "batch", "mean"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_group_advantages(scale: Any, dtype: torch.dtype) -> None:
    rewards = torch.tensor([0.3, 1e6 + 0.1, 0.7, 0.1, 1e6 + 0.4, 0.7, 0.7, 0.7, -5.0, 0.7], dtype=dtype)
    ids = torch.tensor([5, 2**40, 5, 5, 2**40, -1, -1, -1, 8, -1])
    found = group_advantages_in_triton(rewards, ids, scale, 1e-6)
    expected = reference.group_advantages(rewards, ids, scale_rewards=scale)
    torch.testing.assert_close(found, expected, rtol=1e-10 if dtype == torch.float64 else 1e-6, atol=0)
    assert found[[5, 6, 7, 8, 9]].tolist() == [0.0] * 5  # all equal, and a group of one
    rewards[0] = math.nan
    found = group_advantages_in_triton(rewards, ids, scale, 1e-6)
    expected = reference.group_advantages(rewards, ids, scale_rewards=scale)
    assert torch.equal(found.isnan(), expected.isnan()) and found[[0, 2, 3]].isnan().all()
    assert group_advantages_in_triton(rewards[:0], ids[:0], scale, 1e-6).shape == (0,)


@pytest.mark.parametrize("scale", ["none", "group", "batch", "mean"])
@pytest.mark.parametrize("case", ["clip", "gspo"])
def test_advantages_from_rewards(case: str, scale: str) -> None:
    batch = make_batch([3, 0, 6, 1, 2], 7, old_logps=True)
    del batch["advantages"]
    more: dict[str, Any] = {
        "rewards": torch.tensor([0.0, 1, 1, 0.5, 0.5]).double(),
        "group_ids": torch.tensor([0, 0, 0, 1, 1]),
    }
    check_loss(batch, CASES[case][0], **more, scale_rewards=scale)

"""token_logprobs and linear_logprobs against softmax written out, in float64."""

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.kernels.accuracy import assert_accurate, check_token_logprobs
from tests.kernels.formulas import slow_linear_logprobs
from thinktwice_kernels import linear_logits, linear_logprobs, rows, token_logprobs

V, H = 7, 3


@pytest.fixture(autouse=True)
def several_chunks(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Two float64 rows a chunk and two widened weight rows at a time, so that small tests cross both borders."""
    monkeypatch.setitem(rows.DEFAULT_BUDGET, "cpu", 2 * V * 8)
    monkeypatch.setattr(rows, "WIDENED_ROWS", 2)
    yield


def inputs(tokens: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    rng = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=rng)

    targets = torch.randint(0, V, (tokens,), generator=rng)
    temperature = torch.rand(tokens, dtype=torch.float64, generator=rng) + 0.5
    return normal(tokens, H), normal(V, H), normal(V), targets, temperature


@settings(max_examples=40)
@given(
    tokens=st.integers(0, 5),
    with_bias=st.booleans(),
    softcap=st.sampled_from([None, 1.5]),
    temperature=st.sampled_from(["one", "number", "scalar", "per token"]),
    seed=st.integers(0, 10**6),
)
def test_linear_equals_the_definition_with_gradients(
    tokens: int, with_bias: bool, softcap: float | None, temperature: str, seed: int
) -> None:
    hidden, weight, bias, targets, per_token = inputs(tokens, seed)
    taus: dict[str, float | Tensor] = {
        "one": 1.0,
        "number": 0.7,
        "scalar": torch.tensor(0.7, dtype=torch.float64),
        "per token": per_token,
    }
    tau = taus[temperature]
    leaves = [x.requires_grad_() for x in ([hidden, weight, bias] if with_bias else [hidden, weight])]
    got = linear_logprobs(
        hidden,
        weight,
        targets,
        bias=bias if with_bias else None,
        temperature=tau,
        logit_softcap=softcap,
        return_entropy=True,
    )
    assert [x.shape for x in got] == [(tokens,), (tokens,)]
    if tokens == 0:
        for gradient, leaf in zip(torch.autograd.grad(got[0].sum() + got[1].sum(), leaves), leaves, strict=True):
            assert torch.equal(gradient, torch.zeros_like(leaf))
        return
    per_row = torch.as_tensor(tau, dtype=torch.float64).expand(tokens).tolist()
    want = slow_linear_logprobs(hidden, weight, targets.tolist(), bias if with_bias else None, per_row, softcap)
    probes = torch.linspace(-1, 2, tokens, dtype=torch.float64), torch.linspace(3, -1, tokens, dtype=torch.float64)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)
    got_gradients = torch.autograd.grad(got, leaves, probes)
    want_gradients = torch.autograd.grad(want, leaves, probes)
    for a, b in zip(got_gradients, want_gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("return_entropy", [False, True])
def test_gradcheck(return_entropy: bool) -> None:
    hidden, weight, bias, targets, tau = inputs(5)
    for x in (hidden, weight, bias):
        x.requires_grad_()
    assert torch.autograd.gradcheck(
        lambda h, w, b: linear_logprobs(
            h, w, targets, bias=b, temperature=tau, logit_softcap=2.0, return_entropy=return_entropy
        ),
        (hidden, weight, bias),
    )
    logits = (hidden @ weight.t()).detach().requires_grad_()
    assert torch.autograd.gradcheck(
        lambda z: token_logprobs(z, targets, temperature=tau, return_entropy=return_entropy), (logits,)
    )


@pytest.mark.parametrize("used", ["logps", "entropy", "both"])
def test_token_equals_linear_with_gradients(used: str) -> None:
    hidden, weight, _, targets, tau = inputs(5)
    hidden.requires_grad_()
    by_token = token_logprobs(hidden @ weight.t(), targets, temperature=tau, return_entropy=True)
    by_linear = linear_logprobs(hidden, weight, targets, temperature=tau, return_entropy=True)
    for a, b in zip(by_token, by_linear, strict=True):
        torch.testing.assert_close(a, b)
    pick = {"logps": (0,), "entropy": (1,), "both": (0, 1)}[used]
    losses = [sum((outputs[i].square().sum() for i in pick), torch.zeros(())) for outputs in (by_token, by_linear)]
    (a,), (b,) = (torch.autograd.grad(loss, [hidden]) for loss in losses)
    assert a.abs().max() > 1e-3
    torch.testing.assert_close(a, b)


def test_without_the_entropy_the_log_probabilities_are_the_same() -> None:
    hidden, weight, _, targets, _ = inputs(5)
    torch.testing.assert_close(
        linear_logprobs(hidden, weight, targets), linear_logprobs(hidden, weight, targets, return_entropy=True)[0]
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("vocabulary", [1, 7])
@pytest.mark.parametrize("inplace", [False, True])
def test_token_logprobs_of_every_type(dtype: torch.dtype, vocabulary: int, inplace: bool) -> None:
    check_token_logprobs(torch.device("cpu"), dtype, vocabulary, inplace)


def test_what_should_be_zero_is_judged_absolutely() -> None:
    zero = {"x": torch.zeros(4, dtype=torch.float64)}
    assert_accurate({"x": torch.full((4,), 3e-7)}, zero, rounding={"x": 1e-7})
    for rounding in ({"x": 1e-8}, None):
        with pytest.raises(AssertionError, match="x"):
            assert_accurate({"x": torch.full((4,), 3e-7)}, zero, rounding=rounding)
    assert_accurate(zero, zero)


def test_hidden_need_not_be_contiguous() -> None:
    hidden, weight, _, targets, _ = inputs(5)
    strided = torch.stack([hidden, torch.full_like(hidden, math.nan)], -1).transpose(0, 1)[..., 0].t().requires_grad_()
    assert not strided.is_contiguous()
    plain = hidden.clone().requires_grad_()
    for h in (strided, plain):
        linear_logprobs(h, weight, targets).sum().backward()
    assert strided.grad is not None and plain.grad is not None
    torch.testing.assert_close(strided.grad, plain.grad)


def test_a_frozen_weight_gets_no_gradient_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, weight, bias, targets, _ = inputs(5)
    calls = []
    original = rows.add_product

    def counted(*arguments: Any, **options: Any) -> None:
        calls.append(1)
        original(*arguments, **options)

    monkeypatch.setattr(rows, "add_product", counted)
    hidden.requires_grad_()
    linear_logprobs(hidden, weight, targets, bias=bias).sum().backward()
    assert hidden.grad is not None and weight.grad is None and bias.grad is None
    assert not calls
    linear_logprobs(hidden, weight.requires_grad_(), targets).sum().backward()
    assert weight.grad is not None and len(calls) == 3


def relative_error(got: Tensor, want: Tensor) -> float:
    return float((got.detach().double() - want.detach()).norm() / want.detach().norm())


def against_float64(dtype: torch.dtype, scale: float) -> list[tuple[float, float]]:
    """(error of the op, error of the plain path in the same type) of logps, dHidden and dWeight against float64."""
    rng = torch.Generator().manual_seed(1)
    hidden = torch.randn(64, 48, generator=rng) * scale
    weight = torch.randn(V * 60, 48, generator=rng)
    targets = torch.randint(0, V * 60, (64,), generator=rng)
    probe = torch.randn(64, generator=rng)

    def run(dtype: torch.dtype, plain: bool) -> list[Tensor]:
        h, w = (x.to(torch.float32 if dtype == torch.float64 else dtype) for x in (hidden, weight))
        h, w = (x.to(low).to(dtype).requires_grad_() for x in (h, w))
        logps = (
            torch.log_softmax(h @ w.t(), -1).gather(1, targets[:, None])[:, 0]
            if plain
            else linear_logprobs(h, w, targets)
        )
        return [logps, *torch.autograd.grad(logps, [h, w], probe.to(logps.dtype))]

    low = dtype
    exact, op, plain = run(torch.float64, True), run(dtype, False), run(dtype, True)
    assert op[0].dtype == torch.float32 and op[1].dtype == op[2].dtype == dtype
    return [(relative_error(o, e), relative_error(p, e)) for e, o, p in zip(exact, op, plain, strict=True)]


@pytest.mark.parametrize("scale", [1.0, 10.0])
def test_float32_stays_below_1e_5(scale: float) -> None:
    assert max(error for error, _ in against_float64(torch.float32, scale)) < 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scale", [1.0, 10.0])
def test_low_precision_is_no_worse_than_the_plain_path_and_exact_in_the_logits(
    dtype: torch.dtype, scale: float
) -> None:
    errors = against_float64(dtype, scale)
    assert errors[0][0] < 1e-5  # widened inputs and fp32 logits: no rounding of the type is left in logps
    assert all(error <= 2 * plain for error, plain in errors)


def test_autocast_does_not_round_the_logits() -> None:
    hidden, weight, _, targets, _ = (x.float() if x.is_floating_point() else x for x in inputs(5))
    hidden.requires_grad_()
    plain = linear_logprobs(hidden, weight, targets)
    with torch.autocast("cpu", torch.bfloat16):
        under = linear_logprobs(hidden, weight, targets)
        (gradient,) = torch.autograd.grad(under.sum(), [hidden])
    assert torch.equal(plain, under)
    assert torch.equal(gradient, torch.autograd.grad(plain.sum(), [hidden])[0])


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_linear_logits_are_those_of_the_log_probabilities(dtype: torch.dtype, with_bias: bool) -> None:
    hidden, weight, bias, targets, _ = inputs(5)
    hidden, weight = hidden.to(dtype), weight.to(dtype)
    added = bias.to(dtype) if with_bias else None
    with torch.autocast("cpu", torch.bfloat16):
        got = linear_logits(hidden, weight, added)
    assert got.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    exact = hidden.double() @ weight.double().t() + (added.double() if added is not None else 0)
    # Sums of H + 1 terms of a few units; bfloat16 would be off by 2^-9 of a logit.
    torch.testing.assert_close(got.double(), exact, atol=1e-6, rtol=0)
    logps = linear_logprobs(hidden, weight, targets, bias=added)
    torch.testing.assert_close(got.log_softmax(-1).gather(1, targets[:, None])[:, 0], logps)


def test_linear_logits_refuse_shapes_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match=r"hidden has shape \[2, 3\], weight \[5, 4\]: pass \[T, H\] and \[V, H\]"):
        linear_logits(torch.zeros(2, 3), torch.zeros(5, 4))
    with pytest.raises(ValueError, match=r"bias has shape \[4\]: pass \[V\], here \[5\]"):
        linear_logits(torch.zeros(2, 3), torch.zeros(5, 3), torch.zeros(4))


def test_minus_infinity_is_a_token_that_cannot_be_drawn() -> None:
    logits = torch.tensor([[0.0, -math.inf, 1.0], [-math.inf, 2.0, -math.inf]], requires_grad=True)
    logps, entropy = token_logprobs(logits, torch.tensor([2, 1]), return_entropy=True)
    p = 1 / (1 + math.exp(-1))
    torch.testing.assert_close(logps, torch.tensor([math.log(p), 0.0]))
    torch.testing.assert_close(entropy, torch.tensor([-p * math.log(p) - (1 - p) * math.log(1 - p), 0.0]))
    (gradient,) = torch.autograd.grad((logps + entropy).sum(), [logits])
    assert gradient.isfinite().all() and gradient[0, 1] == 0 and gradient[1].tolist() == [0, 0, 0]
    assert token_logprobs(logits, torch.tensor([1, 0])).tolist() == [-math.inf, -math.inf]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_row_with_nan_or_infinity_is_nan_and_the_others_are_not(bad: float) -> None:
    logits = torch.zeros(3, V)
    logits[1, 4] = bad
    logits.requires_grad_()
    logps, entropy = token_logprobs(logits, torch.tensor([1, 1, 1]), return_entropy=True)
    (gradient,) = torch.autograd.grad((logps + entropy).sum(), [logits])
    for values in (logps, entropy, gradient.sum(-1)):
        assert values.isnan().tolist() == [False, True, False]


def test_large_logits_keep_their_precision() -> None:
    logits = torch.full((1, 1000), -160.0)
    logits[0, 0] = 160.0
    logps, entropy = token_logprobs(logits, torch.tensor([0]), return_entropy=True)
    assert logps.item() == 0 and 0 <= entropy.item() < 1e-30
    assert token_logprobs(logits, torch.tensor([1])).item() == pytest.approx(-320, rel=1e-7)


def test_second_derivative_raises() -> None:
    hidden, weight, _, targets, _ = inputs(3)
    hidden.requires_grad_()
    for logps in (linear_logprobs(hidden, weight, targets), token_logprobs(hidden @ weight.t(), targets)):
        (gradient,) = torch.autograd.grad(logps.sum(), [hidden], create_graph=True)
        with pytest.raises(RuntimeError, match="no second derivative"):
            gradient.square().sum().backward()


GOOD = {"hidden": torch.zeros(2, H), "weight": torch.zeros(V, H), "targets": torch.tensor([0, 1])}


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"hidden": torch.zeros(1, 2, H)}, r"pass \[T, H\] and \[V, H\]"),
        ({"weight": torch.zeros(V, H + 1)}, r"pass \[T, H\] and \[V, H\]"),
        ({"bias": torch.zeros(V - 1)}, r"pass \[V\]"),
        ({"targets": torch.tensor([0])}, "one token id per row"),
        ({"targets": torch.tensor([0.0, 1.0])}, "integer token ids"),
        ({"targets": torch.tensor([0, V])}, "pass ids from 0 to 6"),
        ({"targets": torch.tensor([0, -100])}, "without loss any of these"),
        ({"temperature": 0.0}, "positive number"),
        ({"temperature": math.nan}, "positive number"),
        ({"temperature": torch.ones(3)}, "one value per row"),
        ({"temperature": torch.ones(2, requires_grad=True)}, "detach"),
        ({"logit_softcap": -1.0}, "None for no cap"),
    ],
)
def test_bad_input_is_refused(arguments: dict, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        linear_logprobs(**{**GOOD, **arguments})


def test_token_logprobs_refuses_padded_logits() -> None:
    with pytest.raises(ValueError, match="flatten"):
        token_logprobs(torch.zeros(2, 3, V), torch.zeros(2, dtype=torch.int64))

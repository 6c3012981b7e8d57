"""linear_grpo_loss against its definition with whole logits, and what it must not compute."""

import inspect
from dataclasses import fields
from typing import Any, get_type_hints

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.kernels.batches import LAYOUTS, make_batch
from tests.kernels.cases import AGGREGATIONS, PUBLIC_CASES
from tests.kernels.dispatched import Dispatched
from thinktwice_kernels import grpo_loss, linear_grpo_loss, linear_loss, reference, rows
from thinktwice_kernels.options import LossKeywords, LossOptions

V, H = 9, 4
ROW = V * 8  # bytes of a row of float64 logits
Batch = dict[str, Any]


def linear_batch(lengths: list[int], seed: int, **wanted: Any) -> Batch:
    """As make_batch, with hidden states, weight, bias and targets (of type `dtype`) in place of log-probabilities."""
    dtype = wanted.pop("dtype", torch.float64)
    batch = make_batch(lengths, seed, **wanted)
    tokens = batch.pop("logps").numel()
    batch.pop("entropy", None)
    rng = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=rng).to(dtype)

    batch |= {"hidden": normal(tokens, H), "weight": normal(V, H), "bias": normal(V)}
    batch["targets"] = torch.randint(0, V, (tokens,), generator=rng)
    if tokens and "old_logps" in batch:  # near the current ones, so that some are clipped and some are not
        logps = reference.linear_logprobs(batch["hidden"], batch["weight"], batch["targets"], bias=batch["bias"])
        assert isinstance(logps, Tensor)
        batch["old_logps"] = logps.double() + 0.3 * torch.randn(tokens, dtype=torch.float64, generator=rng)
    return batch


def run(op: Any, batch: Batch, **options: Any) -> tuple[Tensor, dict[str, Tensor], list[Tensor]]:
    """Loss, metrics, and the gradients of three times the loss."""
    leaves = {name: batch[name].clone().requires_grad_() for name in ("hidden", "weight", "bias")}
    loss, metrics = op(**{**batch, **leaves}, **options)
    return loss, metrics, list(torch.autograd.grad(3 * loss, list(leaves.values())))


def assert_equals_reference(batch: Batch, options: dict[str, Any], **own: Any) -> None:
    loss, metrics, got = run(linear_grpo_loss, batch, **options, **own)
    want_loss, want_metrics, want = run(reference.linear_grpo_loss, batch, **options)
    torch.testing.assert_close(loss, want_loss, rtol=1e-9, atol=1e-11)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)
    assert {name: float(value) for name, value in metrics.items()} == pytest.approx(
        {name: float(value) for name, value in want_metrics.items()}, rel=1e-9, abs=1e-11
    )


@pytest.mark.parametrize("case", PUBLIC_CASES)
@settings(max_examples=25)
@given(
    lengths=LAYOUTS,
    seed=st.integers(0, 10**6),
    loss_mask=st.booleans(),
    token_advantages=st.booleans(),
    zero_advantages=st.booleans(),
    aggregation=st.sampled_from(AGGREGATIONS),
    rows=st.sampled_from([1, 2, 5, None]),
    head=st.sampled_from([{}, {"temperature": 0.7}, {"temperature": "per token"}, {"logit_softcap": 2.0}]),
)
def test_equals_the_definition(
    case: str,
    lengths: list[int],
    seed: int,
    loss_mask: bool,
    token_advantages: bool,
    zero_advantages: bool,
    aggregation: dict[str, Any],
    rows: int | None,
    head: dict[str, Any],
) -> None:
    options, tensors = PUBLIC_CASES[case]
    batch = linear_batch(
        lengths,
        seed,
        loss_mask=loss_mask,
        token_advantages=token_advantages,
        zero_advantages=zero_advantages,
        **dict.fromkeys(tensors, True),
    )
    if head.get("temperature") == "per token":
        head = {"temperature": torch.linspace(0.5, 1.5, sum(lengths), dtype=torch.float64)}
    budget = None if rows is None else rows * ROW
    assert_equals_reference(batch, {**options, **aggregation, **head}, memory_budget=budget)


@pytest.mark.parametrize("case", ["clip", "sapo", "gspo", "k3", "entropy"])
def test_gradcheck(case: str) -> None:
    options, tensors = PUBLIC_CASES[case]
    batch = linear_batch([3, 0, 4], 2, **dict.fromkeys({"loss_mask", "old_logps", *tensors}, True))
    leaves = tuple(batch[name].requires_grad_() for name in ("hidden", "weight", "bias"))

    def loss_of(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        moved = {"hidden": hidden, "weight": weight, "bias": bias}
        return linear_grpo_loss(**{**batch, **moved}, **options, memory_budget=2 * ROW)[0]

    assert torch.autograd.gradcheck(loss_of, leaves)


@pytest.mark.parametrize("scale", ["none", "group", "batch", "mean"])
def test_rewards_in_place_of_advantages(scale: str) -> None:
    batch = linear_batch([3, 1, 0, 4, 2], 1, old_logps=True)
    del batch["advantages"]
    rewards: Batch = {
        "rewards": torch.tensor([1.0, 0, 0, 1, 1], dtype=torch.float64),
        "group_ids": torch.tensor([7, 7, 2, 2, 5]),
        "scale_rewards": scale,
        "advantage_eps": 1e-3,
    }
    assert_equals_reference({**batch, "advantages": None, **rewards}, {})
    loss, _ = linear_grpo_loss(**{**batch, "advantages": None, **rewards})
    logps = reference.linear_logprobs(batch["hidden"], batch["weight"], batch["targets"], bias=batch["bias"])
    assert isinstance(logps, Tensor)
    fused, _ = grpo_loss(logps, None, batch["cu_seqlens"], old_logps=batch["old_logps"], **rewards)
    torch.testing.assert_close(loss, fused)


class CountedRows:
    """Rows that enter the products of logits, and those of the gradients."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.forward, self.backward = 0, 0
        logits, product = linear_loss.accumulated_logits, rows.add_product

        def counted_logits(hidden: Tensor, *rest: Any, **options: Any) -> Tensor:
            self.forward += hidden.shape[0]
            return logits(hidden, *rest, **options)

        def counted_product(total: Tensor, d_logits: Tensor, *rest: Any, **options: Any) -> None:
            self.backward += d_logits.shape[0]
            product(total, d_logits, *rest, **options)

        monkeypatch.setattr(linear_loss, "accumulated_logits", counted_logits)
        monkeypatch.setattr(rows, "add_product", counted_product)


@pytest.mark.parametrize("rows", [1, 4, None])
def test_rows_without_signal_enter_no_product(rows: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    batch = linear_batch([3, 4, 2, 5], 3)
    batch["advantages"] = torch.tensor([1.0, 0.0, -1.0, 0.5], dtype=torch.float64)
    batch["loss_mask"] = torch.arange(14) % 3 != 1
    skipped = ~batch["loss_mask"] | ((torch.arange(14) >= 3) & (torch.arange(14) < 7))
    clean = run(linear_grpo_loss, batch)
    count = CountedRows(monkeypatch)
    batch["hidden"][skipped] = float("nan")
    loss, metrics, (of_hidden, *others) = run(
        linear_grpo_loss, batch, memory_budget=None if rows is None else rows * ROW
    )
    assert count.forward == count.backward == int((~skipped).sum()) == 14 - int(skipped.sum())
    assert metrics["tokens"] == batch["loss_mask"].sum() and metrics["tokens_skipped"] == 3
    assert torch.equal(of_hidden[skipped], torch.zeros_like(of_hidden[skipped]))
    torch.testing.assert_close(loss, clean[0])
    for a, b in zip([of_hidden, *others], clean[2], strict=True):
        torch.testing.assert_close(a, b)


def test_clipped_rows_leave_before_the_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    batch = linear_batch([6, 5], 4, old_logps=True)
    batch["advantages"] = torch.tensor([1.0, -1.0], dtype=torch.float64)
    count = CountedRows(monkeypatch)
    _, metrics, _ = run(linear_grpo_loss, batch, memory_budget=4 * ROW)
    assert count.forward == 11
    assert count.backward == metrics["tokens_with_gradient"]
    assert 0 < count.backward < 11


def test_whole_sequences_cost_a_second_forward_only_beyond_a_tile(monkeypatch: pytest.MonkeyPatch) -> None:
    batch = linear_batch([2, 2, 7, 1], 5, old_logps=True)
    batch["advantages"] = torch.ones(4, dtype=torch.float64)
    options = {"importance_sampling_level": "sequence", "epsilon_low": 1.0, "epsilon_high": 1e6}
    for most, forward in ((4, 12 + 3), (7, 12), (12, 12), (3, 12 + 4)):  # pieces of the 7: 3 and 4; 2, 2 and 3
        with monkeypatch.context() as patched:
            count = CountedRows(patched)
            run(linear_grpo_loss, batch, memory_budget=most * ROW, **options)
        assert count.backward == 12
        assert count.forward == forward, most


def test_what_needs_no_gradient_gets_none(monkeypatch: pytest.MonkeyPatch) -> None:
    batch = linear_batch([3, 4], 6)
    count = CountedRows(monkeypatch)
    hidden = batch["hidden"].clone().requires_grad_()
    linear_grpo_loss(**{**batch, "hidden": hidden})[0].backward()
    assert hidden.grad is not None and count.backward == 0
    weight = batch["weight"].clone().requires_grad_()
    linear_grpo_loss(**{**batch, "weight": weight})[0].backward()
    assert weight.grad is not None and count.backward == 7
    with torch.no_grad():
        loss, _ = linear_grpo_loss(**{**batch, "weight": weight})
    assert not loss.requires_grad and count.backward == 7


def test_backward_twice_and_the_incoming_gradient() -> None:
    batch = linear_batch([3, 4], 7, dtype=torch.float32)
    weight = batch["weight"].requires_grad_()
    loss, _ = linear_grpo_loss(**batch)
    (first,) = torch.autograd.grad(loss, [weight], retain_graph=True)
    first.mul_(100)  # what was handed out must not be what is kept
    (second,) = torch.autograd.grad(loss, [weight], torch.tensor(-2.5), retain_graph=True)
    (third,) = torch.autograd.grad(loss, [weight])
    torch.testing.assert_close(second, -2.5 * third)
    torch.testing.assert_close(first, 100 * third)


@pytest.mark.parametrize("kept", [False, True])
def test_backward_fills_no_zeros_in_place_of_gradients_that_nobody_gave(kept: bool) -> None:
    batch = linear_batch([3, 4], 7)
    leaves = {name: batch[name].requires_grad_() for name in ("hidden", "weight", "bias")}
    loss, _ = linear_grpo_loss(**batch)
    with Dispatched() as dispatched:
        loss.backward(retain_graph=kept)
    assert any(isinstance(result, Tensor) and result.shape == (V, H) for _, result in dispatched.calls)
    assert [dispatched.filled(leaf.shape) for leaf in leaves.values()] == [[], [], []]


class WithoutGradient(torch.autograd.Function):
    """Twice its input, whose backward pass gives nothing."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor) -> Tensor:
        return 2 * loss

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> None:
        return None


@pytest.mark.parametrize("create_graph", [False, True])
def test_a_loss_without_gradient_gives_none(create_graph: bool) -> None:
    batch = linear_batch([3, 4], 7)
    leaves = [batch[name].requires_grad_() for name in ("hidden", "weight", "bias")]
    logps = torch.zeros(7, dtype=torch.float64, requires_grad=True)
    entropy = torch.ones(7, dtype=torch.float64, requires_grad=True)
    fused, _ = linear_grpo_loss(**batch)
    plain, _ = grpo_loss(logps, batch["advantages"], batch["cu_seqlens"], entropy=entropy, entropy_coef=0.1)
    for loss, inputs in ((fused, leaves), (plain, [logps, entropy])):
        found = torch.autograd.grad(
            WithoutGradient.apply(loss), inputs, allow_unused=True, create_graph=create_graph, retain_graph=False
        )
        assert found == (None,) * len(inputs)


def test_what_goes_to_a_gpu_goes_from_pinned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []

    def pinned(tensor: Tensor) -> Tensor:
        calls.append("pinned")
        return tensor

    def moved(tensor: Tensor, device: torch.device, non_blocking: bool = False) -> Tensor:
        calls.append((device.type, non_blocking))
        return tensor

    monkeypatch.setattr(Tensor, "pin_memory", pinned)
    monkeypatch.setattr(Tensor, "to", moved)
    for device in ("cuda", "cpu"):
        linear_loss.uploaded(torch.arange(3), torch.device(device))
    assert calls == ["pinned", ("cuda", True), ("cpu", False)]


@pytest.mark.parametrize("options", [{}, {"importance_sampling_level": "sequence"}])
def test_one_upload_carries_the_offsets_of_all_tiles(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    batch = linear_batch([3, 4, 2], 7)
    uploads: list[torch.dtype] = []

    def counted(tensor: Tensor, device: torch.device) -> Tensor:
        uploads.append(tensor.dtype)
        return tensor.to(device)

    monkeypatch.setattr(linear_loss, "uploaded", counted)
    run(linear_grpo_loss, batch, **options, memory_budget=2 * ROW)
    assert uploads.count(torch.int32) == 2  # cu_seqlens, and the offsets


def test_a_second_derivative_is_an_error() -> None:
    batch = linear_batch([3], 8)
    weight = batch["weight"].requires_grad_()
    for retain in (None, False):
        loss = linear_grpo_loss(**batch)[0]
        (gradient,) = torch.autograd.grad(2 * loss, [weight], create_graph=True, retain_graph=retain)
        with pytest.raises(RuntimeError, match="no second derivative"):
            gradient.sum().backward()


def relative_error(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want).norm() / want.norm())


@pytest.mark.parametrize("scale", [1.0, 30.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_as_exact_as_the_type_allows(dtype: torch.dtype, scale: float) -> None:
    """float32 below 1e-5; bfloat16 no worse than twice the plain path in bfloat16, also with logits of +-100."""
    rng = torch.Generator().manual_seed(2)
    tokens, vocabulary, size = 256, 500, 48
    hidden = (torch.randn(tokens, size, generator=rng) * scale / 7).to(dtype)
    weight = torch.randn(vocabulary, size, generator=rng).to(dtype)
    batch: Batch = {
        "targets": torch.randint(0, vocabulary, (tokens,), generator=rng),
        "advantages": torch.randn(8, generator=rng),
        "cu_seqlens": torch.arange(0, tokens + 1, 32, dtype=torch.int32),
    }

    def leaves(kind: torch.dtype) -> list[Tensor]:
        return [x.to(kind).requires_grad_() for x in (hidden, weight)]

    def plain(h: Tensor, w: Tensor) -> Tensor:
        logps = torch.log_softmax(h @ w.t(), -1).gather(1, batch["targets"][:, None])[:, 0]
        return reference.grpo_loss(logps, batch["advantages"], batch["cu_seqlens"])[0]

    def fused(h: Tensor, w: Tensor) -> Tensor:
        return linear_grpo_loss(h, w, **batch, memory_budget=vocabulary * 4 * 64)[0]

    exact_leaves = leaves(torch.float64)
    exact = torch.autograd.grad(plain(*exact_leaves), exact_leaves)
    errors = []
    for function in (fused, plain):
        own = leaves(dtype)
        errors.append(
            [relative_error(a, b) for a, b in zip(torch.autograd.grad(function(*own), own), exact, strict=True)]
        )
    for ours, theirs in zip(*errors, strict=True):
        assert ours < (1e-5 if dtype == torch.float32 else 2 * theirs)


def test_the_weight_gradients_error_does_not_grow_with_the_batch() -> None:
    """Added up in bfloat16 over tiles, it grows: 3e-3, 4.5e-3, 8e-3 at 4, 16 and 64 sequences elsewhere."""
    rng = torch.Generator().manual_seed(3)
    weight = torch.randn(300, 32, generator=rng).bfloat16()
    errors = []
    for sequences in (4, 16, 64):
        tokens = sequences * 16
        hidden = torch.randn(tokens, 32, generator=rng).bfloat16()
        arguments: Any = (
            torch.randint(0, 300, (tokens,), generator=rng),
            torch.randn(sequences, generator=rng),
            torch.arange(0, tokens + 1, 16, dtype=torch.int32),
        )
        low, high = weight.clone().requires_grad_(), weight.double().requires_grad_()
        linear_grpo_loss(hidden, low, *arguments, memory_budget=16 * 300 * 4)[0].backward()
        reference.linear_grpo_loss(hidden.double(), high, *arguments)[0].backward()
        assert low.grad is not None and high.grad is not None
        errors.append(relative_error(low.grad, high.grad))
    assert max(errors) < 2.0e-3  # half a unit in the last place of bfloat16 is 2^-9 = 1.95e-3 at worst


def test_logits_never_exist_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    batch = linear_batch([40, 50], 9)
    sizes = []
    logits = linear_loss.accumulated_logits

    def noted(*arguments: Any, **options: Any) -> Tensor:
        result = logits(*arguments, **options)
        sizes.append(result.untyped_storage().nbytes())
        return result

    monkeypatch.setattr(linear_loss, "accumulated_logits", noted)
    run(linear_grpo_loss, batch, memory_budget=10 * ROW)
    assert len(sizes) == 9 and max(sizes) == 10 * ROW


@pytest.mark.parametrize("per_token", [True, False])
def test_small_inputs_may_have_any_strides(per_token: bool) -> None:
    batch = linear_batch([3, 4], 10, token_advantages=per_token)
    want = run(linear_grpo_loss, batch)
    moved = {name: torch.stack([batch[name], batch[name]], 1)[:, 0] for name in ("advantages", "cu_seqlens", "targets")}
    got = run(linear_grpo_loss, batch | moved)
    torch.testing.assert_close([got[0], *got[2]], [want[0], *want[2]])
    batch["advantages"] = torch.ones(1, dtype=torch.float64).expand(7)
    assert_equals_reference(batch, {})


def test_float16_keeps_small_gradients_until_they_are_scaled() -> None:
    batch = linear_batch([3, 4], 10, dtype=torch.float32)
    _, _, (want, *_) = run(linear_grpo_loss, batch, normalizer=1e6)
    low = {name: batch[name].half().requires_grad_() for name in ("hidden", "weight", "bias")}
    loss, _ = linear_grpo_loss(**{**batch, **low}, normalizer=1e6)
    (got,) = torch.autograd.grad(loss * 65536, [low["hidden"]])
    assert got.dtype == torch.float16
    torch.testing.assert_close(got.float() / 65536 * 3, want, rtol=1e-2, atol=1e-9)


def test_inputs_that_are_not_contiguous_and_autocast() -> None:
    batch = linear_batch([3, 4], 10, dtype=torch.float32, old_logps=True)
    want = run(linear_grpo_loss, batch)
    batch["hidden"] = batch["hidden"].t().contiguous().t()
    with torch.autocast("cpu", torch.bfloat16):
        got = run(linear_grpo_loss, batch)
    for a, b in zip([got[0], *got[2]], [want[0], *want[2]], strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight": torch.zeros(V, 3)}, r"pass \[T, H\] and \[V, H\]"),
        ({"targets": torch.full((7,), V)}, f"pass ids from 0 to {V - 1}"),
        ({"memory_budget": 0}, "pass a positive number of bytes"),
        ({"advantages": torch.zeros(3)}, r"one per sequence, \[2\]"),
        ({"advantages": None}, "rewards and group_ids in their place"),
        ({"rewards": torch.zeros(2), "group_ids": torch.zeros(2).long()}, "either advantages, or rewards"),
        ({"scale_rewards": "group"}, "has no effect without rewards"),
        ({"old_logps": torch.zeros(3)}, r"one value per token, \[7\]"),
        ({"normalizer": 0}, "pass a positive count"),
        ({"normalizer": torch.ones(2)}, "pass a single count"),
        ({"advantage_eps": 1e-3}, "has no effect without rewards"),
        ({"logit_softcap": -1.0}, "pass a positive number"),
        ({"beta": 0.1}, "no ref_logps"),
        ({"epsilon": 0.1}, "unexpected keyword argument 'epsilon'"),
    ],
)
def test_bad_input_says_what_to_do(change: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        linear_grpo_loss(**{**linear_batch([3, 4], 0), **change})


def test_the_keywords_are_the_options() -> None:
    names = [field.name for field in fields(LossOptions)]
    assert list(get_type_hints(LossKeywords)) == names
    defaults = {name: parameter.default for name, parameter in inspect.signature(grpo_loss).parameters.items()}
    assert {name: defaults[name] for name in names} == {field.name: field.default for field in fields(LossOptions)}
    options = LossOptions(beta=0.1, kl_estimator="k2", dual_clip=3.0, guide_fallback="clip", policy_loss="clip")
    assert LossOptions.decode(options.encode()) == options

"""The ops as torch.library and torch.compile see them."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from thinktwice_kernels import (
    group_advantages,
    grpo_loss,
    linear_grpo_loss,
    linear_logprobs,
    rows,
    token_logprobs,
)
from thinktwice_kernels.options import LossOptions

T, H, V = 9, 4, 11
OPS = torch.ops.thinktwice_kernels


def tensors(tokens: int = T) -> dict[str, Tensor]:
    rng = torch.Generator().manual_seed(0)
    return {
        "hidden": torch.randn(tokens, H, generator=rng).requires_grad_(),
        "weight": torch.randn(V, H, generator=rng).requires_grad_(),
        "bias": torch.randn(V, generator=rng).requires_grad_(),
        "targets": torch.randint(0, V, (tokens,), generator=rng),
        "advantages": torch.tensor([1.0, -2.0, 0.5]),
        "cu_seqlens": torch.tensor([0, 4, 4, tokens], dtype=torch.int32),
        "old_logps": -2.4 + 0.3 * torch.randn(tokens, generator=rng),
        "temperature": torch.rand(tokens, generator=rng) + 0.5,
        "mask": torch.arange(tokens) % 3 != 0,
    }


def by_token(x: dict[str, Tensor]) -> Tensor:
    logps, entropy = token_logprobs(
        x["hidden"] @ x["weight"].t(), x["targets"], temperature=x["temperature"], return_entropy=True
    )
    return (logps * x["old_logps"]).sum() + entropy.square().sum()


def by_linear(x: dict[str, Tensor]) -> Tensor:
    logps = linear_logprobs(x["hidden"], x["weight"], x["targets"], bias=x["bias"], temperature=0.7)
    return (logps * x["old_logps"]).sum()


def by_loss(x: dict[str, Tensor]) -> Tensor:
    logps = linear_logprobs(x["hidden"], x["weight"], x["targets"], bias=x["bias"], logit_softcap=3.0)
    rewards, ids = x["advantages"], torch.tensor([0, 0, 1])
    loss, metrics = grpo_loss(
        logps, group_advantages(rewards, ids), x["cu_seqlens"], old_logps=x["old_logps"], loss_mask=x["mask"]
    )
    return loss + metrics["ratio_mean"]


def fused(x: dict[str, Tensor]) -> Tensor:
    loss, metrics = linear_grpo_loss(
        x["hidden"],
        x["weight"],
        x["targets"],
        x["advantages"],
        x["cu_seqlens"],
        bias=x["bias"],
        old_logps=x["old_logps"],
        guide_mask=x["mask"],
        entropy_coef=0.1,
        loss_agg_mode="seq-mean-token-mean",
    )
    return loss + metrics["entropy"]


@pytest.mark.parametrize("function", [by_token, by_linear, by_loss, fused])
def test_compiles_whole_with_gradients(function: Callable[[dict[str, Tensor]], Tensor]) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    for tokens in (T, T + 2):
        x = tensors(tokens)
        leaves = [x[name] for name in ("hidden", "weight", "bias")]
        got, want = (torch.autograd.grad(f(x), leaves, allow_unused=True) for f in (compiled, function))
        torch.testing.assert_close(compiled(x), function(x))
        for a, b in zip(got, want, strict=True):
            assert (a is None) == (b is None)
            if a is not None and b is not None:
                torch.testing.assert_close(a, b)


def test_a_new_number_of_tokens_compiles_nothing_again() -> None:
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounter()
    compiled = torch.compile(fused, fullgraph=True, backend=counter, dynamic=True)
    for tokens in (T, T + 1, T + 5, T + 8):
        compiled(tensors(tokens))
    assert counter.frame_count == 1


def op_calls() -> list[tuple[Any, tuple[Any, ...]]]:
    x = tensors()
    hidden, weight, bias, targets = (x[name] for name in ("hidden", "weight", "bias", "targets"))
    logits = (hidden @ weight.t()).detach().requires_grad_()
    logps = x["old_logps"].clone().requires_grad_()
    entropy = torch.rand(T).requires_grad_()
    options = LossOptions(entropy_coef=0.1).encode()
    advantages, offsets, old, mask = (x[name] for name in ("advantages", "cu_seqlens", "old_logps", "mask"))
    given = offsets, torch.full((3,), 0.1), old, None, None
    rewards = None, None, "none", 1e-6
    return [
        (OPS.token_logprobs, (logits, targets, 0.7, None, True, False)),
        (OPS.token_logprobs, (logits, targets, 1.0, x["temperature"], False, False)),
        (OPS.linear_logprobs, (hidden, weight, bias, targets, 1.0, x["temperature"], 2.0, True)),
        (OPS.linear_logprobs, (hidden, weight, None, targets, 1.0, None, None, False)),
        (OPS.group_advantages, (x["advantages"], torch.tensor([0, 0, 1]), "group", 1e-6)),
        (OPS.grpo_loss, (logps, advantages, *rewards, *given, entropy, mask, None, options, True)),
        (
            OPS.linear_logprobs,
            (hidden.t().contiguous().t(), weight.t().contiguous().t(), None, targets, 1.0, None, None, True),
        ),
        (
            OPS.linear_grpo_loss,
            (
                *(hidden, weight, bias, targets, 1.0, None, None, advantages, *given, mask, None),
                *(LossOptions().encode(), [True, True, True], None, True),
            ),
        ),
    ]


@pytest.mark.parametrize("op, arguments", op_calls())
def test_schema_fake_and_autograd_agree(op: Any, arguments: tuple[Any, ...]) -> None:
    checks = ["test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic"]
    if op is OPS.linear_grpo_loss:
        # Its backward pass scales the gradients that the op returned in their memory, and this check would look at
        # them afterwards. test_compiles_whole_with_gradients compares what the public function gives.
        checks.pop()
    torch.library.opcheck(op.default, arguments, test_utils=checks)


def test_gradients_in_the_memory_of_the_logits() -> None:
    x = tensors()
    logits = (x["hidden"] @ x["weight"].t()).detach()
    want = logits.clone().requires_grad_()
    token_logprobs(want, x["targets"]).square().sum().backward()
    leaf = logits.clone().requires_grad_()
    taken = leaf * 1
    token_logprobs(taken, x["targets"], inplace_backward=True).square().sum().backward()
    assert leaf.grad is not None and want.grad is not None
    torch.testing.assert_close(leaf.grad, want.grad)
    torch.testing.assert_close(taken.detach(), want.grad)  # the logits are gone


@pytest.mark.parametrize("inplace", [False, True])
def test_logits_may_have_any_strides(inplace: bool) -> None:
    x = tensors()
    logits = (x["hidden"] @ x["weight"].t()).detach()
    shared = logits[:1].expand(T, V)
    for made in (logits.t().contiguous().t(), torch.cat([logits, logits], 1)[:, :V], shared):
        want, got = made.clone().requires_grad_(), made.detach().requires_grad_()
        token_logprobs(want, x["targets"]).square().sum().backward()
        taken = got if made is shared else got * 1  # a leaf may not be written to
        token_logprobs(taken, x["targets"], inplace_backward=inplace).square().sum().backward()
        assert want.grad is not None and got.grad is not None
        torch.testing.assert_close(got.grad, want.grad)


def test_tiles_cover_everything_evenly() -> None:
    for start, stop, most in ((0, 0, 3), (0, 7, 3), (5, 13, 8), (2, 5, 1), (0, 1000, 77)):
        found = list(rows.tiles(start, stop, most))
        assert [i for tile in found for i in range(tile.start, tile.stop)] == list(range(start, stop))
        sizes = [tile.stop - tile.start for tile in found]
        assert not sizes or (max(sizes) <= most and max(sizes) - min(sizes) <= 1)

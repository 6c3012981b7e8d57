"""The public ops over the Triton kernels in Triton's interpreter; run by test_aot.py, see test_triton_kernels.py."""

import os
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import _disable_current_modes

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs TRITON_INTERPRET=1", allow_module_level=True)

from tests.kernels.accuracy import check_token_logprobs
from tests.kernels.cases import PUBLIC_CASES
from tests.kernels.dispatched import Dispatched
from tests.kernels.interpreter import patch_language_once, round_bfloat16_to_nearest
from tests.kernels.test_linear_loss import ROW, assert_equals_reference, linear_batch
from thinktwice_kernels import (
    exponentials,
    group_advantages,
    launch,
    linear_grpo_loss,
    linear_logprobs,
    linear_loss,
    reference,
    token_logprobs,
)
from thinktwice_kernels.triton import exponentials as kernels_of_exponentials
from thinktwice_kernels.triton import selection

patch_language_once()
round_bfloat16_to_nearest()


def test_the_interpreted_kernels_are_the_ones_used() -> None:
    assert launch.uses_triton(torch.zeros(1))


@pytest.mark.parametrize("rows", [2, None])
@pytest.mark.parametrize(
    "case",
    [
        *("clip", "gspo", "entropy", "cispo", "guided, fallback", "guided, released code", "sequence-mask"),
        *("token-mask, kept", "guided gspo, sequence-mask, kept"),
    ],
)
def test_linear_grpo_loss(case: str, rows: int | None) -> None:
    options, tensors = PUBLIC_CASES[case]
    batch = linear_batch([3, 0, 4, 1], 1, **dict.fromkeys({"loss_mask", *tensors}, True))
    assert_equals_reference(batch, options, memory_budget=None if rows is None else rows * ROW)


class FirstProduct(Exception):
    """Where the count of what comes before ends."""


def launches_before_the_first_product(batch: dict[str, Any], options: dict[str, Any]) -> list[str]:
    """What `linear_grpo_loss` makes a GPU do, or wait for, once its inputs are prepared. Its one upload aside."""
    dispatched = Dispatched()
    forward, launched = linear_loss._tiled_loss, launch.launch

    def watched(*arguments: Any) -> Any:
        with dispatched:  # what runs inside of a custom op is hidden from a mode around it
            return forward(*arguments)

    def counted(kernel: Any, *rest: Any) -> None:
        dispatched.calls.append((kernel.__name__, None))
        with _disable_current_modes():
            launched(kernel, *rest)

    def stop(*_: Any, **__: Any) -> None:
        raise FirstProduct

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(linear_loss, "_tiled_loss", watched)
        for module in (selection, kernels_of_exponentials):
            patch.setattr(module, "launch", counted)
        for module in (linear_loss, exponentials):
            patch.setattr(module, "accumulated_logits", stop)
        with pytest.raises(FirstProduct):
            linear_grpo_loss(**batch, **options)
    return dispatched.launches()


@pytest.mark.parametrize("case", ["defaults", "gspo, sequence-mask", "guided, released code", "guided, with kl"])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_few_launches_come_before_the_first_product(case: str, masked: bool, dtype: torch.dtype) -> None:
    options, tensors = PUBLIC_CASES[case]
    wanted = dict.fromkeys({"token_advantages", "zero_advantages", *tensors}, True)
    batch = linear_batch([3, 0, 4, 1], 1, **wanted, loss_mask=masked)
    leaves = {name: batch[name].to(dtype).requires_grad_() for name in ("hidden", "weight", "bias")}
    found = launches_before_the_first_product({**batch, **leaves}, options)
    assert {"count_tokens", "compact_tokens"} <= set(found)
    assert len(found) <= 6 + (dtype == torch.bfloat16), found  # there the bias goes to fp32


def test_log_probabilities() -> None:
    batch = linear_batch([5], 2)
    hidden, weight, bias = (batch[name].requires_grad_() for name in ("hidden", "weight", "bias"))
    tau = torch.linspace(0.5, 2, 5, dtype=torch.float64)
    for make in (linear_logprobs, reference.linear_logprobs):
        logps, entropy = make(hidden, weight, batch["targets"], bias=bias, temperature=tau, return_entropy=True)
        gradients = torch.autograd.grad(logps.square().sum() + entropy.sum(), [hidden, weight, bias])
        if make is linear_logprobs:
            got = (logps, entropy, *gradients)
    torch.testing.assert_close(got, (logps, entropy, *gradients))
    logits = (hidden @ weight.t()).detach()
    torch.testing.assert_close(
        token_logprobs(logits, batch["targets"]), reference.token_logprobs(logits, batch["targets"])
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("vocabulary", [1, 7])
@pytest.mark.parametrize("inplace", [False, True])
def test_token_logprobs(dtype: torch.dtype, vocabulary: int, inplace: bool) -> None:
    check_token_logprobs(torch.device("cpu"), dtype, vocabulary, inplace)


def test_group_advantages() -> None:
    rewards, ids = torch.tensor([1.0, 0, 1, 0.5]), torch.tensor([3, 3, 1, 3])
    torch.testing.assert_close(
        group_advantages(rewards, ids, scale_rewards="group"),
        reference.group_advantages(rewards, ids, scale_rewards="group"),
    )

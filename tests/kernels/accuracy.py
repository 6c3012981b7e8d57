"""How far a result may be off, and the check of `token_logprobs` that every device goes through.

Letters: T tokens, V vocabulary.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from tests.kernels.batches import make_batch
from tests.kernels.cases import PUBLIC_CASES
from thinktwice_kernels import linear_grpo_loss, reference, token_logprobs
from thinktwice_kernels.launch import accumulation_dtype

FP32_ERROR = 1e-5
# Units of rounding by which terms that cancel to nothing may be off.
ZERO_UNITS = 8
HIDDEN = 64
Tensors = dict[str, Tensor]


def normal(*shape: int, seed: int = 0) -> Tensor:
    """In float64, on the CPU."""
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def error(got: Tensor, want: Tensor) -> float:
    """Relative; a loss, which is a sum of terms of both signs and of size 1, is not taken for smaller than 0.01.

    Where all of `want` is 0 it is 0 or infinite.
    """
    want = want.detach()
    off, size = (got.detach().cpu().double() - want).norm(), want.norm()
    return float(off / (size if want.dim() else size.clamp(min=0.01))) if off else 0.0


def assert_accurate(
    got: Tensors, want: Tensors, plain: Tensors | None = None, rounding: dict[str, float] | None = None
) -> None:
    """Below 1e-5; or no more than twice the error of what plain torch makes of bfloat16 inputs.

    Where all of a result should be 0 there is no relative error: then its norm is below `ZERO_UNITS` times what
    `rounding` says of it, or is 0 too where that says nothing.
    """
    for name, value in want.items():
        if value.numel() and not value.any():
            assert float(got[name].detach().double().norm()) <= ZERO_UNITS * (rounding or {}).get(name, 0.0), name
            continue
        limit = FP32_ERROR if plain is None else max(FP32_ERROR, 2 * error(plain[name], value))
        assert error(got[name], value) <= limit, name


@contextmanager
def poisoned_memory(device: torch.device) -> Iterator[None]:
    """torch.empty and its kin give NaN, so that a kernel that leaves out an element shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        assert torch.empty(5, device=device).isnan().all()
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def moved_to(
    device: torch.device, batch: dict[str, Any], dtype: torch.dtype, leaves: tuple[str, ...]
) -> dict[str, Any]:
    """The batch on the device: the leaves in `dtype`, with gradients; the other floating tensors in fp32."""
    moved = {}
    for name, value in batch.items():
        if isinstance(value, Tensor):
            value = value.detach().to(device)
            if name in leaves:
                value = value.to(dtype).requires_grad_()
            elif value.is_floating_point() and dtype != torch.float64:
                value = value.float()
        moved[name] = value
    return moved


def with_leaves(batch: dict[str, Any], leaves: tuple[str, ...]) -> dict[str, Any]:
    """The batch with copies of the leaves that take gradients."""
    return {**batch, **{name: batch[name].detach().clone().requires_grad_() for name in leaves if name in batch}}


def gradients(outputs: Any, batch: dict[str, Any], leaves: tuple[str, ...], incoming: Any = None) -> Tensors:
    """Of the outputs, each times its `incoming`, with respect to those leaves that the batch has."""
    present = [name for name in leaves if name in batch]
    found = torch.autograd.grad(outputs, [batch[name] for name in present], incoming)
    return {f"d_{name}": gradient for name, gradient in zip(present, found, strict=True)}


def check_token_logprobs(device: torch.device, dtype: torch.dtype, vocabulary: int, inplace: bool) -> None:
    """Values and gradients with a temperature per token, against the definition in float64. With V = 1 all are 0."""
    rows = 9
    logits = (4 * normal(rows, vocabulary)).to(dtype)
    batch = {
        "logits": logits.double(),
        "targets": torch.arange(rows) * 7919 % vocabulary,
        "temperature": torch.linspace(0.6, 1.4, rows, dtype=torch.float64),
    }
    incoming = normal(rows, seed=5), normal(rows, seed=6)

    def run(op: Callable[..., Any], inputs: dict[str, Any], **options: Any) -> Tensors:
        logps, entropy = op(**inputs, return_entropy=True, **options)
        probes = [probe.to(logps.device, logps.dtype) for probe in incoming]
        return {"logps": logps, "entropy": entropy, **gradients((logps, entropy), inputs, ("logits",), probes)}

    want = run(reference.token_logprobs, with_leaves(batch, ("logits",)))
    leaf = moved_to(device, batch, dtype, ("logits",))
    plain = None
    if dtype != torch.float64:
        plain = run(reference.token_logprobs, with_leaves({**batch, "logits": logits}, ("logits",)))
    # A leaf may not be overwritten while autograd owns it: in place works on what a model computed.
    inputs = {**leaf, "logits": leaf["logits"] * 1}
    got = run(token_logprobs, inputs, inplace_backward=inplace)
    assert_accurate(got, want, plain, {"d_logits": _rounding_of_gradient(batch, incoming, accumulation_dtype(logits))})
    if inplace:
        assert got["d_logits"].data_ptr() == inputs["logits"].data_ptr()


def _rounding_of_gradient(batch: Tensors, incoming: tuple[Tensor, Tensor], dtype: torch.dtype) -> float:
    """What one unit of rounding comes to: of an incoming gradient over tau, and of the exponents z / tau below it."""
    exponents = (batch["logits"] / batch["temperature"][:, None]).abs().amax(1)
    flow = (incoming[0].abs() + incoming[1].abs()) / batch["temperature"]
    return torch.finfo(dtype).eps * float((flow * (1 + exponents)).norm())


def head_batch(tokens: int, vocabulary: int, dtype: torch.dtype, **wanted: bool) -> dict[str, Any]:
    """Hidden states, weight and targets on the CPU in float64, rounded to `dtype`."""
    found: dict[str, Any] = {
        "hidden": normal(tokens, HIDDEN, seed=1).to(dtype).double(),
        "weight": (normal(vocabulary, HIDDEN, seed=2) / 4).to(dtype).double(),
        "targets": torch.randint(0, vocabulary, (tokens,), generator=torch.Generator().manual_seed(3)),
    }
    if wanted.get("bias"):
        found["bias"] = normal(vocabulary, seed=4).to(dtype).double()
    return found


def plain_logprobs(
    inputs: dict[str, Any], temperature: float = 1.0, logit_softcap: float | None = None
) -> tuple[Tensor, Tensor]:
    """As trainers do it: whole logits in the type of the inputs, then fp32."""
    logits = torch.nn.functional.linear(inputs["hidden"], inputs["weight"], inputs.get("bias")).float()
    if logit_softcap is not None:
        logits = logit_softcap * torch.tanh(logits / logit_softcap)
    found = reference.token_logprobs(logits, inputs["targets"], temperature=temperature, return_entropy=True)
    return cast(tuple[Tensor, Tensor], found)


def plain_loss(**rest: Any) -> tuple[Tensor, Tensors]:
    inputs: dict[str, Any] = {name: rest.pop(name) for name in ("hidden", "weight", "bias", "targets") if name in rest}
    head = {name: rest.pop(name) for name in ("temperature", "logit_softcap") if name in rest}
    logps, entropy = plain_logprobs(inputs, **head)
    return reference.grpo_loss(logps, entropy=entropy, **rest)


def assert_same_metrics(got: Tensors, want: Tensors) -> None:
    expected = pytest.approx({name: float(value) for name, value in want.items()}, rel=1e-4, abs=1e-6)
    assert {name: float(value) for name, value in got.items()} == expected


def check_linear_grpo_loss(
    device: torch.device,
    dtype: torch.dtype,
    case: str,
    lengths: list[int],
    vocabulary: int,
    budget: int | None,
    bias: bool = True,
    **head: Any,
) -> None:
    """Loss, metrics and gradients of one of the `PUBLIC_CASES` against the definition in float64."""
    options, tensors = PUBLIC_CASES[case]
    leaves = ("hidden", "weight", "bias")
    batch = head_batch(sum(lengths), vocabulary, dtype, bias=bias) | head
    packed = make_batch(lengths, 7, loss_mask=True, zero_advantages=True, **dict.fromkeys(tensors, True))
    logps = reference.linear_logprobs(**batch)
    near = {name: logps + packed[name] - packed["logps"].detach() for name in packed if name.endswith("_logps")}
    packed = {name: value for name, value in packed.items() if name not in ("logps", "entropy")}
    batch = {**batch, **packed, **near}

    def run(op: Callable[..., Any], inputs: dict[str, Any], **own: Any) -> tuple[Tensors, Tensors]:
        loss, metrics = op(**inputs, **options, **own)
        return {"loss": loss, **gradients(loss, inputs, leaves)}, metrics

    want, want_metrics = run(reference.linear_grpo_loss, with_leaves(batch, leaves))
    inputs = moved_to(device, batch, dtype, leaves)
    got, metrics = run(linear_grpo_loss, inputs, memory_budget=budget)
    plain = run(plain_loss, inputs)[0] if dtype == torch.bfloat16 else None
    assert_accurate(got, want, plain)
    assert_same_metrics(metrics, want_metrics)

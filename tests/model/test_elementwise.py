"""The fused norms and gates against float64, alone and in whole models."""

import copy
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, silu
from transformers import AutoModelForCausalLM, LlamaConfig

from tests.model.rounding import assert_as_exact
from tests.small_models import FAMILIES, VOCABULARY, random_model
from thinktwice_fast.model.elementwise import fuse_elementwise, rms_norm, swiglu

EPS = 1e-5


def plain_norm(x: Tensor, weight: Tensor) -> Tensor:
    return x * (x.pow(2).mean(-1, keepdim=True) + EPS).rsqrt() * weight


def plain_gate(gate: Tensor, up: Tensor) -> Tensor:
    return silu(gate) * up


def with_gradients(function: Callable[..., Tensor], inputs: Sequence[Tensor]) -> list[Tensor]:
    leaves = [x.clone().requires_grad_() for x in inputs]
    out = function(*leaves)
    out.backward(torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view(out.shape).sin())
    return [out.detach(), *(x.grad for x in leaves if x.grad is not None)]


def assert_near(fused: Callable[..., Tensor], plain: Callable[..., Tensor], inputs: Sequence[Tensor]) -> None:
    exact = with_gradients(plain, [x.double() for x in inputs])
    assert_as_exact(with_gradients(fused, inputs), with_gradients(plain, inputs), exact)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("shape", [(1,), (3, 7), (300, 128), (2, 50, 4, 32), (5, 9000), (1, 1000, 20)])
def test_norm(shape: tuple[int, ...], threads: int) -> None:
    random = torch.Generator().manual_seed(0)
    x, weight = torch.randn(shape, generator=random), torch.randn(shape[-1], generator=random)
    torch.set_num_threads(threads)
    try:
        assert_near(lambda x, weight: rms_norm(x, weight, EPS), plain_norm, (x, weight))
    finally:
        torch.set_num_threads(1)


@pytest.mark.parametrize("shape", [(1,), (3, 7), (300, 128), (3, 8193), (0, 4)])
def test_gate(shape: tuple[int, ...]) -> None:
    random = torch.Generator().manual_seed(0)
    gate, up = (4 * torch.randn(shape, generator=random) for _ in range(2))
    if gate.numel():
        assert_near(swiglu, plain_gate, (gate, up))
    else:
        assert swiglu(gate, up).shape == shape


def test_gate_far_out() -> None:
    gate = torch.tensor([-200.0, -88.5, -87.0, 0.0, 87.0, 200.0])
    out, of_gate, of_up = with_gradients(swiglu, (gate, torch.ones(6)))
    exact = with_gradients(plain_gate, (gate.double(), torch.ones(6, dtype=torch.float64)))
    for mine, truth in zip((out, of_gate, of_up), exact, strict=True):
        torch.testing.assert_close(mine.double(), truth, rtol=1e-5, atol=1e-30)
    assert swiglu(torch.tensor([torch.nan]), torch.ones(1)).isnan()


def test_gradients_do_not_depend_on_threads() -> None:
    random = torch.Generator().manual_seed(0)
    x, weight = torch.randn(3000, 48, generator=random), torch.randn(48, generator=random)
    found = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        found.append(with_gradients(lambda x, weight: rms_norm(x, weight, EPS), (x, weight)))
    torch.set_num_threads(1)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


@pytest.mark.parametrize("strided", ["input", "gradient"])
def test_strides(strided: str) -> None:
    x, weight = torch.randn(20, 6).T, torch.randn(20)
    if strided == "input":
        assert torch.equal(rms_norm(x, weight, EPS), rms_norm(x.contiguous(), weight, EPS))
        return
    leaf = x.contiguous().requires_grad_()
    (of_sum,) = torch.autograd.grad(rms_norm(leaf, weight, EPS).sum(), leaf)
    (of_ones,) = torch.autograd.grad(rms_norm(leaf, weight, EPS), leaf, torch.ones(6, 20))
    assert torch.equal(of_sum, of_ones)


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(RuntimeError, match="no multiple of the weight's 7"):
        rms_norm(torch.ones(3, 8), torch.ones(7), EPS)
    with pytest.raises(RuntimeError, match="float32"):
        swiglu(torch.ones(4, dtype=torch.float64), torch.ones(4, dtype=torch.float64))


def results(model: Any) -> list[Tensor]:
    ids = torch.arange(40)[None] * 11 % VOCABULARY
    logits = model(input_ids=ids, use_cache=False).logits[0]
    cross_entropy(logits, torch.arange(40) % VOCABULARY).backward()
    return [logits.detach(), *(parameter.grad for parameter in model.parameters())]


@pytest.mark.parametrize("family", FAMILIES)
def test_models(family: str) -> None:
    plain = random_model(family)
    fused, exact = copy.deepcopy(plain), copy.deepcopy(plain).double()
    fuse_elementwise(fused)
    kinds = [type(module).__name__ for module in fused.modules()]
    assert kinds.count(f"Fused{family.capitalize()}MLP") == 3
    assert all(kind.startswith("Fused") for kind in kinds if kind.endswith("RMSNorm"))
    assert_as_exact(results(fused), results(plain), results(exact))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_types_run_the_modules_own_way(dtype: torch.dtype) -> None:
    plain = random_model("llama").to(dtype)
    fused = copy.deepcopy(plain)
    fuse_elementwise(fused)
    for a, b in zip(results(fused), results(plain), strict=True):
        assert torch.equal(a, b)


def test_another_activation_stays() -> None:
    config = LlamaConfig(
        hidden_act="gelu", vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=1,
        num_attention_heads=2,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config)
    fuse_elementwise(model)
    kinds = {type(module).__name__ for module in model.modules()}
    assert "LlamaMLP" in kinds and "FusedLlamaRMSNorm" in kinds

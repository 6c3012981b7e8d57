"""The fused norms, rotations and gates against float64, alone and in whole models."""

import copy
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, silu
from transformers import AutoModelForCausalLM, LlamaConfig
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from tests.model.rounding import assert_as_exact
from tests.small_models import FAMILIES, VOCABULARY, random_model
from thinktwice_fast.model.attention import NAME, PrefixAttention
from thinktwice_fast.model.elementwise import fuse_elementwise, qkv_heads, rms_norm, swiglu
from thinktwice_fast.model.fused import fuse_attention
from thinktwice_fast.model.policy import Policy, linear_head

EPS = 1e-5
HEADS, DIM = (6, 2), 12
# Of 700 tokens. The halves' angles are unequal, which no model has: each must be taken from its own place.
ANGLES = torch.randn(2, 700, DIM, generator=torch.Generator().manual_seed(7))


def plain_norm(x: Tensor, weight: Tensor) -> Tensor:
    return x * (x.pow(2).mean(-1, keepdim=True) + EPS).rsqrt() * weight


def plain_gate(x: Tensor) -> Tensor:
    gate, up = x.chunk(2, -1)
    return silu(gate) * up


def plain_heads(x: Tensor, q_norm: Tensor | None = None, k_norm: Tensor | None = None) -> Tensor:
    """Queries, keys and values with the angles of ``ANGLES``, flattened one after another."""
    cos, sin = (table[: len(x)].to(x.dtype) for table in ANGLES)
    q, k, v = x.split([HEADS[0] * DIM, HEADS[1] * DIM, HEADS[1] * DIM], 1)
    if q_norm is not None and k_norm is not None:
        q, k = (
            plain_norm(part.unflatten(1, (-1, len(norm))), norm).flatten(1) for part, norm in ((q, q_norm), (k, k_norm))
        )
    q, k, v = (part.unflatten(1, (-1, DIM)) for part in (q, k, v))
    q, k = apply_rotary_pos_emb(q, k, cos, sin, unsqueeze_dim=1)
    return torch.cat([part.flatten() for part in (q, k, v)])


def fused_heads(x: Tensor, *norms: Tensor) -> Tensor:
    cos, sin = (table[: len(x)] for table in ANGLES)
    q_and_k = (norms[0], norms[1]) if norms else None
    return torch.cat([part.flatten() for part in qkv_heads(x, cos, sin, HEADS, q_and_k, EPS)])


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


@pytest.mark.parametrize("shape", [(1, 2), (3, 14), (300, 256), (3, 2 * 8193), (0, 4)])
def test_gate(shape: tuple[int, int]) -> None:
    x = 4 * torch.randn(shape, generator=torch.Generator().manual_seed(0))
    if x.numel():
        assert_near(swiglu, plain_gate, (x,))
    else:
        assert swiglu(x).shape == (0, 2)


def test_gate_far_out() -> None:
    gate = torch.tensor([-200.0, -88.5, -87.0, 0.0, 87.0, 200.0])
    x = torch.stack([gate, torch.ones(6)], 1)
    exact = with_gradients(plain_gate, (x.double(),))
    for mine, truth in zip(with_gradients(swiglu, (x,)), exact, strict=True):
        torch.testing.assert_close(mine.double(), truth, rtol=1e-5, atol=1e-30)
    assert swiglu(torch.tensor([[torch.nan, 1.0]])).isnan()


@pytest.mark.parametrize("norms", ["none", "of each head", "over all heads"])
@pytest.mark.parametrize("tokens", [0, 1, 700])
def test_heads(tokens: int, norms: str) -> None:
    random = torch.Generator().manual_seed(0)
    sizes = {"none": [], "of each head": [DIM, DIM], "over all heads": [heads * DIM for heads in HEADS]}[norms]
    weights = [torch.randn(size, generator=random) for size in sizes]
    x = torch.randn(tokens, (HEADS[0] + 2 * HEADS[1]) * DIM, generator=random)
    if tokens:
        assert_near(fused_heads, plain_heads, (x, *weights))
    else:
        assert all(not part.numel() for part in with_gradients(fused_heads, (x,)))
    torch.testing.assert_close(fused_heads(x.T.contiguous().T, *weights), fused_heads(x, *weights), rtol=0, atol=0)


def test_gradients_do_not_depend_on_threads() -> None:
    random = torch.Generator().manual_seed(0)
    x, weight = torch.randn(3000, 48, generator=random), torch.randn(48, generator=random)
    found = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        found.append(with_gradients(lambda x, weight: rms_norm(x, weight, EPS), (x, weight)))
        norms = torch.linspace(0.5, 1.5, 2 * DIM).split(DIM)
        found[-1] += with_gradients(fused_heads, (x.view(-1, 10 * DIM)[:700], *norms))
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
        swiglu(torch.ones(2, 4, dtype=torch.float64))
    with pytest.raises(RuntimeError, match=r"\[tokens, 2 \* inner\]"):
        swiglu(torch.ones(2, 3))
    x, cos, sin = torch.ones(2, 6), torch.ones(2, 2), torch.ones(2, 2)
    with pytest.raises(RuntimeError, match=r"qkv must be \[tokens"):
        qkv_heads(x, cos, sin, (2, 1))
    with pytest.raises(RuntimeError, match=r"must be \[2, 2\]"):
        qkv_heads(x, cos[:1], sin, (1, 1))
    with pytest.raises(RuntimeError, match="of two halves"):
        qkv_heads(torch.ones(2, 9), torch.ones(2, 3), torch.ones(2, 3), (1, 1))
    with pytest.raises(RuntimeError, match="expected 2 or, over all heads, 2"):
        qkv_heads(x, cos, sin, (1, 1), (torch.ones(2), torch.ones(3)), EPS)


def results(model: Any, response: int = 12) -> list[Tensor]:
    """Logits and gradients of a prompt of 16 tokens and two responses to it."""
    tokens = 16 + 2 * response
    ids = torch.arange(tokens) * 11 % VOCABULARY
    positions = torch.tensor([*range(16), *range(16, 16 + response), *range(16, 16 + response)])
    attention = PrefixAttention.from_segments([16, response, response], [-1, 0, 0], ids.device)
    logits = Policy(model)(ids, positions, attention, torch.arange(tokens), linear_head)
    cross_entropy(logits, torch.arange(tokens) % VOCABULARY).backward()
    return [logits.detach(), *(parameter.grad for parameter in model.parameters())]


# 40 tokens are too few for joint products, 80 are enough.
@pytest.mark.parametrize("response", [12, 32])
@pytest.mark.parametrize("biases", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_models(family: str, biases: bool, response: int) -> None:
    plain = random_model(family, NAME)
    if biases:
        for layer in plain.model.layers:
            for module in (layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj, layer.mlp.gate_proj):
                module.bias = torch.nn.Parameter(torch.linspace(-1, 1, module.out_features))
    fused, exact = copy.deepcopy(plain), copy.deepcopy(plain).double()
    fuse_elementwise(fused)
    kinds = [type(module).__name__ for module in fused.modules()]
    assert kinds.count(f"Fused{family.capitalize()}MLP") == kinds.count(f"Fused{family.capitalize()}Attention") == 3
    assert all(kind.startswith("Fused") for kind in kinds if kind.endswith("RMSNorm"))
    assert_as_exact(results(fused, response), results(plain, response), results(exact, response))


def test_joint_products_keep_no_copy_of_the_weights() -> None:
    model = random_model("llama", NAME)
    fuse_elementwise(model)
    kept: set[tuple[int, ...]] = set()

    def note(tensor: Tensor) -> Tensor:
        kept.add(tuple(tensor.shape))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        results(model, 28)
    hidden, inner, heads = 64, 96, 64 + 2 * 32
    assert {(72, 2 * inner), (inner, hidden)} < kept  # gate and up, and the weight of each
    assert not {(2 * inner, hidden), (heads, hidden)} & kept


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_types_run_the_modules_own_way(dtype: torch.dtype) -> None:
    plain = random_model("llama", NAME).to(dtype)
    fused = copy.deepcopy(plain)
    fuse_elementwise(fused)
    for a, b in zip(results(fused), results(plain), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("family", FAMILIES)
def test_one_model_trains_and_samples_with_fused_modules(family: str) -> None:
    model = random_model(family, NAME)
    fuse_elementwise(model)
    before = [tensor.clone() for tensor in results(model)]
    model.zero_grad()
    assert fuse_attention(model, 64)
    assert all(torch.equal(a, b) for a, b in zip(results(model), before, strict=True))


def test_another_activation_stays() -> None:
    config = LlamaConfig(
        hidden_act="gelu", vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=1,
        num_attention_heads=2,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config)
    fuse_elementwise(model)
    kinds = {type(module).__name__ for module in model.modules()}
    assert "LlamaMLP" in kinds and "FusedLlamaRMSNorm" in kinds

"""The ops of a decoder layer on the CPU: in C++ where they are fp32, in plain torch in other types."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import Qwen3Config
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.olmo2.modeling_olmo2 import Olmo2RMSNorm
from transformers.models.qwen3.modeling_qwen3 import (
    Qwen3Attention,
    Qwen3MLP,
    Qwen3RotaryEmbedding,
    apply_rotary_pos_emb,
)

from tests.kernels.accuracy import normal
from tests.kernels.dispatched import Dispatched
from tests.kernels.layers import CASES, EPS, Case, check, check_merge, gate_case, norm_case, rotary_case, run
from thinktwice_kernels import merge_attention, native, reference, rms_norm, rotary, swiglu

CPU = torch.device("cpu")
SMALL = {
    "norm": norm_case(3, 5),
    "add and norm": norm_case(3, 5, residual=True, cast_first=False),
    "gate": gate_case(3, 6),
    "rotary": rotary_case(3, (2, 1, 4)),
    "rotary, each head normed": rotary_case(3, (2, 1, 4), "each head", shared_angles=True),
    "rotary, all heads normed": rotary_case(3, (2, 1, 4), "all heads"),
}
small = pytest.mark.parametrize("case", SMALL.values(), ids=list(SMALL))


def leaves_of(case: Case, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return [x.to(dtype).requires_grad_() for x in case.leaves.values()]


def call(case: Case, *leaves: Tensor) -> tuple[Tensor, ...]:
    found = case.op(**dict(zip(case.leaves, leaves, strict=True)), **case.options)
    return found if isinstance(found, tuple) else (found,)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_accuracy(name: str, dtype: torch.dtype) -> None:
    check(CASES[name], dtype, CPU)


@small
def test_gradients_are_derivatives(case: Case) -> None:
    assert torch.autograd.gradcheck(lambda *leaves: call(case, *leaves), leaves_of(case, torch.float64))


@small
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_schema_fake_and_autograd_agree(case: Case, dtype: torch.dtype) -> None:
    calls: list[tuple[Any, tuple[Any, ...]]] = []

    class Recording(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func.namespace == "thinktwice_kernels":
                given = (x.detach().requires_grad_(is_leaf(x)) if isinstance(x, Tensor) else x for x in args)
                calls.append((func, tuple(given)))
            return func(*args, **(kwargs or {}))

    leaves = leaves_of(case, dtype)

    def is_leaf(x: Tensor) -> bool:
        return not calls and any(x is leaf for leaf in leaves)  # what the backward op is given needs no gradient

    with Recording():
        outputs = call(case, *leaves)
        torch.autograd.grad([x.float().square().sum() for x in outputs], leaves)
    assert len(calls) == 2  # forward, backward
    assert any(isinstance(x, Tensor) and x.requires_grad for x in calls[0][1])
    for op, arguments in calls:
        torch.library.opcheck(op, arguments)


@small
def test_compiles_whole_with_gradients(case: Case) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(lambda *leaves: call(case, *leaves), fullgraph=True, backend="aot_eager")
    leaves = leaves_of(case)
    outputs = compiled(*leaves), call(case, *leaves)
    assert all(torch.equal(a, b) for a, b in zip(*outputs, strict=True))
    d_compiled, d_called = (torch.autograd.grad([x.sum() for x in found], leaves) for found in outputs)
    assert all(torch.equal(a, b) for a, b in zip(d_compiled, d_called, strict=True))


@small
def test_a_new_number_of_tokens_compiles_nothing_again(case: Case) -> None:
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounter()
    compiled = torch.compile(case.op, fullgraph=True, backend=counter, dynamic=True)
    for tokens in (70, 71, 90):
        grown = {name: normal(tokens, *x.shape[1:]).float() if x.dim() == 2 else x.float() for name, x in
                 {**case.leaves, **case.options}.items() if isinstance(x, Tensor)}  # fmt: skip
        compiled(**{**case.options, **grown})
    assert counter.frame_count == 1


@small
def test_a_second_derivative_is_an_error(case: Case) -> None:
    leaves = leaves_of(case)
    gradients = torch.autograd.grad([x.square().sum() for x in call(case, *leaves)], leaves, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        gradients[0].sum().backward()


@small
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_strides_change_nothing(case: Case, dtype: torch.dtype) -> None:
    leaves = leaves_of(case, dtype)
    strided = [torch.stack([x.detach(), x.detach()], -1)[..., 0].requires_grad_() for x in leaves]
    assert not strided[0].is_contiguous()
    outputs, same = call(case, *leaves), call(case, *strided)
    incoming = [torch.ones(()).to(dtype).expand(x.shape) for x in outputs]
    want = torch.autograd.grad(outputs, leaves, [x.contiguous() for x in incoming])
    got = torch.autograd.grad(same, strided, incoming)
    assert all(torch.equal(a, b) for a, b in zip((*same, *got), (*outputs, *want), strict=True))


@pytest.mark.parametrize("case", [norm_case(3000, 48), rotary_case(700, (6, 2, 12), "each head")])
def test_gradients_do_not_depend_on_threads(case: Case) -> None:
    found = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(run(case.op, case, torch.float32, CPU, case.leaves))
    finally:
        torch.set_num_threads(1)
    for other in found[1:]:
        assert all(torch.equal(other[name], value) for name, value in found[0].items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rows_do_not_depend_on_the_batch(dtype: torch.dtype) -> None:
    x, weight = normal(40, 96).to(dtype), normal(96, seed=1).to(dtype)
    assert torch.equal(rms_norm(x, weight, EPS)[7:9], rms_norm(x[7:9], weight, EPS))
    assert torch.equal(swiglu(x)[7:9], swiglu(x[7:9]))
    angles = normal(2, 40, 12).float()
    heads: dict[str, Any] = {"query_heads": 4, "kv_heads": 2, "q_norm": weight[:12], "k_norm": weight[:12], "eps": EPS}
    whole, part = rotary(x, *angles, **heads), rotary(x[7:9], *angles[:, 7:9], **heads)
    assert all(torch.equal(a[7:9], b) for a, b in zip(whole, part, strict=True))


def test_frozen_weights_and_unused_results() -> None:
    """A frozen weight gets no gradient; of (y, h) either may be all that is used."""
    x, residual, weight = normal(4, 6).float().requires_grad_(), normal(4, 6, seed=1).float(), torch.ones(6)
    for index in (0, 1):
        y = rms_norm(x, weight, EPS, residual=residual)[index]
        want = reference.rms_norm(x, weight, EPS, residual=residual)[index]
        torch.testing.assert_close(*(torch.autograd.grad(out.square().sum(), x)[0] for out in (y, want)))
    qkv, norm = normal(4, 16).float().requires_grad_(), torch.ones(4)
    for index in range(3):
        arguments: dict[str, Any] = {"query_heads": 2, "kv_heads": 1, "q_norm": norm, "k_norm": norm, "eps": EPS}
        got, want = (op(qkv, *normal(2, 4, 4).float(), **arguments)[index] for op in (rotary, reference.rotary))
        torch.testing.assert_close(*(torch.autograd.grad(out.square().sum(), qkv)[0] for out in (got, want)))


def kept_by(function: Callable[[], Any]) -> list[tuple[int, ...]]:
    """The shapes of what is kept for the backward pass."""
    kept: list[tuple[int, ...]] = []

    def note(x: Tensor) -> Tensor:
        kept.append(tuple(x.shape))
        return x

    with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
        function()
    return kept


def test_what_is_kept_for_the_backward_pass() -> None:
    x, weight = torch.ones(5, 8, requires_grad=True), torch.ones(8, requires_grad=True)
    assert kept_by(lambda: rms_norm(x, weight, EPS, residual=x)) == [(5, 8), (8,)]
    assert kept_by(lambda: swiglu(x)) == [(5, 8)]
    angles = torch.ones(2, 5, 2)
    assert kept_by(lambda: rotary(x, *angles, query_heads=2, kv_heads=1)) == [(5, 2), (5, 2)]
    norm = torch.ones(2)
    assert (5, 8) in kept_by(lambda: rotary(x, *angles, query_heads=2, kv_heads=1, q_norm=norm))


def test_the_joint_gradient_is_written_once() -> None:
    """Not as slices in zeros that are added up."""
    qkv, angles = torch.ones(5, 8, requires_grad=True), torch.ones(2, 5, 2)
    outputs = rotary(qkv, *angles, query_heads=2, kv_heads=1, q_norm=torch.ones(2), k_norm=torch.ones(2))
    incoming = [torch.ones_like(x) for x in outputs]
    with Dispatched() as seen:
        torch.autograd.grad(outputs, qkv, incoming)
    assert seen.launches() == ["thinktwice_kernels.rotary_backward.default"]


def test_far_out_and_not_finite() -> None:
    gate = torch.tensor([-200.0, -88.5, -87.0, 0.0, 87.0, 200.0])
    case = Case(swiglu, reference.swiglu, reference.swiglu, {"gate_up": torch.stack([gate, torch.ones(6)], 1)})
    want = run(reference.swiglu, case, torch.float64, CPU, case.leaves)
    for name, got in run(swiglu, case, torch.float32, CPU, case.leaves).items():
        torch.testing.assert_close(got.double(), want[name], rtol=1e-5, atol=1e-30)
    row = torch.tensor([[torch.nan, 1.0]])
    assert swiglu(row).isnan() and rms_norm(row, torch.ones(2), EPS).isnan().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_two_parts_of_an_attention(dtype: torch.dtype) -> None:
    check_merge(dtype, CPU)


def test_what_does_not_fit_is_refused() -> None:
    x, weight, table = torch.ones(2, 8), torch.ones(8), torch.ones(2, 2)
    refused: list[tuple[str, Callable[[], Any]]] = [
        (r"x has shape \[2, 8\], weight \[7\]", lambda: rms_norm(x, weight[:7], EPS)),
        ("H at least 1", lambda: rms_norm(x[:, :0], weight[:0], EPS)),
        ("floating-point", lambda: rms_norm(x.int(), weight, EPS)),
        (r"residual is torch.float32 \[8\]", lambda: rms_norm(x, weight, EPS, residual=weight)),
        ("residual is torch.bfloat16", lambda: rms_norm(x, weight, EPS, residual=x.bfloat16())),
        ("side by side", lambda: swiglu(x[:, :3])),
        ("side by side", lambda: swiglu(x[:, :0])),
        ("floating-point", lambda: swiglu(x.int())),
        ("even D", lambda: rotary(x, table, table, query_heads=3, kv_heads=1)),
        ("even D", lambda: rotary(x[:, :4], table, table, query_heads=2, kv_heads=1)),
        ("even D", lambda: rotary(x, table, table, query_heads=4, kv_heads=0)),
        ("floating-point", lambda: rotary(x.int(), table, table, query_heads=2, kv_heads=1)),
        (r"\[2, 2\] or \[2, 1\]", lambda: rotary(x, table[:1], table[:1], query_heads=2, kv_heads=1)),
        ("wants a gradient", lambda: rotary(x, table, table.clone().requires_grad_(), query_heads=2, kv_heads=1)),
        (r"k_norm has shape \[4\]", lambda: rotary(x, table, table, query_heads=2, kv_heads=1, k_norm=weight[:4])),
        (r"pass two \[Q, H, D\]", lambda: merge_attention(x[None], table, x[None].double(), table)),
        (r"pass \[2, 1\] of torch.float32", lambda: merge_attention(x[None], x, x[None], x)),
    ]
    for message, function in refused:
        with pytest.raises(ValueError, match=message):
            function()


def test_the_extension_computes_float32_on_the_cpu_alone() -> None:
    assert native.computes(torch.ones(1), None)
    assert not native.computes(torch.ones(1), torch.ones(1, dtype=torch.float64))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("kind", "cast_first"), [(LlamaRMSNorm, True), (Olmo2RMSNorm, False)])
def test_norms_of_transformers(kind: Any, cast_first: bool, dtype: torch.dtype) -> None:
    module, x = kind(64, eps=EPS).to(dtype), normal(9, 64).to(dtype)
    torch.nn.init.normal_(module.weight, 1.0, 0.5)
    torch.testing.assert_close(rms_norm(x, module.weight, EPS, cast_first=cast_first), module(x), rtol=1e-6, atol=1e-6)
    if dtype == torch.bfloat16:  # the two modes differ
        assert not torch.equal(rms_norm(x, module.weight, EPS, cast_first=not cast_first), module(x))


def test_mlp_and_attention_of_transformers() -> None:
    config = Qwen3Config(hidden_size=32, intermediate_size=48, num_attention_heads=4, num_key_value_heads=2, head_dim=8)
    x, mlp, attention = normal(1, 7, 32).float(), Qwen3MLP(config), Qwen3Attention(config, 0)
    gate_up = torch.cat([mlp.gate_proj(x), mlp.up_proj(x)], -1)
    torch.testing.assert_close(mlp.down_proj(swiglu(gate_up)), mlp(x))
    for norm in (attention.q_norm, attention.k_norm):
        torch.nn.init.normal_(norm.weight, 1.0, 0.5)
    cos, sin = Qwen3RotaryEmbedding(config)(x, torch.arange(7)[None])
    q, k, v = (projection(x).view(1, 7, -1, 8) for projection in (attention.q_proj, attention.k_proj, attention.v_proj))
    qkv = torch.cat([part.flatten(2) for part in (q, k, v)], -1)[0]
    q_norm, k_norm = attention.q_norm.weight, attention.k_norm.weight
    options: dict[str, Any] = {"q_norm": q_norm, "k_norm": k_norm, "eps": config.rms_norm_eps}
    got = rotary(qkv, cos[0], sin[0], query_heads=4, kv_heads=2, **options)
    turned = apply_rotary_pos_emb(attention.q_norm(q), attention.k_norm(k), cos, sin, unsqueeze_dim=2)
    for mine, theirs in zip(got, (*turned, v), strict=True):
        torch.testing.assert_close(mine, theirs[0])

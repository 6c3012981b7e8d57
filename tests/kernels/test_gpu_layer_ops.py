"""The ops of a decoder layer on CUDA, where there is one, against their definitions in float64 on the CPU."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.kernels.accuracy import normal
from tests.kernels.layers import CASES, EPS, Case, check, check_merge, gate_case, norm_case, rotary_case, run
from thinktwice_kernels import rms_norm, rotary, swiglu

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]
CUDA = torch.device("cuda")
# Shapes of models, and what the registers do not hold: that runs in plain torch.
SHAPES = {
    "norm, 4096": norm_case(700, 4096, residual=True),
    "norm, 16384": norm_case(40, 16384, residual=True),
    "norm, too wide": norm_case(3, 40_000),
    "gate, 9728": gate_case(300, 2 * 9728),
    "rotary of Qwen3-4B": rotary_case(700, (32, 8, 128), "each head"),
    "rotary of OLMo-2-13B": rotary_case(300, (40, 40, 128), "all heads"),
    "rotary, too many heads": rotary_case(3, (200, 8, 128), "each head"),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("name", [*CASES, *SHAPES])
def test_accuracy(name: str, dtype: torch.dtype) -> None:
    check((CASES | SHAPES)[name], dtype, CUDA)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_two_parts_of_an_attention(dtype: torch.dtype) -> None:
    for dim in (24, 128):
        check_merge(dtype, CUDA, dim)


@pytest.mark.parametrize("case", [SHAPES["norm, 4096"], SHAPES["rotary of Qwen3-4B"]], ids=["norm", "rotary"])
def test_gradients_are_the_same_every_time(case: Case) -> None:
    first, second = (run(case.op, case, torch.bfloat16, CUDA, case.leaves) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_rows_do_not_depend_on_the_batch() -> None:
    x, weight = normal(900, 4096).to(CUDA, torch.bfloat16), normal(4096, seed=1).to(CUDA, torch.bfloat16)
    assert torch.equal(rms_norm(x, weight, EPS)[700:701], rms_norm(x[700:701], weight, EPS))
    assert torch.equal(swiglu(x)[700:701], swiglu(x[700:701]))
    angles = normal(2, 900, 128).float().to(CUDA)
    heads: dict[str, Any] = {
        "query_heads": 16,
        "kv_heads": 8,
        "q_norm": weight[:128],
        "k_norm": weight[:128],
        "eps": EPS,
    }
    whole, part = rotary(x, *angles, **heads), rotary(x[700:703], *angles[:, 700:703], **heads)
    assert all(torch.equal(a[700:703], b) for a, b in zip(whole, part, strict=True))


def test_more_than_2_31_elements() -> None:
    rows = 2**31 // 16384 + 8
    gate_up = torch.zeros(rows, 16384, dtype=torch.bfloat16, device=CUDA)
    gate_up[-1] = normal(16384).to(CUDA, torch.bfloat16)
    assert torch.equal(swiglu(gate_up)[-1:], swiglu(gate_up[-1:]))
    weight = torch.ones(16384, dtype=torch.bfloat16, device=CUDA)
    assert torch.equal(rms_norm(gate_up, weight, EPS)[-1:], rms_norm(gate_up[-1:], weight, EPS))


def test_under_a_graph() -> None:
    """Captured once, run with other values."""
    x, weight = torch.zeros(9, 2048, device=CUDA), torch.ones(2048, device=CUDA)
    rms_norm(x, weight, EPS)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = rms_norm(x, weight, EPS)
    x.copy_(normal(9, 2048))
    graph.replay()
    torch.testing.assert_close(y, rms_norm(x, weight, EPS))


def with_gradients(function: Callable[..., Any], *inputs: Tensor) -> list[Tensor]:
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    found = function(*leaves)
    outputs = found if isinstance(found, tuple) else (found,)
    incoming = [normal(*x.shape, seed=5 + i).to(x) for i, x in enumerate(outputs)]
    # Liger's functions write gradients over what flows in.
    return [*(x.detach().clone() for x in outputs), *torch.autograd.grad(outputs, leaves, incoming)]


def assert_near(got: list[Tensor], want: list[Tensor]) -> None:
    for mine, its in zip(got, want, strict=True):
        assert float((mine - its).float().norm() / its.float().norm()) < 0.01


@pytest.mark.parametrize(("casting_mode", "cast_first"), [("llama", True), ("gemma", False)])
def test_norm_is_that_of_liger(casting_mode: str, cast_first: bool) -> None:
    function = pytest.importorskip("liger_kernel.ops").LigerRMSNormFunction
    x, weight = normal(300, 2560).to(CUDA, torch.bfloat16), 1 + 0.3 * normal(2560, seed=1).to(CUDA, torch.bfloat16)
    theirs = with_gradients(lambda x, w: function.apply(x, w, EPS, 0.0, casting_mode, False), x, weight)
    assert_near(with_gradients(lambda x, w: rms_norm(x, w, EPS, cast_first=cast_first), x, weight), theirs)


def test_gate_is_that_of_liger() -> None:
    function = pytest.importorskip("liger_kernel.ops").LigerSiLUMulFunction
    gate_up = normal(300, 2 * 9728).to(CUDA, torch.bfloat16)
    theirs = with_gradients(lambda x: function.apply(*(half.contiguous() for half in x.chunk(2, 1))), gate_up)
    assert_near(with_gradients(swiglu, gate_up), theirs)


def test_rotation_is_that_of_liger() -> None:
    function = pytest.importorskip("liger_kernel.ops").LigerRopeFunction
    qkv = normal(300, 48 * 128).to(CUDA, torch.bfloat16)
    cos, sin = normal(2, 300, 64, seed=2).repeat(1, 1, 2).float().to(CUDA)

    def theirs(x: Tensor) -> tuple[Tensor, ...]:
        q, k, v = x.unflatten(1, (48, 128)).split([32, 8, 8], 1)
        turned = function.apply(*(part.transpose(0, 1)[None].clone() for part in (q, k)), cos[None], sin[None])
        return *(part[0].transpose(0, 1) for part in turned), v

    ours = with_gradients(lambda x: rotary(x, cos, sin, query_heads=32, kv_heads=8), qkv)
    assert_near(ours, with_gradients(theirs, qkv))

"""The ops of a decoder layer on CUDA, where there is one, against their definitions in float64 on the CPU."""

import pytest
import torch

from tests.kernels.accuracy import normal
from tests.kernels.layers import CASES, EPS, Case, check, gate_case, norm_case, rotary_case, run
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


@pytest.mark.parametrize("case", [SHAPES["norm, 4096"], SHAPES["rotary of Qwen3-4B"]], ids=["norm", "rotary"])
def test_gradients_are_the_same_every_time(case: Case) -> None:
    first, second = (run(case.op, case, torch.bfloat16, CUDA, case.leaves) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_rows_do_not_depend_on_the_batch() -> None:
    x, weight = normal(900, 4096).to(CUDA, torch.bfloat16), normal(4096, seed=1).to(CUDA, torch.bfloat16)
    assert torch.equal(rms_norm(x, weight, EPS)[700:701], rms_norm(x[700:701], weight, EPS))
    assert torch.equal(swiglu(x)[700:701], swiglu(x[700:701]))
    angles = normal(2, 900, 128).float().to(CUDA)
    heads = {"query_heads": 16, "kv_heads": 8, "q_norm": weight[:128], "k_norm": weight[:128], "eps": EPS}
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

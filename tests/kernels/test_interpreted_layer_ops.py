"""The Triton kernels of the ops of a decoder layer in Triton's interpreter; run by test_aot.py."""

import os

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs TRITON_INTERPRET=1", allow_module_level=True)

from tests.kernels.accuracy import normal
from tests.kernels.interpreter import patch_language_once, round_bfloat16_to_nearest
from tests.kernels.layers import CASES, EPS, Case, check, check_merge, norm_case, rotary_case
from thinktwice_kernels import launch, rms_norm, rotary

patch_language_once()
round_bfloat16_to_nearest()
CPU = torch.device("cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_accuracy(name: str, dtype: torch.dtype) -> None:
    check(CASES[name], dtype, CPU)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["add and norm", "gate", "rotary, all heads normed"])
def test_other_types(name: str, dtype: torch.dtype) -> None:
    check(CASES[name], dtype, CPU)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_two_parts_of_an_attention(dtype: torch.dtype) -> None:
    check_merge(dtype, CPU)


@pytest.mark.parametrize("processors", [1, 3])
@pytest.mark.parametrize("case", [norm_case(100, 300), rotary_case(50, (3, 1, 6), "each head")], ids=["norm", "rotary"])
def test_programs_share_the_rows(processors: int, case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "processors", lambda _: processors)
    check(case, torch.float32, CPU)


def test_strides_and_frozen_norms() -> None:
    x, weight = normal(6, 32).float(), normal(12, seed=1).float()
    wide = torch.cat([x, x], 1)[:, :32].requires_grad_()  # rows that lie further apart
    angles = normal(2, 6, 4).float()
    found = []
    for rows in (
        wide,
        wide.detach().contiguous().requires_grad_(),
        wide.detach().t().contiguous().t().requires_grad_(),
    ):
        y = rms_norm(rows, torch.ones(32), EPS)
        q, k, v = rotary(rows, *angles, query_heads=4, kv_heads=2, q_norm=weight[:4], eps=EPS)
        found.append((y, q, k, v, *torch.autograd.grad([y.sum(), q.square().sum(), k.sum(), v.sum()], rows)))
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))


def test_rotation_is_that_of_liger() -> None:
    """Its other two kernels don't run in the interpreter: test_gpu_layer_ops.py has all three."""
    function = pytest.importorskip("liger_kernel.ops").LigerRopeFunction
    q, k = normal(5, 4, 8).float(), normal(5, 2, 8, seed=1).float()
    cos, sin = normal(2, 5, 4, seed=2).float().repeat(1, 1, 2)
    theirs = function.apply(q.transpose(0, 1)[None].clone(), k.transpose(0, 1)[None].clone(), cos[None], sin[None])
    got = rotary(torch.cat([q, k, k], 1).flatten(1), cos, sin, query_heads=4, kv_heads=2)
    for mine, its in zip(got, theirs, strict=False):
        torch.testing.assert_close(mine, its[0].transpose(0, 1))

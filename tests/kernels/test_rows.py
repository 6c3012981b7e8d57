"""Rows of logits on the CPU, in C++, against their definition, and the library itself."""

import math
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.csrc.test_native import build_and_run
from thinktwice_kernels import reference
from thinktwice_kernels.launch import accumulation_dtype
from thinktwice_kernels.rows import Head, row_gradient, row_statistics

ROOT = Path(__file__).parents[2]
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
# ||error|| / ||value||. In fp32 a log-sum-exp below 32 is rounded by at most 1e-6, which moves every p as much.
TOLERANCE = {torch.float32: 2e-6, torch.float64: 1e-12}

HEADS: dict[str, dict[str, Any]] = {
    "plain": {},
    "temperature": {"temperature": 0.7},
    "temperatures": {"temperature": "per row"},
    "soft cap": {"softcap": 5.0},
    "everything": {"bias": torch.float16, "temperature": "per row", "softcap": 30.0},
}


def normal(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0, scale: float = 1.0) -> Tensor:
    rng = torch.Generator().manual_seed(seed)
    return (torch.randn(*shape, generator=rng, dtype=torch.float64) * scale).to(dtype)


def strided(values: Tensor) -> Tensor:
    """The same with a row stride above the number of columns, between columns of NaN."""
    wide = values.new_full((values.shape[0], values.shape[1] + 3), math.nan)
    wide[:, :-3] = values
    return wide[:, :-3]


def make_head(case: str, rows: int, vocabulary: int) -> Head:
    given = dict(HEADS[case])
    if "bias" in given:
        given["bias"] = normal(vocabulary, dtype=given["bias"], seed=1)
    if given.get("temperature") == "per row":
        given["temperature"] = torch.linspace(0.6, 1.5, rows)
    return Head(**given)


def definition(
    logits: Tensor, targets: Tensor, head: Head, d_logps: Tensor, d_entropy: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probabilities, entropy and the gradient, all in float64."""
    leaf = logits.double().requires_grad_()
    capped = leaf if head.bias is None else leaf + head.bias.double()
    if head.softcap is not None:
        capped = head.softcap * torch.tanh(capped / head.softcap)
    temperature = head.temperature.double() if isinstance(head.temperature, Tensor) else head.temperature
    logps, entropy = reference.token_logprobs(capped, targets, temperature=temperature, return_entropy=True)
    (gradient,) = torch.autograd.grad([logps, entropy], [leaf], [d_logps.double(), d_entropy.double()])
    return logps.detach(), entropy.detach(), gradient


def run(
    logits: Tensor, targets: Tensor, head: Head, d_logps: Tensor | None, d_entropy: Tensor | None, **where: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The log-probabilities, log-sum-exp, entropy and gradient, the latter in a poisoned buffer."""
    logps, lse, entropy = row_statistics(logits, targets, head, True)
    assert entropy is not None
    rows = where.get("rows")
    out = where.get("out")
    if out is None:
        shape = [logits.shape[0] if rows is None else rows.numel(), logits.shape[1]]
        out = strided(torch.full(shape, math.nan, dtype=where.get("dtype", logps.dtype)))
    row_gradient(logits, targets, head, lse, entropy, d_logps, d_entropy, rows, out)
    return logps, lse, entropy, out


def relative_error(got: Tensor, want: Tensor) -> float:
    error = float((got.double() - want).norm())
    return error / float(want.norm()) if error != 0 else 0.0


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocabulary", [1, 7, 50_257, 128_256])
@pytest.mark.parametrize("case", HEADS)
def test_rows_equal_the_definition(dtype: torch.dtype, vocabulary: int, case: str) -> None:
    logits = strided(normal(2, vocabulary, dtype=dtype, scale=3.0))
    targets = torch.tensor([0, vocabulary - 1])
    head, d_logps, d_entropy = make_head(case, 2, vocabulary), normal(2, seed=2), normal(2, seed=3)
    logps, lse, entropy, gradient = run(logits, targets, head, d_logps, d_entropy)
    assert logps.dtype == lse.dtype == entropy.dtype == accumulation_dtype(logits)
    want = definition(logits, targets, head, d_logps, d_entropy)
    for got, expected in zip((logps, entropy, gradient), want, strict=True):
        assert relative_error(got, expected) < TOLERANCE[logps.dtype]
    assert gradient._base is not None and gradient._base[:, -3:].isnan().all(), "wrote beyond the row"


@settings(max_examples=60)
@given(
    vocabulary=st.one_of(st.integers(1, 70), st.integers(1000, 1100), st.integers(2000, 4200)),
    order=st.sampled_from(["rising", "falling", "random"]),
    scale=st.sampled_from([0.0, 1.0, 30.0]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    case=st.sampled_from(sorted(HEADS)),
    seed=st.integers(0, 1000),
)
def test_maxima_may_lie_anywhere(
    vocabulary: int, order: str, scale: float, dtype: torch.dtype, case: str, seed: int
) -> None:
    logits = normal(3, vocabulary, dtype=dtype, seed=seed, scale=scale)
    if order != "random":
        logits = logits.sort(dim=1, descending=order == "falling").values
    targets = torch.randint(0, vocabulary, (3,), generator=torch.Generator().manual_seed(seed))
    head, ones = make_head(case, 3, vocabulary), torch.ones(3)
    logps, _, entropy, gradient = run(logits, targets, head, ones, ones)
    want = definition(logits, targets, head, ones, ones)
    # A log-sum-exp of up to 256 is rounded by 8e-6.
    rtol, atol = (2e-5, 1e-5) if dtype == torch.float32 else (1e-11, 1e-12)
    for got, expected in zip((logps, entropy, gradient), want, strict=True):
        torch.testing.assert_close(got.double(), expected, rtol=rtol, atol=atol)


@pytest.mark.parametrize("d_entropy", [0.0, 1.0])
@pytest.mark.parametrize("case", HEADS)
def test_probabilities_near_one_keep_their_digits(case: str, d_entropy: float) -> None:
    logits, targets = normal(3, 3000), torch.tensor([0, 1500, 2999])
    logits[torch.arange(3), targets] = torch.tensor([12.0, 15.0, 18.0])
    head, flows = make_head(case, 3, 3000), torch.full((3,), d_entropy)
    logps, _, entropy, gradient = run(logits, targets, head, torch.ones(3), flows)
    want = definition(logits, targets, head, torch.ones(3), flows)
    torch.testing.assert_close(entropy.double(), want[1], rtol=1e-5, atol=0)
    for got, expected in zip((*logps, *gradient), (*want[0], *want[2]), strict=True):
        assert relative_error(got, expected) < 1e-5


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("out_dtype", DTYPES, ids=str)
def test_gradient_is_rounded_once_to_the_type_of_out(dtype: torch.dtype, out_dtype: torch.dtype) -> None:
    logits, targets = normal(3, 1030, dtype=dtype, scale=4.0), torch.tensor([3, 0, 1029])
    d_logps = torch.tensor([1.0, -1e4, 1e7])  # the last overflows in float16
    exact = run(logits, targets, Head(), d_logps, None)[3]
    rounded = run(logits, targets, Head(), d_logps, None, dtype=out_dtype)[3]
    assert torch.equal(rounded, exact.to(out_dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", ["plain", "everything"])
def test_chosen_rows_in_place_and_elsewhere(dtype: torch.dtype, case: str) -> None:
    logits, targets = strided(normal(5, 1030, dtype=dtype)), torch.arange(5)
    head, d_logps, d_entropy = make_head(case, 5, 1030), normal(5, seed=2), normal(5, seed=3)
    whole = run(logits, targets, head, d_logps, d_entropy, dtype=dtype)[3]
    rows = torch.tensor([1, 4])
    some = run(logits, targets, head, d_logps, d_entropy, dtype=dtype, rows=rows)[3]
    assert torch.equal(some, whole[rows])
    before = logits.clone()
    written = strided(before)
    run(written, targets, head, d_logps, d_entropy, rows=rows, out=written)
    assert torch.equal(written[rows], some) and torch.equal(written[[0, 2, 3]], before[[0, 2, 3]])
    run(logits, targets, head, d_logps, d_entropy, out=logits)
    assert torch.equal(logits, whole)
    assert run(before, targets, head, d_logps, d_entropy, rows=rows[:0])[3].shape == (0, 1030)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("softcap", [None, 20.0])
def test_minus_infinity_is_a_token_that_cannot_be_drawn(dtype: torch.dtype, softcap: float | None) -> None:
    logits = normal(2, 2100, dtype=dtype)
    logits[0, :1030] = logits[1, 1500:] = -math.inf
    targets = torch.tensor([2000, 1400])
    logps, _, entropy, gradient = run(logits, targets, Head(softcap=softcap), torch.ones(2), torch.ones(2))
    want = definition(logits, targets, Head(softcap=softcap), torch.ones(2), torch.ones(2))
    if softcap is None:  # autograd multiplies the 0 of the definition by log 0
        want[2][logits == -math.inf] = 0
    for got, expected in zip((logps, entropy, gradient), want, strict=True):
        assert relative_error(got, expected) < TOLERANCE[logps.dtype]
    assert not gradient[logits == -math.inf].any()
    assert run(logits, torch.tensor([0, 2000]), Head(), None, None)[0].tolist() == [-math.inf] * 2


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bad", ["nan", "inf", "nothing to draw", "temperature"])
@pytest.mark.parametrize("at", [0, 1029, 2099])
def test_bad_rows_are_nan_and_the_others_are_not(dtype: torch.dtype, bad: str, at: int) -> None:
    logits, temperature = normal(3, 2100, dtype=dtype), torch.ones(3)
    if bad == "temperature":
        temperature[1] = -1.0 if at else 0.0
    else:
        logits[1, slice(None) if bad == "nothing to draw" else at] = {"nan": math.nan, "inf": math.inf}.get(
            bad, -math.inf
        )
    results = run(logits, torch.tensor([1, 2, 3]), Head(None, temperature), torch.ones(3), torch.ones(3))
    logps, lse, entropy, gradient = results
    assert logps[1].isnan() and entropy[1].isnan() and gradient[1].isnan().all()
    assert lse[1].isnan() or (bad == "nothing to draw" and lse[1] == -math.inf)
    assert not any(result[[0, 2]].isnan().any() for result in results)
    skipped = run(logits, torch.tensor([1, 2, 3]), Head(None, temperature), torch.tensor([1.0, 0, 0]), None)[3]
    assert not skipped[1:].any() and skipped[0].any()


@pytest.mark.parametrize("target", [-1, 5, -(2**62), 2**62])
def test_a_target_out_of_range_gives_nan(target: int) -> None:
    logits = normal(2, 5)
    flows = torch.tensor([1.0, 0.0])
    logps, lse, entropy, gradient = run(logits, torch.tensor([target, 0]), Head(), flows, None)
    assert logps.isnan().tolist() == [True, False] and lse.isfinite().all() and entropy.isfinite().all()
    assert gradient[0].isnan().all() and not gradient[1].any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_no_rows_and_no_gradient(dtype: torch.dtype) -> None:
    nothing = torch.empty(0, dtype=torch.int64)
    assert [x.shape for x in run(torch.empty(0, 9, dtype=dtype), nothing, Head(), None, None)] == [
        (0,),
        (0,),
        (0,),
        (0, 9),
    ]
    assert not run(normal(2, 9, dtype=dtype), torch.tensor([1, 2]), Head(), None, None)[3].any()
    assert row_statistics(normal(2, 9), torch.tensor([1, 2]), Head(), False)[2] is None


def test_offsets_beyond_31_bits() -> None:
    stride = 2**31 + 7  # only the pages of the two rows are ever touched
    logits = torch.empty(stride + 100, dtype=torch.bfloat16).as_strided((2, 100), (stride, 1))
    logits.copy_(normal(2, 100))
    targets, d_logps = torch.tensor([3, 4]), torch.ones(2)
    want = run(logits.clone(), targets, Head(), d_logps, None, dtype=torch.bfloat16)
    got = run(logits, targets, Head(), d_logps, None, out=logits)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.fixture
def three_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


def test_threads_do_not_change_the_rows(three_threads: None) -> None:
    logits, targets = normal(64, 2000), torch.arange(64)
    several = run(logits, targets, Head(), torch.ones(64), torch.ones(64))
    torch.set_num_threads(1)
    one = run(logits, targets, Head(), torch.ones(64), torch.ones(64))
    assert all(torch.equal(a, b) for a, b in zip(several, one, strict=True))


def test_bad_arguments_are_one_clear_line() -> None:
    logits, targets = normal(3, 5), torch.arange(3)
    with pytest.raises(RuntimeError, match="contiguous last dimension"):
        row_statistics(normal(5, 3).t(), targets, Head(), False)
    with pytest.raises(RuntimeError, match="targets has 2 entries, expected 3"):
        row_statistics(logits, targets[:2], Head(), False)
    for rows in ([1, 1], [2, 0], [-1], [3]):
        with pytest.raises(RuntimeError, match="rows must rise"):
            run(logits, targets, Head(), torch.ones(3), None, rows=torch.tensor(rows))
    with pytest.raises(RuntimeError, match=r"out is \[2, 5\], expected \[3, 5\]"):
        run(logits, targets, Head(), torch.ones(3), None, out=torch.empty(2, 5))


def test_kernels_of_every_instruction_set(tmp_path: Path) -> None:
    build_and_run(tmp_path, [ROOT / "tests" / "csrc" / "loss_kernels_test.cpp"])


def test_the_library_needs_only_the_stable_abi() -> None:
    if not (nm := shutil.which("nm")):
        pytest.skip("binutils' nm is not installed")
    (library,) = (ROOT / "kernels" / "thinktwice_kernels").glob("_csrc*.so")
    listing = subprocess.run([nm, "-D", "--undefined-only", library], capture_output=True, text=True, check=True)
    symbols = [line.split()[-1] for line in listing.stdout.splitlines()]
    assert [name for name in symbols if name.startswith(("aoti_torch_", "torch_"))]
    assert not [name for name in symbols if name.startswith("Py") or "_ZN2at" in name or "_ZN3c10" in name]


def test_a_missing_library_is_one_clear_line(tmp_path: Path) -> None:
    package = tmp_path / "thinktwice_kernels"
    shutil.copytree(
        ROOT / "kernels" / "thinktwice_kernels", package, ignore=shutil.ignore_patterns("*.so", "__pycache__")
    )
    ran = subprocess.run(
        [sys.executable, "-c", "from thinktwice_kernels.launch import in_cpp; in_cpp('thinktwice_loss')"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
    )
    assert ran.returncode != 0
    assert ran.stderr.strip().splitlines()[-1] == (
        "RuntimeError: the C++ extension of thinktwice_kernels is not built: run `make`, or `pip install ./kernels` in "
        "the repository"
    )

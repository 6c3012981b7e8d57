"""Products with packed weights against float64, and what must not change their bits."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from thinktwice_fast.model.csrc import ops
from thinktwice_fast.model.decoder import PANEL

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# On either side of a block of rows in registers (6 or 12) and of the 256 rows that meet a panel at once.
ROWS = [0, 1, 5, 6, 7, 12, 13, 25, 255, 257, 600]


def packed(*parts: Tensor) -> Tensor:  # each [outputs, inputs] -> [panels, inputs, PANEL]
    """The parts' outputs one after another, over memory that was NaN where outputs lie."""
    outputs, inputs = sum(len(part) for part in parts), parts[0].shape[1]
    result = parts[0].new_zeros(-(-outputs // PANEL), inputs, PANEL)
    result.transpose(1, 2).reshape(-1, inputs)[:outputs] = math.nan
    first = 0
    for part in parts:
        ops.pack_weight(part, result, first)
        first += len(part)
    return result


def normals(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def check_product(x: Tensor, weight: Tensor) -> None:
    """Each sum of n products, added one by one, is off by at most n roundings of the sum of their sizes."""
    got = ops.packed_linear(x, packed(weight), len(weight))
    exact = x.double() @ weight.double().T
    allowed = 1.01 * x.shape[1] * 2.0**-24 * (x.double().abs() @ weight.double().abs().T)
    assert got.shape == exact.shape and got.dtype == torch.float32
    assert ((got - exact).abs() <= allowed).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", ROWS)
def test_rows_of_every_remainder(rows: int, dtype: torch.dtype) -> None:
    check_product(normals(rows, 70), normals(41, 70, seed=1).to(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("inputs", [1, 2, 255, 256, 257, 513])
@pytest.mark.parametrize("outputs", [1, 15, 16, 17, 32, 33, 100])
def test_widths_around_panels_and_parts(inputs: int, outputs: int, dtype: torch.dtype) -> None:
    check_product(normals(30, inputs), normals(outputs, inputs, seed=1).to(dtype))


@settings(max_examples=60)
@given(
    rows=st.integers(0, 300),
    inputs=st.integers(1, 600),
    outputs=st.integers(1, 80),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 1000),
)
def test_random_shapes(rows: int, inputs: int, outputs: int, dtype: torch.dtype, seed: int) -> None:
    check_product(normals(rows, inputs, seed=seed), normals(outputs, inputs, seed=seed + 1).to(dtype))


@settings(max_examples=40)
@given(st.data())
def test_packing_puts_every_weight_in_its_place(data: st.DataObject) -> None:
    """Parts one after another, out of wider matrices: the panels hold them in order, and zeros after the last."""
    inputs = data.draw(st.integers(1, 150), "inputs")
    sizes = data.draw(st.lists(st.integers(1, 70), min_size=1, max_size=3), "outputs")
    dtype = data.draw(st.sampled_from(DTYPES), "dtype")
    wider = data.draw(st.integers(0, 5), "wider")
    parts = [normals(n, inputs + wider, seed=n).to(dtype)[:, :inputs] for n in sizes]
    rows = packed(*parts).transpose(1, 2).reshape(-1, inputs)
    assert torch.equal(rows[: sum(sizes)], torch.cat(parts))
    assert not rows[sum(sizes) :].any()


@pytest.mark.parametrize("dtype", DTYPES)
def test_bits_depend_on_neither_the_other_rows_nor_the_threads(dtype: torch.dtype) -> None:
    """Many rows meet widened weights, few the narrow ones: also these must agree."""
    x, weight = normals(600, 300), packed(normals(200, 300, seed=1).to(dtype))
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            results.append(ops.packed_linear(x, weight, 200))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*results)
    for first, end in ((0, 1), (7, 9), (100, 113), (3, 28), (250, 270), (340, 600)):
        assert torch.equal(ops.packed_linear(x[first:end], weight, 200), results[0][first:end])


def test_bits_do_not_depend_on_the_other_outputs() -> None:
    """A panel by itself and one of a pair, as threads cut them."""
    x, weight = normals(30, 300), normals(80, 300, seed=1)
    whole = ops.packed_linear(x, packed(weight), 80)
    for first in range(0, 80, PANEL):
        alone = ops.packed_linear(x, packed(weight[first : first + PANEL]), PANEL)
        assert torch.equal(alone, whole[:, first : first + PANEL])


@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_stays_where_it_belongs(dtype: torch.dtype) -> None:
    """In padded outputs it is not seen, in a row and in an output it is, and nowhere else."""
    x, panels = normals(30, 40), packed(normals(20, 40, seed=1).to(dtype))
    clean = ops.packed_linear(x, panels, 20)
    panels[1, :, 4:] = math.nan
    assert torch.equal(ops.packed_linear(x, panels, 20), clean)
    x[3, 7] = math.nan
    panels[0, 5, 2] = math.nan
    got = ops.packed_linear(x, panels, 20)
    hidden = got.isnan()
    assert hidden[3].all() and hidden[:, 2].all() and int(hidden.sum()) == 20 + 30 - 1
    assert torch.equal(got[~hidden], clean[~hidden])


def test_wrong_arguments() -> None:
    x, weight, panels = torch.zeros(3, 8), torch.zeros(20, 8), torch.zeros(2, 8, PANEL)
    ops.packed_linear(x, panels, 20)
    of_packed = r"weight must be a CPU tensor \[outputs, 8\] of the type of packed"
    bad_packing = [
        ((weight, panels[0], 0), r"packed must be a contiguous CPU tensor \[panels, inputs, 16\]"),
        ((weight, torch.zeros(2, 8, 8), 0), r"packed must be a contiguous CPU tensor \[panels, inputs, 16\]"),
        ((weight, torch.zeros(2, PANEL, 8).transpose(1, 2), 0), "packed must be a contiguous CPU tensor"),
        ((weight[0], panels, 0), r"weight must be a CPU tensor \[outputs, 8\]"),
        ((weight[:, :7], panels, 0), r"weight must be a CPU tensor \[outputs, 8\]"),
        ((torch.zeros(8, 20).T, panels, 0), r"weight must be a CPU tensor \[outputs, 8\]"),
        ((weight.bfloat16(), panels, 0), of_packed),
        ((weight.bfloat16(), panels.half(), 0), of_packed),
        ((weight, panels, -1), "outputs -1 to 19 lie outside 2 panels of 16"),
        ((weight, panels, 13), "outputs 13 to 33 lie outside 2 panels of 16"),
        ((weight.double(), panels.double(), 0), "type Double is not one of float32, bfloat16, float16"),
        ((weight.int(), panels.int(), 0), "type Int is not one of float32, bfloat16, float16"),
    ]
    for arguments, message in bad_packing:
        with pytest.raises(RuntimeError, match=f"pack_weight: {message}"):
            ops.pack_weight(*arguments)
    bad_products = [
        ((x, panels[0], 20), r"packed must be a contiguous CPU tensor \[panels, inputs, 16\]"),
        ((x[:, :7], panels, 20), r"x must be a contiguous float32 CPU tensor \[rows, 8\]"),
        ((x[0], panels, 20), r"x must be a contiguous float32 CPU tensor \[rows, 8\]"),
        ((x.double(), panels, 20), r"x must be a contiguous float32 CPU tensor \[rows, 8\]"),
        ((torch.zeros(8, 3).T, panels, 20), r"x must be a contiguous float32 CPU tensor \[rows, 8\]"),
        ((x, panels, 0), "2 panels do not hold 0 outputs"),
        ((x, panels, 16), "2 panels do not hold 16 outputs"),
        ((x, panels, 33), "2 panels do not hold 33 outputs"),
        ((x, panels.double(), 20), "type Double is not one of float32, bfloat16, float16"),
    ]
    for arguments, message in bad_products:
        with pytest.raises(RuntimeError, match=f"packed_linear: {message}"):
            ops.packed_linear(*arguments)

"""The Triton kernels compiled ahead of time for three architectures, and run in Triton's interpreter."""

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("Triton compiles nothing while it interprets", allow_module_level=True)

from tests.kernels.batches import make_batch
from tests.kernels.cases import CASES
from thinktwice_kernels.exponentials import new_tile
from thinktwice_kernels.gate import swiglu_gradient_in_triton, swiglu_in_triton
from thinktwice_kernels.launch import PROGRAMS_PER_PROCESSOR, SHAPES, recording
from thinktwice_kernels.merge import merge_in_triton
from thinktwice_kernels.norm import norm_gradients_in_triton, norm_in_triton
from thinktwice_kernels.options import LossInputs, LossOptions
from thinktwice_kernels.rows import Head
from thinktwice_kernels.triton import aot
from thinktwice_kernels.triton.exponentials import (
    add_entropy_in_triton,
    combine_exponentials_in_triton,
    finish_rows_in_triton,
    row_exponentials_in_triton,
    row_shifts_in_triton,
    scale_rows_in_triton,
)
from thinktwice_kernels.triton.head_product import BLOCKS, head_exponentials_in_triton
from thinktwice_kernels.triton.loss import sequence_loss_in_triton
from thinktwice_kernels.triton.rotary import rotary_gradients_in_triton, rotary_in_triton
from thinktwice_kernels.triton.rows import row_gradient_in_triton, row_statistics_in_triton
from thinktwice_kernels.triton.selection import compacted

ROOT = Path(__file__).parent.parent.parent
ROW_KERNELS = ("row_statistics", "combine_statistics", "row_gradient")
IN_STEPS = {"row_statistics", "row_gradient", "row_exponentials", "add_entropy"}  # these go along rows of logits
LAYERS = (
    *("rms_norm_rows", "rms_norm_gradients", "swiglu_rows", "swiglu_gradients", "rotary_heads", "rotary_gradients"),
    "merge_heads",
)
EXPONENTIALS = (
    *("row_shifts", "row_exponentials", "combine_exponentials", "finish_rows", "add_entropy", "scale_rows"),
    "head_exponentials",
)
# Kernels that nothing may spill in.
STREAMING = (*ROW_KERNELS, *EXPONENTIALS, *LAYERS, "scale", "count_tokens", "compact_tokens", "sum_rows")


@pytest.fixture(scope="module")
def lines(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[aot.Compiled]]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("triton")))
        yield list(aot.table(pairs=False, processes=2))


def test_the_kernels_in_the_interpreter() -> None:
    """Files in a process with TRITON_INTERPRET set, since Triton looks at it when imported."""
    names = "test_triton_kernels", "test_interpreted_ops", "test_interpreted_layer_ops", "test_exponentials"
    files = [f"tests/kernels/{name}.py" for name in names]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *files]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout[-5000:]
    (passed,) = re.findall(r"(\d+) passed", done.stdout)
    assert int(passed) > 250
    assert "skipped" not in done.stdout.splitlines()[-1]


def test_everything_compiles(lines: list[aot.Compiled]) -> None:
    keys = aot.configurations(pairs=False)
    wanted = {(key, number) for key in keys for number in aot.ARCHITECTURES if aot.serves(key, number)}
    assert {(line.configuration, line.architecture) for line in lines} == wanted
    assert len(lines) == len(wanted)
    assert {line.configuration.kernel for line in lines} == {
        *STREAMING,
        "sequence_loss",
        "group_advantages",
    }


def test_no_streaming_kernel_spills(lines: list[aot.Compiled]) -> None:
    assert not [line for line in lines if line.configuration.kernel in STREAMING and (line.stack or line.spilled)]
    assert all(16 <= line.registers <= 255 for line in lines)


def test_a_processor_holds_enough_rows(lines: list[aot.Compiled]) -> None:
    """As many programs at a time as `SHAPES` was chosen for, where rows are computed in fp32 and not capped."""
    for line in lines:
        kinds = dict(line.configuration.parameters)
        wide = "fp64" in kinds.get("TYPE", "") or kinds.get("SOFTCAP") == "True" or kinds.get("bias_ptr") != "None"
        if line.configuration.kernel in ("row_statistics", "row_gradient") and not wide:
            assert line.registers * line.configuration.warps * 32 * PROGRAMS_PER_PROCESSOR <= 65536, line


def test_aligned_rows_are_read_and_written_16_bytes_at_a_time(lines: list[aot.Compiled]) -> None:
    for line in lines:
        kinds = dict(line.configuration.parameters)
        if line.configuration.kernel not in ("row_statistics", "row_gradient"):
            continue
        wide = re.findall(r"(ld|st)\.global\S*\.(?:v4\.b32|v2\.b64)", line.ptx)
        aligned = kinds["stride"].endswith(":16")
        assert aligned == ("ld" in wide)
        if "out_ptr" in kinds:
            assert aligned == ("st" in wide)


def test_instructions_are_found_whole() -> None:
    ptx = "\t@%p1 wgmma.mma_async.sync.aligned.m64 {%f1};\n\tnot_wgmma.mma_async x;\n{ld.global.b32 y; ld.global2 z;}\n"
    line = aot.Compiled(aot.Configuration("k", (), 4), 90, 32, 0, 0, 0, ptx)
    names = "wgmma.mma_async", "ld.global", "wgmma", "cp.async.bulk.tensor", "mma_async"
    assert [line.instructions(name) for name in names] == [1, 1, 1, 0, 0]


def test_scaling_moves_16_bytes_at_a_time(lines: list[aot.Compiled]) -> None:
    found = [line.ptx for line in lines if line.configuration.kernel == "scale"]
    for ptx in found:
        loads, stores = (re.findall(rf"{way}\.global\S*\.(?:v4\.b32|v2\.b64)", ptx) for way in ("ld", "st"))
        assert len(loads) == SHAPES["scale"].vectors
        assert stores
    assert found


def test_layers_move_16_bytes_at_a_time(lines: list[aot.Compiled]) -> None:
    for line in lines:
        kinds = dict(line.configuration.parameters)
        size = next((kinds[name] for name in ("size", "half", "dim") if name in kinds), "")
        if line.configuration.kernel in LAYERS and size.endswith(":16") and "*fp64:16" not in kinds.values():
            for way in ("ld", "st"):
                assert re.search(rf"{way}\.global\S*\.(?:v4\.b32|v2\.b64)", line.ptx), line.configuration


def test_threads_wait_for_no_others_in_the_steps_of_a_row(lines: list[aot.Compiled]) -> None:
    """A layout that puts a lane's sums into several threads costs a barrier a step; an H200 took 3.5 times as long."""
    found = set()
    for line in lines:
        name, kinds = line.configuration.kernel, dict(line.configuration.parameters)
        if name in IN_STEPS and kinds.get("stride", kinds.get("out_stride")) == "i32:16":
            steps = [step for step in loops(line.ptx) if "ld.global" in step]
            assert steps and not any(re.search(r"bar\.sync|shfl", step) for step in steps), line.configuration
            found.add(name)
    assert found == IN_STEPS


def loops(ptx: str) -> Iterator[str]:
    """From a label to each branch back to it."""
    for label in re.finditer(r"^(\$L\w+):", ptx, re.MULTILINE):
        for branch in re.finditer(rf"\bbra(?:\.uni)?\s+{re.escape(label[1])};", ptx[label.end() :]):
            yield ptx[label.end() :][: branch.start()]


def test_what_is_written_in_place_has_been_read_by_every_warp(lines: list[aot.Compiled]) -> None:
    """Warps read a row's log-sum for the rows of the tile that they have, and one of them overwrites it."""
    found = [line for line in lines if line.configuration.kernel == "merge_heads"]
    for line in found:
        read, _, rest = line.ptx.partition("bar.sync")
        assert "ld.global" in read and "st.global" not in read and "st.global" in rest
        kinds = dict(line.configuration.parameters)
        if (kinds["TYPE"], kinds["COLUMNS"]) == ("fp32", "128"):  # whose tiles are read 16 bytes at a time
            assert not re.search(r"ld\.global(?!\S*\.v)", rest)
    assert found


def test_the_heads_product_runs_on_tensor_cores_fed_by_bulk_copies(lines: list[aot.Compiled]) -> None:
    products = {90: r"wgmma\.mma_async\S*\.m64n256k16\.f32\.bf16\.bf16", 100: r"tcgen05\.mma"}
    found = [line for line in lines if line.configuration.kernel == "head_exponentials"]
    assert {line.architecture for line in found} == products.keys()
    for line in found:
        assert re.search(products[line.architecture], line.ptx)
        assert re.search(r"cp\.async\.bulk\.tensor\.2d\.shared::c\S+\.global\.mbarrier", line.ptx)  # what it reads
        assert re.search(r"cp\.async\.bulk\.tensor\.2d\.global\.shared::cta\.bulk_group", line.ptx)  # what it writes
        assert line.shared <= 227 * 1024


@pytest.mark.parametrize("norms", ["none", "each head", "all heads"])
def test_new_numbers_of_tokens_compile_nothing_in_a_layer(norms: str) -> None:
    def compiled(tokens: int) -> set[aot.Configuration]:
        qkv, weight, angles = torch.empty(tokens, 64), torch.empty(64), torch.empty(tokens, 8)
        weights = {"none": (None, None), "each head": (weight[:8], weight[:8]), "all heads": (weight[:32], weight[:16])}
        with recording() as launches:
            norm_gradients_in_triton(qkv, qkv, qkv, weight, 1e-6, True)
            norm_in_triton(qkv, qkv, weight, 1e-6, True)
            swiglu_gradient_in_triton(swiglu_in_triton(qkv), qkv)
            q, k, v = rotary_in_triton(qkv, angles, angles, 4, 2, *weights[norms], 1e-6)
            rotary_gradients_in_triton(q, k, v, qkv, angles, angles, *weights[norms], 1e-6, True, True)
            lse = torch.empty(4, tokens + 1)[:, 1:]
            merge_in_triton(q, lse, q, lse.contiguous())
        return {aot.configuration_of(launch) for launch in launches}

    first = compiled(2)
    assert {key.kernel for key in first} == {*LAYERS, "sum_rows"}
    assert all(compiled(tokens) == first for tokens in (1, 3, 16, 5000))


def test_pairs_are_covered() -> None:
    axes: dict[str, Any] = {"a": (1, 2, 3), "b": "xy", "c": (False, True)}
    found = aot.covering(axes, lambda values: values["a"] != 3 or values["c"], 2)
    assert {(v["a"], v["b"]) for v in found} == {(a, b) for a in (1, 2, 3) for b in "xy"}
    assert {(v["b"], v["c"]) for v in found} == {(b, c) for b in "xy" for c in (False, True)}
    assert {(v["a"], v["c"]) for v in found} == {(a, c) for a in (1, 2, 3) for c in (False, True)} - {(3, False)}


def row_launches(rows: int, start: int, head: Head, dtype: torch.dtype = torch.float32) -> set[aot.Configuration]:
    """What a tile of logits compiles whose rows begin at `start` of what they are indexed by."""
    tile = torch.empty(rows, 4096, dtype=dtype)
    numbers, targets = torch.empty(start + rows)[start:], torch.zeros(start + rows).long()[start:]
    if isinstance(head.temperature, Tensor):
        head = replace(head, temperature=torch.empty(start + rows)[start:])
    with recording() as launches:
        row_statistics_in_triton(tile, targets, head, True)
        for index in (None, targets):
            out = torch.empty_like(tile, dtype=torch.bfloat16)
            row_gradient_in_triton(tile, targets, head, numbers, numbers, numbers, numbers, index, out)
    return {aot.configuration_of(launch) for launch in launches}


@pytest.mark.parametrize("head", [Head(), Head(torch.empty(4096), torch.empty(1), 30.0)], ids=["plain", "all"])
def test_new_numbers_of_rows_compile_nothing(head: Head) -> None:
    first = row_launches(600, 0, head)
    for rows, start in ((601, 0), (1000, 1), (1024, 16), (4096, 3)):
        assert row_launches(rows, start, head) == first
    few = row_launches(16, 0, head)
    assert len(few) == len(first)
    for rows, start in ((1, 0), (1, 1), (2, 3), (17, 5)):
        assert row_launches(rows, start, head) == few


def exponential_launches(rows: int, start: int, head: Head) -> set[aot.Configuration]:
    """What a tile of exponentials compiles whose rows begin at `start` of what they are indexed by."""
    hidden, weight = (torch.empty(count, 64, dtype=torch.bfloat16) for count in (rows, 4096))
    numbers, targets = torch.empty(start + rows)[start:], torch.zeros(start + rows).long()[start:]
    if isinstance(head.temperature, Tensor):
        head = replace(head, temperature=torch.empty(start + rows)[start:])
    tile, width = new_tile(weight, rows), 512 if rows > 16 else 4096
    partials = torch.empty(rows, 4096 // width, 2)
    with recording() as launches:
        row_shifts_in_triton(hidden, weight, targets, head, numbers, None, numbers)
        logits = torch.empty(rows, width)
        row_exponentials_in_triton(logits, start * 256, targets, head, numbers, None, tile, partials, 0, numbers)
        combine_exponentials_in_triton(partials, numbers, numbers, targets, head, 4096, numbers, numbers, numbers)
        finish_rows_in_triton(tile, numbers, targets, head, numbers, numbers, numbers)
        scale_rows_in_triton(hidden, numbers, targets, hidden, None)
        if head.softcap is None:
            add_entropy_in_triton(
                tile, hidden, weight, targets, head, numbers, numbers, numbers, numbers, numbers, numbers
            )
            head_exponentials_in_triton(BLOCKS[9], hidden, weight, targets, head, numbers, tile, numbers)
    return {aot.configuration_of(launch) for launch in launches}


@pytest.mark.parametrize("head", [Head(), Head(torch.empty(4096), torch.empty(1), 30.0)], ids=["plain", "all"])
def test_new_numbers_of_rows_compile_nothing_for_exponentials(head: Head) -> None:
    first = exponential_launches(600, 0, head)
    assert len(first) == (7 if head.softcap is None else 5)
    for rows, start in ((601, 1), (1, 3), (1024, 16), (17, 5), (4096, 1)):
        assert exponential_launches(rows, start, head) == first


def selection_launches(lengths: list[int], case: str, start: int = 0) -> set[aot.Configuration]:
    """What finding the computed tokens compiles."""
    options, tensors = CASES[case]
    batch = make_batch([start, *lengths], 3, **dict.fromkeys(tensors, True), loss_mask=True)
    batch = {name: value.detach() for name, value in batch.items()}
    sequences, total = len(lengths), sum(lengths)
    own = {name: batch[name][start:] for name in batch if name not in ("advantages", "cu_seqlens", "entropy")}
    inputs = LossInputs(
        **own,
        advantages=batch["advantages"][1:],
        cu_seqlens=torch.tensor([0, *lengths]).cumsum(0),
        weights=torch.ones(start + sequences, dtype=torch.float64)[start:],
    )
    with recording() as launches:
        compacted(inputs, total, LossOptions(**options))
    return {aot.configuration_of(launch) for launch in launches}


@pytest.mark.parametrize("case", ["clip", "gspo", "guided, released code"])
def test_finding_the_tokens_of_new_lengths_compiles_nothing(case: str) -> None:
    first = selection_launches([5, 7, 3], case)
    assert len(first) == 2
    for lengths, start in (([16, 16], 0), ([1], 1), ([3, 0, 70], 1), ([1, 1, 1, 5], 3)):
        assert selection_launches(lengths, case, start) == first


def loss_launches(lengths: list[int], case: str, start: int = 0, **numbers: float) -> set[aot.Configuration]:
    options, tensors = CASES[case]
    options = {name: value for name, value in options.items() if name != "normalizer"} | numbers
    total = sum(lengths)
    batch = make_batch([start, *lengths], 3, **dict.fromkeys(tensors, True), loss_mask=True)
    sequences = len(lengths)
    own = {name: value.detach()[-total:] for name, value in batch.items() if name not in ("advantages", "cu_seqlens")}
    inputs = LossInputs(
        **own,
        advantages=batch["advantages"][-sequences:],
        cu_seqlens=torch.tensor([0, *lengths]).cumsum(0),
        weights=torch.ones(sequences, dtype=torch.float64),
    )
    with recording() as launches:
        sequence_loss_in_triton(inputs, LossOptions(**options), True)
    return {aot.configuration_of(launch) for launch in launches}


@pytest.mark.parametrize("case", ["clip", "gspo", "sequence-mask", "guided, with kl"])
def test_new_lengths_compile_nothing(case: str) -> None:
    first = loss_launches([5, 7, 3], case)
    assert len(first) == 1
    for lengths, start in (([16, 16], 0), ([1], 1), ([3, 0, 70], 1), ([1, 1, 1, 5], 3)):
        assert loss_launches(lengths, case, start) == first


def test_new_numbers_among_the_options_compile_nothing() -> None:
    assert loss_launches([5, 3], "clip") == loss_launches([5, 3], "clip", epsilon_low=0.0, epsilon_high=1.0)
    assert loss_launches([5, 3], "clip") == loss_launches([5, 3], "clip", dual_clip=3.0)
    assert loss_launches([5, 3], "k3") == loss_launches([5, 3], "k3", beta=1.0)
    assert loss_launches([5, 3], "entropy") == loss_launches([5, 3], "entropy", entropy_coef=1.0)
    assert loss_launches([5, 3], "clip") != loss_launches([5, 3], "sapo")


def test_every_launch_is_made_of_what_is_compiled() -> None:
    """Each parameter's type, alignment or value, in each kernel, is among those that `lines` compiles."""
    known = {(key.kernel, *parameter) for key in aot.configurations(pairs=False) for parameter in key.parameters}
    launched = {key for case in CASES for lengths in ([3, 0, 4], [1]) for key in loss_launches(lengths, case)}
    launched |= {key for case in ("k3", "gspo", "guided, released code") for key in selection_launches([3, 4], case)}
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for head in (Head(), Head(torch.empty(4096), torch.empty(1), 30.0)):
            launched |= row_launches(600, 0, head, dtype) | row_launches(1, 1, head, dtype)
    assert {(key.kernel, *parameter) for key in launched for parameter in key.parameters} <= known

"""The loss head in bfloat16 by way of exponentials, in Triton's interpreter; run by test_aot.py.

Letters: T tokens, V vocabulary, H hidden size.
"""

import gc
import math
import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes
from triton.runtime.interpreter import GridExecutor

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs TRITON_INTERPRET=1", allow_module_level=True)

from tests.kernels.accuracy import (
    HIDDEN,
    Tensors,
    check_linear_grpo_loss,
    error,
    gradients,
    head_batch,
    moved_to,
    normal,
    poisoned_memory,
    with_leaves,
)
from tests.kernels.cases import PUBLIC_CASES
from tests.kernels.dispatched import PeakMemory
from tests.kernels.interpreter import multiply_bfloat16_as_numbers, patch_language_once, round_bfloat16_to_nearest
from thinktwice_kernels import exponentials, launch, linear_grpo_loss, linear_loss, reference, rows
from thinktwice_kernels.options import LossInputs
from thinktwice_kernels.triton import head_product

patch_language_once()
round_bfloat16_to_nearest()
multiply_bfloat16_as_numbers()
CPU, BF16 = torch.device("cpu"), torch.bfloat16
LENGTHS = [5, 0, 9, 1, 6]
T, V = sum(LENGTHS), 83
SMALL = 4 * 128 * 2  # bytes of budget: tiles of four rows, fewer than sequences have
ROUNDED = 3 * 2**-9  # exponential, scaled hidden state and result are rounded to bfloat16
BLOCK = head_product.Block(16, 32, 32, 1, 2, True)
HEADS: list[dict[str, Any]] = [
    {},
    {"temperature": 0.7},
    {"logit_softcap": 3.0},
    {"temperature": torch.linspace(0.6, 1.4, T, dtype=torch.float64)},
]


@pytest.fixture(autouse=True)
def small_steps(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Several steps, programs and parts to a row, in memory that is NaN until it is written to."""
    for name in ("row_exponentials", "add_entropy"):
        monkeypatch.setitem(launch.SHAPES, name, launch.Shape(num_warps=1, vectors=1))
    for name in ("row_shifts", "scale_rows", "finish_rows"):
        monkeypatch.setitem(launch.SHAPES, name, launch.Shape(num_warps=1, block=32))
    monkeypatch.setattr(exponentials, "_COLUMN_MULTIPLE", 64)
    monkeypatch.setattr(exponentials, "_LOGITS_SHARE", 1 << 30)
    monkeypatch.setattr(exponentials, "ROW_MULTIPLE", 2)
    with poisoned_memory(CPU):
        yield


@pytest.fixture
def in_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    """The product, too."""

    monkeypatch.setattr(head_product, "block_for", lambda *_: BLOCK)


@pytest.mark.parametrize("case", PUBLIC_CASES)
def test_every_loss(case: str) -> None:
    number = list(PUBLIC_CASES).index(case)
    head = HEADS[number % 4] if case not in ("entropy", "guided, with kl") else {}
    check_linear_grpo_loss(CPU, BF16, case, LENGTHS, V, SMALL if number % 3 else None, **head)


@pytest.mark.usefixtures("in_triton")
@pytest.mark.parametrize("head", HEADS[:2] + HEADS[3:], ids=lambda head: "".join(head))
@pytest.mark.parametrize("case", ["clip", "sequence-truncate"])
def test_the_product_in_triton(case: str, head: dict[str, Any]) -> None:
    check_linear_grpo_loss(CPU, BF16, case, LENGTHS, V, SMALL if case == "clip" else None, bias=False, **head)


def run(op: Callable[..., Any], inputs: dict[str, Any], **options: Any) -> Tensors:
    loss, metrics = op(**inputs, **options)
    return {"loss": loss.detach(), **metrics, **gradients(loss, inputs, ("hidden", "weight", "bias"))}


def loss_batch(**changed: Any) -> dict[str, Any]:
    """In float64, of numbers that are bfloat16."""
    batch = head_batch(T, V, BF16, bias=True) | {
        "advantages": normal(T, seed=9),
        "cu_seqlens": torch.tensor([0, *LENGTHS]).cumsum(0).int(),
    }
    return with_leaves(batch | changed, ("hidden", "weight", "bias"))


def on_gpu(batch: dict[str, Any]) -> dict[str, Any]:
    return moved_to(CPU, batch, BF16, ("hidden", "weight", "bias"))


def assert_rounded(got: Tensors, want: Tensors) -> None:
    """Gradients are as exact as bfloat16 lets them be."""
    errors = {name: error(got[name], want[name]) for name in got if name.startswith("d_")}
    assert all(value < ROUNDED for value in errors.values()), errors


def logps_of(batch: dict[str, Any], **head: Any) -> tuple[Tensor, Tensor]:
    """Exact log-probabilities and entropies."""
    inputs = {name: batch[name].detach() for name in ("hidden", "weight", "bias", "targets")}
    found = reference.linear_logprobs(**inputs, **head, return_entropy=True)
    assert isinstance(found, tuple)
    return found


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """Log-probabilities and entropies that losses were computed from."""
    found: list[Tensor] = []
    loss = exponentials.sequence_loss

    def noted(inputs: LossInputs, *rest: Any, **options: Any) -> Any:
        assert inputs.entropy is not None
        found[:] = inputs.logps, inputs.entropy
        return loss(inputs, *rest, **options)

    monkeypatch.setattr(exponentials, "sequence_loss", noted)
    return found


@pytest.mark.parametrize(("budget", "head"), [(None, HEADS[3]), (SMALL, HEADS[2])], ids=["temperatures", "soft cap"])
def test_known_log_probabilities_may_be_anything(budget: int | None, head: dict[str, Any], seen: list[Tensor]) -> None:
    """Off by 60 nats, NaN or infinite, for targets at -100 and less too: `rollout_logps` matter to the shifts alone."""
    batch = loss_batch(**head)
    with torch.no_grad():
        batch["hidden"][::3] *= 32
    want = run(reference.linear_grpo_loss, batch)
    exact = logps_of(batch, **head)
    known = exact[0] + torch.linspace(-60, 60, T, dtype=torch.float64)
    known[1], known[8], known[15] = math.nan, math.inf, -math.inf
    for rollout_logps in (known, None):
        got = run(linear_grpo_loss, on_gpu(batch | {"rollout_logps": rollout_logps}), memory_budget=budget)
        if budget is None:
            assert exact[0].min() < -100
            torch.testing.assert_close([x.double() for x in seen], list(exact), rtol=1e-6, atol=1e-5)
        assert abs(float(got["loss"] - want["loss"])) < 1e-5
        assert_rounded(got, want)


def test_rows_that_are_not_numbers(seen: list[Tensor]) -> None:
    """They come out as NaN; not where the loss drops them, and then other rows' gradients know nothing of them."""
    drops = {"rollout_is": "token-mask", "rollout_is_cap": 1.5}
    batch = loss_batch()
    exact, _ = logps_of(batch)
    dropped = torch.isin(torch.arange(T), torch.tensor([3, 11]))
    batch |= {"old_logps": exact + 0.1, "rollout_logps": torch.where(dropped, exact - 3, exact)}
    want = run(reference.linear_grpo_loss, batch, **drops)
    inputs = on_gpu(batch)
    with torch.no_grad():
        inputs["hidden"][3], inputs["hidden"][11, 5] = math.nan, math.inf
    got = run(linear_grpo_loss, inputs, **drops)
    assert seen[0].isfinite().tolist() == (~dropped).tolist()
    assert_rounded(got, want)
    assert not got["d_hidden"][dropped].any()
    assert linear_grpo_loss(**inputs)[0].isnan()


def one_likely(probability: float, others: float = 0.0) -> dict[str, Any]:
    """Two rows in whose distribution the tokens 1 and 4 have that probability."""
    weight = torch.zeros(V, HIDDEN, dtype=torch.float64)
    weight[:, 2:] = normal(V, HIDDEN - 2, seed=6).to(BF16).double()
    weight[1, 0] = weight[4, 1] = 1.0
    hidden = torch.zeros(2, HIDDEN, dtype=torch.float64)
    hidden[0, 0] = hidden[1, 1] = torch.tensor(math.log(probability / (1 - probability) * (V - 1))).to(BF16).double()
    leaves = {"hidden": hidden, "weight": weight, "bias": torch.zeros(V, dtype=torch.float64)}
    rest = {"advantages": torch.tensor([1.0, -0.5]).double(), "cu_seqlens": torch.tensor([0, 1, 2]).int()}
    return with_leaves({**leaves, "targets": torch.tensor([1, 4]), **rest}, tuple(leaves))


@pytest.mark.parametrize("probability", [0.93, 0.998, 0.99996])
def test_likely_targets_keep_their_gradient(probability: float) -> None:
    """Of which 1 % is lost at the first of these, 41 % at the second, if 1 - p comes from a rounded p."""
    batch = one_likely(probability)
    want, got = run(reference.linear_grpo_loss, batch), run(linear_grpo_loss, on_gpu(batch))
    assert error(got["d_hidden"], want["d_hidden"]) < ROUNDED
    assert error(got["d_weight"], want["d_weight"]) < ROUNDED


@pytest.mark.parametrize("probability", [0.93, 0.998, 0.99996])
def test_likely_tokens_keep_the_gradient_of_the_entropy(probability: float) -> None:
    batch = one_likely(probability) | {"targets": torch.tensor([7, 4]), "advantages": torch.zeros(2).double()}
    want, got = (
        run(op, inputs, entropy_coef=1.0)
        for op, inputs in ((reference.linear_grpo_loss, batch), (linear_grpo_loss, on_gpu(batch)))
    )
    # The entropy, 5e-4 nats at the last of these, is the difference of sums of a few nats in fp32.
    assert error(got["d_hidden"], want["d_hidden"]) < 2 * ROUNDED


@pytest.mark.parametrize("clipped", [False, True])
def test_backward_twice(clipped: bool) -> None:
    batch = loss_batch()
    if clipped:  # most rows leave
        batch |= {
            "old_logps": torch.where(torch.arange(T) % 5 > 0, -60.0, -4.0).double(),
            "advantages": normal(T).abs(),
        }
    inputs = on_gpu(batch)
    leaves = [inputs[name] for name in ("hidden", "weight", "bias")]
    loss, _ = linear_grpo_loss(**inputs)
    (first, *_) = torch.autograd.grad(loss, leaves, retain_graph=True)
    first.mul_(100)  # what was handed out must not be what is kept
    second = torch.autograd.grad(loss, leaves, torch.tensor(-2.0), retain_graph=True)
    third = torch.autograd.grad(loss, leaves)
    torch.testing.assert_close(second, tuple(-2 * x for x in third))
    torch.testing.assert_close(first, 100 * third[0])
    assert [x.dtype for x in third] == [BF16] * 3


def test_a_tracer_gets_gradients_of_known_shapes(monkeypatch: pytest.MonkeyPatch) -> None:
    batch = loss_batch()
    want = run(linear_grpo_loss, on_gpu(batch))
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    got = run(linear_grpo_loss, on_gpu(batch))
    for name in want:
        torch.testing.assert_close(got[name], want[name], rtol=1e-2, atol=1e-4)


@pytest.mark.parametrize("budget", [None, SMALL])
def test_clipped_rows_make_the_products_shorter(budget: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """And what takes their place in the tile keeps its own row."""
    batch = loss_batch(advantages=normal(T).abs() + 0.1)
    exact, _ = logps_of(batch)
    batch["old_logps"] = exact - torch.where(normal(T, seed=4) > 0.5, 0.0, 1.0)
    want = run(reference.linear_grpo_loss, batch)
    entered: list[int] = []
    write = rows.write_hidden_gradient

    def counted(out: Tensor, d_logits: Tensor, *rest: Any) -> None:
        entered.append(d_logits.shape[0])
        write(out, d_logits, *rest)

    for module in (rows, exponentials):
        monkeypatch.setattr(module, "write_hidden_gradient", counted)
    got = run(linear_grpo_loss, on_gpu(batch), memory_budget=budget)
    live = int(want["tokens_with_gradient"])
    assert 2 < live < T // 2 and live <= sum(entered) <= live + len(entered)
    assert_rounded(got, want)


def test_tiles_are_whole_blocks_of_rows_of_two_bytes_a_logit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    gpu = torch.device("cuda")
    assert exponentials.exponential_rows(151_936, gpu, None) == 12_288
    assert exponentials.exponential_rows(151_936, gpu, 1 << 30) == 3_072
    assert exponentials.exponential_rows(151_936, gpu, 1 << 20) == 3
    assert [piece.stop for piece in rows.tiles(0, 32_768, 12_288, 256)] == [10_752, 21_760, 32_768]


def memory_as_on_a_gpu(patch: pytest.MonkeyPatch) -> None:
    """Let products take memory for their results alone, where a CPU widens the factors, and kernels none."""

    def unseen(function: Callable[..., Any]) -> Callable[..., Any]:
        def run_unseen(*arguments: Any, **options: Any) -> Any:
            with _disable_current_modes():
                return function(*arguments, **options)

        return run_unseen

    widened = unseen(rows.product)

    def product(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
        return a.new_empty(a.shape[0], b.shape[1], dtype=dtype).copy_(widened(a, b, dtype))

    for module in (rows, exponentials):
        patch.setattr(module, "product", product)
    patch.setattr(GridExecutor, "__call__", unseen(GridExecutor.__call__))
    patch.setattr(rows, "add_product", unseen(rows.add_product))
    patch.setattr(exponentials, "accumulated_logits", unseen(exponentials.accumulated_logits))


@pytest.mark.parametrize("tiles", [1, 3])
def test_memory(tiles: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """One tile: two bytes a logit, then the weight's gradient in its type. Several: that in fp32, then both."""
    vocabulary, tokens = 1024, 24
    monkeypatch.setattr(exponentials, "_COLUMN_MULTIPLE", 512)
    monkeypatch.setitem(launch.SHAPES, "row_exponentials", launch.Shape(num_warps=1, vectors=4))
    batch = on_gpu(head_batch(tokens, vocabulary, BF16))
    batch |= {"advantages": torch.ones(1), "cu_seqlens": torch.tensor([0, tokens]).int()}
    tile = 2 * vocabulary * tokens // tiles
    memory, forward = PeakMemory(), linear_loss._tiled_loss

    def watched(*arguments: Any) -> Any:
        with memory:  # what runs inside of a custom op is hidden from a mode around it
            return forward(*arguments)

    memory_as_on_a_gpu(monkeypatch)
    monkeypatch.setattr(linear_loss, "_tiled_loss", watched)
    loss, _ = linear_grpo_loss(**batch, memory_budget=tile)
    gc.collect()  # the interpreter's arguments lie in circles
    with memory:
        torch.autograd.grad(loss, [batch["hidden"], batch["weight"]])
    numbers = 4 * tokens * 64  # some a row
    hidden, weight = batch["hidden"].numel(), batch["weight"].numel()
    # Of hidden states the gradient, and of a tile's rows fp32 sums, or the rows times their scales.
    needed = (tile + 2 * weight if tiles == 1 else 6 * weight) + 2 * hidden + 4 * hidden // tiles
    assert needed * 0.9 <= memory.peak <= needed + numbers

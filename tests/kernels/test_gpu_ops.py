"""Every public op on CUDA, where there is one, against its definition in float64 on the CPU.

Letters: T tokens, S sequences, V vocabulary, H hidden size.
"""

import warnings
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
import triton
from torch import Tensor

from tests.kernels.accuracy import (
    FP32_ERROR,
    HIDDEN,
    Tensors,
    assert_accurate,
    assert_same_metrics,
    check_linear_grpo_loss,
    check_token_logprobs,
    error,
    gradients,
    head_batch,
    moved_to,
    normal,
    plain_logprobs,
    poisoned_memory,
    with_leaves,
)
from tests.kernels.batches import make_batch
from tests.kernels.cases import AGGREGATIONS, CASES, PUBLIC_CASES
from thinktwice_kernels import (
    exponentials,
    group_advantages,
    grpo_loss,
    linear_grpo_loss,
    linear_logprobs,
    linear_loss,
    reference,
    token_logprobs,
)
from thinktwice_kernels.options import LossInputs, LossOptions
from thinktwice_kernels.triton import head_product
from thinktwice_kernels.triton.scale import scale_in_triton

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]
DEVICE = torch.device("cuda")
LENGTHS = [5, 0, 40, 1, 130, 64]
T, V, H = sum(LENGTHS), 517, HIDDEN
DTYPES = [torch.float32, torch.bfloat16]
on_device = partial(moved_to, DEVICE)


@pytest.fixture(autouse=True)
def poisoned() -> Iterator[None]:
    with poisoned_memory(DEVICE):
        yield


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float16, torch.float64])
@pytest.mark.parametrize("vocabulary", [1, 7, 50_257, 128_256, 151_936])
@pytest.mark.parametrize("inplace", [False, True])
def test_token_logprobs(dtype: torch.dtype, vocabulary: int, inplace: bool) -> None:
    check_token_logprobs(DEVICE, dtype, vocabulary, inplace)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", [{}, {"temperature": 0.7, "logit_softcap": 5.0}])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("vocabulary", [V, 50_257])
def test_linear_logprobs(dtype: torch.dtype, options: dict[str, Any], bias: bool, vocabulary: int) -> None:
    leaves = ("hidden", "weight", "bias")
    batch = head_batch(T, vocabulary, dtype, bias=bias)
    incoming = normal(T, seed=5), normal(T, seed=6)

    def outputs(found: Any, inputs: dict[str, Any]) -> Tensors:
        logps, entropy = found
        probes = [probe.to(logps.device, logps.dtype) for probe in incoming]
        return {"logps": logps, "entropy": entropy, **gradients((logps, entropy), inputs, leaves, probes)}

    wide = with_leaves(batch, leaves)
    want = outputs(reference.linear_logprobs(**wide, **options, return_entropy=True), wide)
    inputs = on_device(batch, dtype, leaves)
    got = outputs(linear_logprobs(**inputs, **options, return_entropy=True), inputs)
    plain = None
    if dtype == torch.bfloat16:
        plain = outputs(plain_logprobs(inputs, **options), inputs)
    assert_accurate(got, want, plain)


@pytest.mark.parametrize("scale", ["none", "group", "batch", "mean"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_group_advantages(scale: Any, dtype: torch.dtype) -> None:
    drawn = normal(200).abs() if scale == "mean" else normal(200)
    rewards = torch.cat([drawn, torch.full((8,), 0.3, dtype=torch.float64)]).to(dtype)
    ids = torch.cat([torch.arange(200) * 7 % 23 - 4, torch.full((7,), 99), torch.tensor([-77])])  # groups of 1 too
    want = reference.group_advantages(rewards.double(), ids, scale_rewards=scale)
    got = group_advantages(rewards.to(DEVICE), ids.to(DEVICE), scale_rewards=scale)
    assert_accurate({"advantages": got}, {"advantages": want})
    assert torch.equal(got[-8:].cpu(), torch.zeros(8, dtype=dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("case", PUBLIC_CASES)
@pytest.mark.parametrize("aggregation", AGGREGATIONS, ids=lambda options: options["loss_agg_mode"])
def test_grpo_loss(case: str, aggregation: dict[str, Any], dtype: torch.dtype) -> None:
    options, tensors = PUBLIC_CASES[case]
    options, leaves = {**options, **aggregation}, ("logps", "entropy")
    batch = make_batch(LENGTHS, 7, loss_mask=True, zero_advantages=True, **dict.fromkeys(tensors, True))
    batch = {name: value.to(dtype).double() if value.is_floating_point() else value for name, value in batch.items()}

    def run(op: Callable[..., Any], inputs: dict[str, Any]) -> tuple[Tensors, Tensors]:
        loss, metrics = op(**inputs, **options)
        present = leaves if options.get("entropy_coef") else ("logps",)
        return {"loss": loss, **gradients(loss, inputs, present)}, metrics

    want, want_metrics = run(reference.grpo_loss, with_leaves(batch, leaves))
    got, metrics = run(grpo_loss, on_device(batch, dtype, leaves))
    assert_accurate(got, want)
    assert_same_metrics(metrics, want_metrics)


@pytest.mark.parametrize("budget", [None, 24 * V * 6])  # 36 rows, 60 in bfloat16: sequences that are longer than a tile
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", PUBLIC_CASES)
def test_linear_grpo_loss(case: str, dtype: torch.dtype, budget: int | None) -> None:
    check_linear_grpo_loss(DEVICE, dtype, case, LENGTHS, V, budget)


@pytest.mark.parametrize("in_triton", [False, True])
@pytest.mark.parametrize("head", [{"temperature": 0.7}, {"temperature": torch.linspace(0.5, 2, T).double()}])
@pytest.mark.parametrize("case", ["clip", "gspo", "k3", "token-mask", "guided", "entropy"])
def test_linear_grpo_loss_with_either_product(
    case: str, head: dict[str, Any], in_triton: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(head_product, "MEASURED_FASTER", frozenset(head_product.BLOCKS if in_triton else ()))
    check_linear_grpo_loss(DEVICE, torch.bfloat16, case, LENGTHS, 1032, None, bias=False, **head)


def loss_batch(dtype: torch.dtype = torch.bfloat16, vocabulary: int = V) -> dict[str, Any]:
    batch = head_batch(T, vocabulary, dtype)
    batch |= {"advantages": normal(len(LENGTHS)), "cu_seqlens": torch.tensor([0, *LENGTHS]).cumsum(0).int()}
    return on_device(batch, dtype, ("hidden", "weight"))


@pytest.mark.parametrize("how", ["mask", "zero advantage"])
def test_skipped_rows_enter_no_product_and_may_hold_nan(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    batch = loss_batch()
    skipped = torch.arange(T, device=DEVICE) % 3 == 0
    if how == "mask":
        batch["loss_mask"] = ~skipped
    else:
        batch["advantages"] = torch.where(skipped, 0.0, normal(T, seed=8).float().to(DEVICE))
    rows: list[int] = []

    def count(module: Any, product: str, place: int) -> None:
        original = getattr(module, product)

        def counted(*given: Any, **options: Any) -> Tensor:
            rows.append(given[place].shape[0])
            return original(*given, **options)

        monkeypatch.setattr(module, product, counted)

    count(exponentials, "accumulated_logits", 0)
    count(head_product, "head_exponentials_in_triton", 1)
    want, _ = linear_grpo_loss(**batch)
    d_want = gradients(want, batch, ("hidden", "weight"))
    assert set(rows) == {T - int(skipped.sum())}
    with torch.no_grad():
        batch["hidden"][skipped] = torch.nan
    got, metrics = linear_grpo_loss(**batch)
    d_got = gradients(got, batch, ("hidden", "weight"))
    assert torch.equal(got, want)
    assert all(torch.equal(d_got[name], d_want[name]) for name in d_want)
    assert not d_got["d_hidden"][skipped].any()
    assert int(metrics["tokens_skipped"]) == (0 if how == "mask" else int(skipped.sum()))


def test_nan_comes_out_as_nan() -> None:
    batch = loss_batch()
    with torch.no_grad():
        batch["hidden"][17, 3] = torch.nan
    loss, _ = linear_grpo_loss(**batch)
    assert loss.isnan()
    logits = torch.zeros(4, 1000, device=DEVICE)
    logits[1, 999], logits[2, 0], logits[3, 5] = torch.nan, torch.inf, -torch.inf
    logps = token_logprobs(logits, torch.tensor([0, 0, 1, 0], device=DEVICE))
    assert logps.isnan().tolist() == [False, True, True, False]


def test_a_frozen_weight_gets_no_gradient_and_takes_no_memory() -> None:
    """In the backward pass: before it the tile of logits is the most, whatever gets a gradient."""
    batch = loss_batch(vocabulary=100_000)
    sizes = {}
    for frozen in (False, True):
        batch["weight"] = batch["weight"].detach().requires_grad_(not frozen)
        leaves = ("hidden",) if frozen else ("hidden", "weight")
        sizes[frozen] = peak(partial(gradients, batch=batch, leaves=leaves), lambda: linear_grpo_loss(**batch)[:1])
        loss, _ = linear_grpo_loss(**batch)
        loss.backward()
        assert (batch["weight"].grad is None) == frozen
    of_weight = 2 * batch["weight"].numel()
    assert sizes[True] <= sizes[False] - 0.9 * of_weight  # what it is made of has gone by then, in part


def fused_gradients(batch: dict[str, Any], leaves: tuple[str, ...], **options: Any) -> Tensors:
    return gradients(linear_grpo_loss(**batch, **options)[0], batch, leaves)


def peak(call: Callable[..., Any], prepare: Callable[[], tuple[Any, ...]] = tuple) -> int:
    """Bytes at the peak of a call's second run, beyond what was there before: results and gradients count.

    Args:
        prepare: gives what the call gets.
    """
    call(*prepare())
    prepared = prepare()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call(*prepared)
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


@pytest.mark.parametrize("options", [{}, {"importance_sampling_level": "sequence"}])
def test_memory_is_gradients_and_one_tile(options: dict[str, Any]) -> None:
    tokens, vocabulary, budget = 4096, 50_000, 64 << 20
    batch: dict[str, Any] = {
        "hidden": torch.randn(tokens, H, device=DEVICE, dtype=torch.bfloat16).requires_grad_(),
        "weight": torch.randn(vocabulary, H, device=DEVICE, dtype=torch.bfloat16).requires_grad_(),
        "targets": torch.randint(vocabulary, (tokens,), device=DEVICE),
        "advantages": torch.tensor([1.0, -0.5], device=DEVICE),
        "cu_seqlens": torch.tensor([0, 1000, tokens], dtype=torch.int32, device=DEVICE),
    }
    call = partial(fused_gradients, batch, ("hidden", "weight"), memory_budget=budget, **options)
    gradient_bytes = 6 * batch["weight"].numel() + 4 * batch["hidden"].numel()  # fp32 sum and result; both hidden's
    assert 4 * tokens * vocabulary > 10 * budget
    assert peak(call) <= budget + gradient_bytes + (32 << 20)  # and what cuBLAS works in


def test_new_lengths_compile_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[str] = []

    def run(tokens: int) -> None:
        hidden = torch.randn(tokens, H, device=DEVICE, dtype=torch.bfloat16).requires_grad_()
        weight = torch.randn(V, H, device=DEVICE, dtype=torch.bfloat16).requires_grad_()
        targets = torch.randint(V, (tokens,), device=DEVICE)
        cu_seqlens = torch.tensor([0, tokens // 3, tokens], dtype=torch.int32, device=DEVICE)
        advantages = torch.tensor([1.0, -0.5], device=DEVICE)
        loss, _ = linear_grpo_loss(hidden, weight, targets, advantages, cu_seqlens)
        logps = linear_logprobs(hidden, weight, targets)
        other, _ = grpo_loss(logps, advantages, cu_seqlens, old_logps=logps.detach())
        (loss + other + token_logprobs(hidden @ weight.t(), targets).sum()).backward()

    def note(*_: Any, **about: Any) -> None:
        compiled.append(about["repr"])

    for tokens in (64, 1, 77):  # divisible by 16, the 1 that Triton makes a constant of, and neither
        run(tokens)
    monkeypatch.setattr(triton.knobs.runtime, "jit_post_compile_hook", note)
    for tokens in (2, 16, 33, 1000, 1024, 5000):
        run(tokens)
    assert compiled == []


def test_no_op_but_the_fused_one_waits_for_the_gpu() -> None:
    batch = loss_batch()
    logits = torch.randn(T, V, device=DEVICE, requires_grad=True)
    ids = torch.tensor([0, 0, 0, 1, 1, 1], device=DEVICE)

    def work() -> None:
        logps, entropy = token_logprobs(logits, batch["targets"], return_entropy=True)
        advantages = group_advantages(batch["advantages"], ids, scale_rewards="group")
        loss, _ = grpo_loss(logps, advantages, batch["cu_seqlens"], entropy=entropy, entropy_coef=0.1)
        loss.backward()

    work()
    torch.use_deterministic_algorithms(False)
    torch.cuda.set_sync_debug_mode("error")
    try:
        work()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def times_waited(call: Callable[[], Any]) -> int:
    """How often the second run of a call waits for the GPU."""
    call()
    torch.use_deterministic_algorithms(False)
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            call()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return sum("synchroniz" in str(warning.message) for warning in caught)


@pytest.mark.parametrize(
    ("options", "waits"),
    [
        ({}, 1),
        ({"entropy_coef": 0.1}, 0),
        ({"entropy_coef": 0.1, "importance_sampling_level": "sequence"}, 1),
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_fused_one_waits_once_and_for_a_tile_of_bfloat16(
    dtype: torch.dtype, options: dict[str, Any], waits: int
) -> None:
    batch = loss_batch(dtype)
    waits += dtype == torch.bfloat16
    assert times_waited(lambda: linear_grpo_loss(**batch, **options)[0].backward()) == waits


@pytest.mark.parametrize("case", ["defaults", "gspo", "k3", "guided, released code", "sequence-mask"])
@pytest.mark.parametrize("lengths", [LENGTHS, [70_001], [3] * 5000, [0]], ids=lambda lengths: f"{len(lengths)}")
def test_the_computed_tokens(case: str, lengths: list[int]) -> None:
    options, tensors = CASES[case]
    parsed, tokens = LossOptions(**options), sum(lengths)
    wanted = dict.fromkeys({"loss_mask", "token_advantages", "zero_advantages", *tensors}, True)
    batch = {name: value.detach() for name, value in make_batch(lengths, 7, **wanted).items() if name != "entropy"}
    inputs = LossInputs(**batch, weights=normal(len(lengths), seed=3))
    want = linear_loss.select_tokens(inputs, tokens, parsed)
    on_gpu: Any = {name: x.to(DEVICE) for name, x in vars(inputs).items() if isinstance(x, Tensor)}
    got = linear_loss.select_tokens(LossInputs(**on_gpu), tokens, parsed)
    assert torch.equal(got.rows.cpu(), want.rows)
    assert (got.everything, int(got.in_loss), got.borders) == (want.everything, int(want.in_loss), want.borders)
    for name in on_gpu.keys() - {"logps", "loss_mask"}:
        assert torch.equal(getattr(got.inputs, name).cpu(), getattr(want.inputs, name)), name


def test_small_inputs_may_lie_on_the_cpu() -> None:
    batch = loss_batch() | {"loss_mask": torch.arange(T, device=DEVICE) % 5 != 2}
    want, _ = linear_grpo_loss(**batch)
    moved = {name: batch[name].cpu() for name in ("advantages", "cu_seqlens", "loss_mask")}
    got, _ = linear_grpo_loss(**(batch | moved))
    assert torch.equal(got, want)


@pytest.mark.parametrize("tokens", [0, 1])
def test_hardly_any_tokens(tokens: int) -> None:
    batch = on_device(head_batch(tokens, V, torch.bfloat16), torch.bfloat16, ("hidden", "weight"))
    cu_seqlens = torch.tensor([0, tokens], dtype=torch.int32, device=DEVICE)
    loss, metrics = linear_grpo_loss(**batch, advantages=torch.ones(1, device=DEVICE), cu_seqlens=cu_seqlens)
    found = gradients(loss, batch, ("hidden", "weight"))
    assert float(loss.detach()) == -tokens
    assert int(metrics["tokens"]) == tokens
    assert all(bool(gradient.isfinite().all()) for gradient in found.values())
    assert bool(found["d_weight"].any()) == bool(tokens)


@pytest.mark.parametrize("out_dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("size", [1, 4096 * 7, 4096 * 7 + 13])
def test_scaling_rounds_as_torch_does(size: int, out_dtype: torch.dtype) -> None:
    values, by = normal(size).float().to(DEVICE), torch.tensor(-1 / 3, device=DEVICE)
    out = torch.empty(size, dtype=out_dtype, device=DEVICE)
    scale_in_triton(values, by, out)
    assert torch.equal(out, (values * by).to(out_dtype))
    want = values * by
    scale_in_triton(values, by, values)
    assert torch.equal(values, want)


def test_scaling_more_than_2_31_numbers() -> None:
    size = 2**31 + 4097
    values = torch.zeros(size, dtype=torch.bfloat16, device=DEVICE)
    values[[0, 2**31 - 1, 2**31, -1]] = torch.tensor([1.0, 2, 3, 4], dtype=torch.bfloat16, device=DEVICE)
    scale_in_triton(values, torch.tensor(0.5, device=DEVICE), values)
    assert values[[0, 2**31 - 1, 2**31, -1]].tolist() == [0.5, 1, 1.5, 2]
    assert int(values.count_nonzero()) == 4


def test_more_than_2_31_logits() -> None:
    rows, vocabulary = 14_200, 151_936
    assert rows * vocabulary > 2**31
    logits = torch.zeros(rows, vocabulary, dtype=torch.bfloat16, device=DEVICE)
    logits[-1] = normal(vocabulary).to(torch.bfloat16).to(DEVICE)
    targets = torch.full((rows,), vocabulary - 1, device=DEVICE)
    want = reference.token_logprobs(logits[-1:].double(), targets[-1:])
    assert isinstance(want, Tensor)
    leaf = logits.requires_grad_()
    logps = token_logprobs(leaf, targets)
    assert error(logps[-1:], want.cpu()) < FP32_ERROR
    incoming = torch.zeros(rows, device=DEVICE)
    incoming[-1] = 1.0
    (gradient,) = torch.autograd.grad(logps, leaf, incoming)
    assert float(gradient[-1, -1]) == pytest.approx(1 - float(want.exp()), rel=0.01)
    assert not gradient[: rows // 2].any()

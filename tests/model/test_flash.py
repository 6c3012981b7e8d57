"""Flash attention in parts, over two stand-ins for the kernels: plain torch, and torch's flash attention on the CPU.

Letters: Q / K queries / keys of a call, H heads of one run, D head size.
"""

from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.small_models import FAMILIES as MODELS
from tests.small_models import own_model
from thinktwice_fast.model import attention as attention_module
from thinktwice_fast.model import flash as flash_module
from thinktwice_fast.model.attention import PrefixAttention
from thinktwice_fast.model.flash import ATEN, Flash, Layout, Parts, flash_for, reproduces
from thinktwice_fast.model.shared_prefix import in_torch

CPU, META = torch.device("cpu"), torch.device("meta")
# Prompts and the lengths of what continues them.
Families = list[tuple[int, list[int]]]


def segments(families: Families) -> tuple[list[int], list[int]]:
    """Lengths and prefix of each."""
    lengths: list[int] = []
    prefix: list[int] = []
    for prompt, responses in families:
        prefix += [-1] + [len(lengths)] * len(responses)
        lengths += [prompt, *responses]
    return lengths, prefix


def runs(layout: Layout) -> Iterator[tuple[slice, slice]]:
    """Queries and keys of each sequence of the call, none of them longer than it is told."""
    ends = [x.tolist() for x in (layout.cu_seqlens_q, layout.cu_seqlens_k)]
    assert layout.cu_seqlens_q.dtype == layout.cu_seqlens_k.dtype == torch.int32
    for borders, longest in zip(ends, (layout.longest_q, layout.longest_k), strict=True):
        assert borders[0] == 0 and all(0 <= b - a <= longest for a, b in pairwise(borders))
    assert layout.longest_q > 1  # else the kernels read no cu_seqlens_q
    for q, k in zip(*(pairwise(borders) for borders in ends), strict=True):
        yield slice(*q), slice(*k)


def hidden(queries: int, keys: int, layout: Layout, window: int) -> Tensor:  # bool [Q, K]
    age = torch.arange(keys - queries, keys)[:, None] - torch.arange(keys)
    return (age < 0 if layout.causal else torch.zeros_like(age, dtype=torch.bool)) | (age >= (window or torch.inf))


def heads_first(x: Tensor, heads: int) -> Tensor:  # [N, heads or fewer, D] -> [heads, N, D]
    return x.repeat_interleave(heads // x.shape[1], 1).transpose(0, 1)


# q, k, v [H, Q or K, D], bool mask [Q, K], scale -> out [H, Q, D], lse [H, Q]
RunForward = Callable[[Tensor, Tensor, Tensor, Tensor, float], tuple[Tensor, Tensor]]
# out's gradient, q, k, v, out, lse, mask, scale -> gradients of q, k and v
RunBackward = Callable[..., tuple[Tensor, Tensor, Tensor]]


def made_of(run_forward: RunForward, run_backward: RunBackward) -> Flash:
    """Kernels that go from run to run, and do with empty ones what flash attention does."""

    def forward(q: Tensor, k: Tensor, v: Tensor, layout: Layout, scale: float, window: int) -> tuple[Tensor, Tensor]:
        heads = q.shape[1]
        out, lse = torch.zeros_like(q), q.new_full((heads, len(q)), torch.inf)
        covered = [0, 0]
        for own, seen in runs(layout):
            covered = [own.stop, seen.stop]
            if own.start < own.stop and seen.start < seen.stop:
                mask = hidden(own.stop - own.start, seen.stop - seen.start, layout, window)
                queries, keys, values = (heads_first(x, heads) for x in (q[own], k[seen], v[seen]))
                of_run, lse[:, own] = run_forward(queries, keys, values, mask, scale)
                out[own] = of_run.transpose(0, 1)
        assert covered == [len(q), len(k)]
        return out, lse

    def backward(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *call: Any) -> Any:
        (layout, scale, window), heads = call, q.shape[1]
        found = [torch.zeros_like(x) for x in (q, k, v)]
        for own, seen in runs(layout):
            if own.start < own.stop and seen.start < seen.stop:
                mask = hidden(own.stop - own.start, seen.stop - seen.start, layout, window)
                inputs = [heads_first(x, heads) for x in (grad[own], q[own], k[seen], v[seen], out[own])]
                parts = run_backward(*inputs, lse[:, own], mask, scale)
                for whole, rows, part in zip(found, (own, seen, seen), parts, strict=True):
                    whole[rows] = part.transpose(0, 1).unflatten(1, (whole.shape[1], -1)).sum(2)
        return tuple(found)

    return Flash(forward, backward)


def forward_in_torch(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    scores = (q @ k.mT * scale).masked_fill(mask, -torch.inf)
    return scores.softmax(-1) @ v, scores.logsumexp(-1)


def backward_in_torch(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, mask: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    weights = ((q @ k.mT * scale).masked_fill(mask, -torch.inf) - lse[..., None]).exp()
    of_scores = weights * (grad @ v.mT - (grad * out).sum(-1, keepdim=True)) * scale
    return of_scores @ k, of_scores.mT @ q, weights.mT @ grad


def additive(mask: Tensor, like: Tensor) -> Tensor:  # [1, 1, Q, K]
    return torch.zeros(mask.shape, dtype=like.dtype).masked_fill(mask, -torch.inf)[None, None]


def forward_by_torch(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        q[None], k[None], v[None], attn_mask=additive(mask, q), scale=scale
    )
    return out[0], lse[0]


def backward_by_torch(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    *tensors, mask, scale = arguments
    parts = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        *(x.contiguous()[None] for x in tensors), 0.0, False, attn_mask=additive(mask, tensors[0]), scale=scale
    )
    return tuple(x[0] for x in parts)


class AsOnAGPU(PrefixAttention):
    """By flash attention also on the CPU."""

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float, window: int) -> Tensor:
        assert self.parts is not None
        return self.parts.attend(q, k, v, scale, window)


IN_TORCH = made_of(forward_in_torch, backward_in_torch)
BY_TORCH = made_of(forward_by_torch, backward_by_torch)
FAMILIES = st.lists(st.tuples(st.integers(1, 12), st.lists(st.integers(1, 9), max_size=4)), min_size=1, max_size=4)


@pytest.mark.parametrize("flash", [IN_TORCH, BY_TORCH], ids=["plain torch", "torch's kernel"])
@settings(max_examples=60)
@given(FAMILIES, st.integers(1, 2), st.integers(1, 3), st.sampled_from([0, 0, 1, 4, 15, 40]), st.integers(0, 99))
def test_the_parts_are_the_whole(
    flash: Flash, families: Families, kv_heads: int, group: int, window: int, seed: int
) -> None:
    lengths, prefix = segments(families)
    with mock.patch.object(flash_module, "_KEYS", 4), mock.patch.object(flash_module, "_QUERIES", 3):
        parts = Parts.from_segments(flash, lengths, prefix, CPU)  # also of copied prompts
    random = torch.Generator().manual_seed(seed)
    shapes = [(sum(lengths), heads, 8) for heads in (kv_heads * group, kv_heads, kv_heads, kv_heads * group)]
    q, k, v, grad = (torch.randn(shape, generator=random, dtype=torch.float64) for shape in shapes)
    inputs = [x.requires_grad_() for x in (q, k, v)]
    got = parts.attend(q, k, v, 0.3, window)
    want = in_torch(q, k, v, lengths, prefix, 0.3, window)
    gradients = [torch.autograd.grad(out, inputs, grad) for out in (got, want)]
    for mine, truth in zip((got, *gradients[0]), (want, *gradients[1]), strict=True):
        torch.testing.assert_close(mine, truth, atol=1e-10, rtol=0)


@pytest.mark.parametrize("recomputed", [False, True])
@pytest.mark.parametrize("family", MODELS)
def test_under_a_model(family: str, recomputed: bool) -> None:
    """The second prompt is longer than the windows of 8."""
    lengths, prefix = segments([(3, [2, 1]), (13, [5, 4]), (6, [])])
    model = own_model(family).double()
    for layer in model.layers:
        layer.recomputed = recomputed
    weights = [weight for layer in model.layers for weight in layer.parameters()]
    ids = torch.arange(sum(lengths)) * 7 % model.config.vocab_size
    found = []
    for kind in (AsOnAGPU, PrefixAttention):
        hidden = model(ids, ids % 19, kind.from_segments(lengths, prefix, CPU, IN_TORCH))
        found.append([hidden, *torch.autograd.grad(hidden.sin().sum(), weights)])
    for mine, truth in zip(*found, strict=True):
        torch.testing.assert_close(mine, truth, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize(("families", "copies"), [
    ([(116, [1021] * 8)], 16), ([(512, [1024] * 8)], 4), ([(1563, [1021] * 8)], 1), ([(116, [100] * 8)], 3),
    ([(116, [40])], 1), ([(116, [1021] * 4)] * 2, 1),
])  # fmt: skip
def test_a_short_prompt_is_copied_for_the_processors_sake(families: Families, copies: int) -> None:
    shared = Parts.from_segments(ATEN, *segments(families), META).shared
    assert shared is not None and shared.copies == copies


def test_no_key_is_copied_where_no_window_cuts_a_prompt() -> None:
    """A prompt of 12 and 3 continuing it: the fifteenth position sees the first through a window of 15."""
    parts = Parts.from_segments(IN_TORCH, *segments([(12, [3, 1]), (30, [])]), CPU)
    q = torch.zeros(46, 1, 8)
    for window, copied in ((0, False), (15, False), (14, True)):
        parts.attend(q, q, q, 1.0, window)
        assert ("gathered" in vars(parts)) == copied
    keys, layout = parts.gathered
    assert len(keys) == 46 + 2 * 12 and layout.causal


def test_a_second_derivative_is_refused() -> None:
    q = torch.randn(4, 1, 8, requires_grad=True)
    out = Parts.from_segments(IN_TORCH, [4], [-1], CPU).attend(q, q, q, 1.0, 0)
    with pytest.raises(RuntimeError, match="drop create_graph"):
        torch.autograd.grad(out.sum(), q, create_graph=True)


def test_what_gives_something_else_is_found_out() -> None:
    def base_two(*arguments: Any) -> tuple[Tensor, Tensor]:
        out, lse = IN_TORCH.forward(*arguments)
        return out, lse / torch.log(torch.tensor(2.0))

    def own_softmax(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *call: Any) -> Any:
        return IN_TORCH.backward(grad, q, k, v, *IN_TORCH.forward(q, k, v, *call), *call)

    def not_a_number(*arguments: Any) -> Any:
        return tuple(x * torch.nan for x in IN_TORCH.backward(*arguments))

    wrong = [base_two, IN_TORCH.backward], [IN_TORCH.forward, own_softmax], [IN_TORCH.forward, not_a_number]
    for kernels, right in ((IN_TORCH, True), *((Flash(*pair), False) for pair in wrong)):
        assert reproduces(kernels, CPU, torch.float32, 4, 2, 8) == right


def test_where_it_does_not_run_there_is_one_warning(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    gpu = torch.device("cuda", 7)
    for device, dtype, size in ((CPU, torch.bfloat16, 64), (gpu, torch.float32, 64), (gpu, torch.bfloat16, 12)):
        assert flash_for(device, dtype, 4, 2, size) is None
    assert not caplog.records

    def broken(*_: object) -> bool:
        raise RuntimeError("no such kernel\nat all")

    for number, (reason, answer) in enumerate({"no such kernel": broken, "something else": lambda *_: False}.items()):
        monkeypatch.setattr(flash_module, "reproduces", answer)
        for _ in range(2):
            assert flash_for(torch.device("cuda", 8 + number), torch.bfloat16, 4, 2, 64) is None
        assert len(caplog.records) == number + 1 and reason in caplog.text
    monkeypatch.setattr(flash_module, "reproduces", lambda *_: True)
    assert flash_for(gpu, torch.bfloat16, 4, 2, 64) is ATEN


def test_the_installed_torch_has_what_is_asked_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, with tensors that hold nothing; other types and heads go segment by segment."""
    plain: list[torch.dtype] = []

    def in_torch(q: Tensor, *_: object) -> Tensor:
        plain.append(q.dtype)
        return q

    monkeypatch.setattr(attention_module, "in_torch", in_torch)
    attention = PrefixAttention.from_segments([3, 2, 4], [-1, 0, -1], META, ATEN)
    for dtype, size, flash in (
        (torch.bfloat16, 8, True), (torch.float16, 256, True), (torch.float32, 8, False), (torch.bfloat16, 12, False),
        (torch.bfloat16, 264, False),
    ):  # fmt: skip
        q, k = (torch.empty(9, heads, size, dtype=dtype, device=META, requires_grad=True) for heads in (4, 2))
        for window in (0, 3):
            plain.clear()
            out = attention.attend(0, q, k, k, 0.3, window)
            out.sum().backward()
            assert out.shape == q.shape and plain == ([] if flash else [dtype])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("heads", [(16, 8, 128), (32, 8, 64), (4, 4, 256), (5, 1, 96)], ids=str)
def test_on_a_gpu(heads: tuple[int, int, int], dtype: torch.dtype) -> None:
    assert reproduces(ATEN, torch.device("cuda"), dtype, *heads)

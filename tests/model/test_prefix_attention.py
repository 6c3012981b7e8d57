"""Which implementation of shared-prefix attention runs where, and that they agree."""

import copy
import inspect
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM

from tests.model.padded import PaddedAttention
from tests.model.rounding import assert_as_exact
from tests.small_models import FAMILIES, VOCABULARY, family_config, random_model
from thinktwice_fast.model import attention as attention_module
from thinktwice_fast.model import shared_prefix
from thinktwice_fast.model.attention import NAME, PrefixAttention, causal_attention
from thinktwice_fast.model.loading import checkpoint_layers
from thinktwice_fast.model.policy import Policy, linear_head
from thinktwice_fast.model.shared_prefix import Gathered, in_torch

CPU = torch.device("cpu")
# A prompt longer than OLMo-3's window of 8 with three responses, one of them shorter than the window; a sequence that
# shares nothing; a short prompt with two responses.
LENGTHS, PREFIX = [21, 13, 5, 40, 9, 3, 30, 2], [-1, 0, 0, 0, -1, -1, 5, 5]


def shared_row() -> tuple[Tensor, Tensor]:
    """Tokens and positions."""
    tokens = torch.randint(VOCABULARY, (sum(LENGTHS),), generator=torch.Generator().manual_seed(1))
    starts = [LENGTHS[before] if before >= 0 else 0 for before in PREFIX]
    spans = [torch.arange(start, start + n) for start, n in zip(starts, LENGTHS, strict=True)]
    return tokens, torch.cat(spans)


def results(model: Any, logits: Tensor) -> list[Tensor]:
    """The logits, and every parameter's gradient of a loss on them."""
    targets = torch.arange(len(logits)) * 7 % VOCABULARY
    model.zero_grad()
    cross_entropy(logits, targets).backward()
    return [logits.detach(), *(parameter.grad.clone() for parameter in model.parameters())]


def in_one_row(model: Any) -> list[Tensor]:
    tokens, positions = shared_row()
    attention = PrefixAttention.from_segments(LENGTHS, PREFIX, CPU)
    return results(model, Policy(model)(tokens, positions, attention, torch.arange(len(tokens)), linear_head))


def one_by_one(model: Any) -> list[Tensor]:
    """Each segment behind its own copy of its prefix, by transformers' own attention."""
    parts = shared_row()[0].split(LENGTHS)
    logits = []
    for part, before in zip(parts, PREFIX, strict=True):
        whole = torch.cat([parts[before], part]) if before >= 0 else part
        logits.append(model(input_ids=whole[None], use_cache=False).logits[0, len(whole) - len(part) :])
    return results(model, torch.cat(logits))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_shared_row_equals_each_sequence_alone(family: str) -> None:
    ours, theirs = random_model(family, NAME), random_model(family, "sdpa")
    exact = one_by_one(copy.deepcopy(theirs).double())
    assert_as_exact(in_one_row(ours), one_by_one(theirs), exact)
    for mine, truth in zip(in_one_row(ours.double()), exact, strict=True):
        assert mine.dtype == torch.float64
        assert (mine - truth).norm() <= 1e-7 * truth.norm()


@pytest.mark.parametrize("family", FAMILIES)
def test_recomputed_layers_give_the_same_gradients(family: str) -> None:
    model = random_model(family, NAME)
    expected = in_one_row(model)
    checkpoint_layers(model)
    assert all(torch.equal(x, y) for x, y in zip(in_one_row(model), expected, strict=True))


def test_a_response_beyond_the_window_does_not_see_the_prompt() -> None:
    config = family_config("olmo3")
    config.layer_types = ["sliding_attention"]
    config.num_hidden_layers = 1
    model = AutoModelForCausalLM.from_config(config, attn_implementation=NAME).eval()
    tokens, positions = shared_row()
    attention = PrefixAttention.from_segments(LENGTHS, PREFIX, CPU)
    select = torch.arange(len(tokens))

    def logits_of(row: Tensor) -> tuple[Tensor, ...]:
        return Policy(model)(row, positions, attention, select, linear_head).split(LENGTHS)

    before = logits_of(tokens)
    after = logits_of(torch.cat([(tokens[:21] + 1) % VOCABULARY, tokens[21:]]))
    for segment in (1, 3):
        assert torch.equal(before[segment][7:], after[segment][7:])
        assert not torch.equal(before[segment][6], after[segment][6])
    assert all(torch.equal(before[segment], after[segment]) for segment in range(4, 8))


def varlen_reference(q: Tensor, k: Tensor, v: Tensor, segments: Gathered, scale: float, window: int) -> Tensor:
    """What variable-length kernels promise: causal, the last query of a sequence at its last key."""
    cu_q, cu_k, longest_q, longest_k = segments.layout
    counts_q, counts_k = cu_q.diff().tolist(), cu_k.diff().tolist()
    assert cu_q.dtype == cu_k.dtype == torch.int32
    assert (longest_q, longest_k) == (max(counts_q), max(counts_k))
    outs = []
    for queries, keys, values in zip(q.split(counts_q), k.split(counts_k), v.split(counts_k), strict=True):
        group = q.shape[1] // k.shape[1]
        scores = torch.einsum("qhd,khd->hqk", queries, keys.repeat_interleave(group, 1)) * scale
        age = torch.arange(len(keys))[len(keys) - len(queries) :, None] - torch.arange(len(keys))
        hidden = (age < 0) | (age >= (window or len(keys)))
        weights = scores.masked_fill(hidden, float("-inf")).softmax(-1)
        outs.append(torch.einsum("hqk,khd->qhd", weights, values.repeat_interleave(group, 1)))
    return torch.cat(outs)


@pytest.mark.parametrize("window", [0, 8])
def test_gathered_keys_are_those_that_a_segment_sees(window: int) -> None:
    random = torch.Generator().manual_seed(2)
    shapes = [(sum(LENGTHS), heads, 8) for heads in (4, 2, 2, 4)]
    q, k, v, gradient = (torch.randn(shape, generator=random, dtype=torch.float64) for shape in shapes)
    inputs = [x.requires_grad_() for x in (q, k, v)]
    got = Gathered.from_segments(LENGTHS, PREFIX, CPU).attend(varlen_reference, q, k, v, 0.3, window)
    expected = in_torch(q, k, v, LENGTHS, PREFIX, 0.3, window)
    gradients = [torch.autograd.grad(out, inputs, gradient) for out in (got, expected)]
    for mine, truth in zip((got, *gradients[0]), (expected, *gradients[1]), strict=True):
        torch.testing.assert_close(mine, truth, atol=1e-12, rtol=0)


@pytest.mark.parametrize("flash_attn", [True, False])
@pytest.mark.parametrize(("window", "left"), [(0, -1), (1, 0), (8, 7)])
def test_how_the_installed_kernels_are_asked(
    flash_attn: bool, window: int, left: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their windows count the keys before a query, and -1 is all of them."""
    asked: dict[str, Any] = {}

    def kernel(q: Tensor, k: Tensor, v: Tensor, *layout: Any, **options: Any) -> Tensor:
        asked.update(options, layout=layout)
        return q

    q, k = torch.zeros(sum(LENGTHS), 4, 8), torch.zeros(sum(LENGTHS), 2, 8)
    segments = Gathered.from_segments(LENGTHS, PREFIX, CPU)
    names = {"flash_attn_varlen_func": kernel, "varlen_attn": kernel}
    monkeypatch.setattr(shared_prefix, "import_module", lambda name: type(name, (), names))
    segments.attend(shared_prefix._by_flash_attn if flash_attn else shared_prefix._by_torch, q, k, k, 0.3, window)
    expected: dict[str, Any] = (
        {"scale": 0.3, "enable_gqa": True} if not flash_attn else {"softmax_scale": 0.3, "causal": True}
    )
    expected["window_size"] = (left, 0)
    assert asked.pop("layout") == segments.layout
    assert asked == expected


@pytest.mark.parametrize(("dtype", "size", "kernel"), [
    (torch.bfloat16, 8, True), (torch.float16, 256, True), (torch.float32, 8, False), (torch.bfloat16, 12, False),
    (torch.bfloat16, 264, False),
])  # fmt: skip
def test_what_the_kernels_do_not_take_is_computed_in_torch(
    dtype: torch.dtype, size: int, kernel: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU, with tensors that hold nothing."""
    ran = []
    monkeypatch.setattr(attention_module, "varlen_attention", lambda: lambda q, *rest: ran.append("kernel"))
    monkeypatch.setattr(attention_module, "in_torch", lambda q, *rest: ran.append("torch"))
    attention = PrefixAttention(
        torch.tensor([3, 2]), torch.tensor([-1, 0]), Gathered.from_segments([3, 2], [-1, 0], torch.device("meta"))
    )
    x = torch.zeros(5, 2, size, dtype=dtype, device="meta")
    attention.attend(0, x, x, x, 0.3, 0)
    assert ran == ["kernel" if kernel else "torch"]


def test_the_installed_torch_has_what_is_asked_of_it() -> None:
    asked = inspect.signature(shared_prefix._torch_varlen_attn()).parameters
    assert {"scale", "window_size"} <= set(asked) or "enable_gqa" not in asked


def test_sequences_that_share_nothing() -> None:
    ours = causal_attention([3, 40], CPU)
    assert isinstance(ours, PrefixAttention) and ours.prefix.tolist() == [-1, -1]
    random = torch.Generator().manual_seed(3)
    q, k, v = (torch.randn(43, heads, 16, generator=random) for heads in (4, 2, 2))
    theirs = PaddedAttention.from_lengths([3, 40], CPU)
    for window in (0, 8):
        torch.testing.assert_close(ours.attend(0, q, k, v, 0.3, window), theirs.attend(0, q, k, v, 0.3, window))

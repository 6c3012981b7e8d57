"""Shared-prefix attention and its gradients against a dense mask in float64, and what must not change their bits.

Letters: T tokens, Hq / Hkv query / key-value heads, D head size, G query heads of a key-value head.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from thinktwice_fast.model.paged import PagedKVCache
from thinktwice_fast.model.shared_prefix import in_torch, prefix_attention

EPS = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}  # unit roundoff
SCALE = 0.3
LENGTHS, PREFIX = [70, 30, 1, 100, 5, 64, 3], [-1, 0, 0, 0, -1, -1, 5]


def visible(lengths: Sequence[int], prefix: Sequence[int], window: int) -> Tensor:  # bool [T, T]
    """Which keys each query sees, from the definition."""
    owner = torch.tensor([s for s, length in enumerate(lengths) for _ in range(length)], dtype=torch.int64)
    position = torch.tensor(
        [
            i + (lengths[before] if before >= 0 else 0)
            for length, before in zip(lengths, prefix, strict=True)
            for i in range(length)
        ]
    )
    before = torch.tensor(prefix)[owner]
    age = position[:, None] - position
    related = (owner[:, None] == owner) | (before[:, None] == owner)
    return related & (age >= 0) & (age < (window or math.inf))


@dataclass
class Case:
    """Random inputs and incoming gradient of a layout."""

    q: Tensor  # [T, Hq, D]
    k: Tensor  # [T, Hkv, D]
    v: Tensor  # [T, Hkv, D]
    gradient: Tensor  # [T, Hq, D]
    lengths: Sequence[int]
    prefix: Sequence[int]
    window: int

    def run(self) -> list[Tensor]:
        """The result and the gradients of q, k and v."""
        q, k, v = (x.detach().requires_grad_() for x in (self.q, self.k, self.v))
        out = prefix_attention(q, k, v, torch.tensor(self.lengths), torch.tensor(self.prefix), SCALE, self.window)
        return [out.detach(), *torch.autograd.grad(out, (q, k, v), self.gradient)]


def case(
    lengths: Sequence[int] = LENGTHS,
    prefix: Sequence[int] = PREFIX,
    *,
    kv_heads: int = 2,
    group: int = 2,
    dim: int = 20,
    window: int = 0,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> Case:
    random = torch.Generator().manual_seed(seed)
    sizes = [kv_heads * group, kv_heads, kv_heads, kv_heads * group]
    parts = [torch.randn(sum(lengths), heads, dim, generator=random).to(dtype) for heads in sizes]
    return Case(parts[0], parts[1], parts[2], parts[3], lengths, prefix, window)


def dense(c: Case) -> list[tuple[Tensor, Tensor]]:
    """What ``Case.run`` gives, in float64, and the first-order error bound of each element.

    With u the roundoff of float32, a score is off by (D + 3) u |q||k| scale, so a weight by twice the row's largest
    such error and (T + 12) u of sums, exponential and logarithm; the product of gradient and value by (D + 2) u of its
    absolute terms, and that of gradient and result by the rounding of the result too. The rest are sums of at most T G
    terms, rounded to their own type.
    """
    u, eps = 2.0**-24, EPS[c.q.dtype]
    tokens, heads, dim = c.q.shape
    group = heads // c.k.shape[1]
    q, gradient = c.q.double().transpose(0, 1), c.gradient.double().transpose(0, 1)  # [Hq, T, D]
    k, v = (x.double().repeat_interleave(group, 1).transpose(0, 1) for x in (c.k, c.v))
    seen = visible(c.lengths, c.prefix, c.window)
    scores = (q @ k.mT * SCALE).masked_fill(~seen, -math.inf)
    weights = scores.softmax(-1)
    off = ((dim + 3) * u * SCALE * (q.abs() @ k.abs().mT)).masked_fill(~seen, 0)
    lse = scores.logsumexp(-1, keepdim=True).abs()
    weights_off = weights * (off + off.amax(-1, keepdim=True) + (tokens + 12 + 2 * lse) * u)
    out = weights @ v
    products = gradient @ v.mT
    delta = (gradient * out).sum(-1, keepdim=True)
    magnitude = (gradient.abs() * out.abs()).sum(-1, keepdim=True)
    score_gradients = weights * (products - delta)
    rounding = (dim + 2) * u * (gradient.abs() @ v.abs().mT + magnitude) + eps * magnitude
    out_off = weights_off @ v.abs() + (tokens + 3) * u * (weights @ v.abs())
    rounding += (gradient.abs() * out_off).sum(-1, keepdim=True)
    score_off = weights_off * (products - delta).abs() + weights * rounding
    terms = (tokens * group + 3) * u

    def by_kv_head(x: Tensor) -> Tensor:  # [Hq, T, D] -> [T, Hkv, D]
        return x.unflatten(0, (-1, group)).sum(1).transpose(0, 1)

    def sums(left: Tensor, left_off: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
        return left @ right, left_off @ right.abs() + terms * (left.abs() @ right.abs())

    dq = [x.transpose(0, 1) * SCALE for x in sums(score_gradients, score_off, k)]
    dk = [by_kv_head(x) * SCALE for x in sums(score_gradients.mT, score_off.mT, q)]
    dv = [by_kv_head(x) for x in sums(weights.mT, weights_off.mT, gradient)]
    tiny = torch.finfo(c.q.dtype).tiny
    results = [(out.transpose(0, 1), out_off.transpose(0, 1)), dq, dk, dv]
    return [(value, 1.05 * (bound + eps * value.abs()) + tiny) for value, bound in results]


def assert_within_bounds(c: Case, got: list[Tensor]) -> None:
    for name, mine, (exact, bound) in zip(("out", "dq", "dk", "dv"), got, dense(c), strict=True):
        assert mine.dtype == c.q.dtype
        excess = ((mine.double() - exact).abs() / bound).max()
        assert excess <= 1, f"{name} is off by {excess:.3g} times what rounding explains"


@st.composite
def layouts(draw: st.DrawFn) -> tuple[list[int], list[int]]:
    lengths = draw(st.lists(st.integers(0, 90), min_size=1, max_size=6))
    if not sum(lengths):
        lengths[0] = 1
    prefix = [-1]
    for s in range(1, len(lengths)):
        prefix.append(draw(st.sampled_from([-1, *(r for r in range(s) if prefix[r] == -1)])))
    return lengths, prefix


@settings(max_examples=60)
@given(st.data())
def test_random_layouts(data: st.DataObject) -> None:
    lengths, prefix = data.draw(layouts())
    made = case(
        lengths,
        prefix,
        kv_heads=data.draw(st.integers(1, 3), "kv_heads"),
        group=data.draw(st.sampled_from([1, 2, 3, 5, 80]), "group"),
        dim=data.draw(st.sampled_from([1, 7, 16, 20, 32, 80]), "dim"),
        window=data.draw(st.sampled_from([0, 0, 1, 20, 64, 130]), "window"),
        dtype=data.draw(st.sampled_from(list(EPS)), "dtype"),
        seed=data.draw(st.integers(0, 1000), "seed"),
    )
    assert_within_bounds(made, made.run())


@pytest.mark.parametrize("window", [0, 40])
def test_the_reference_in_torch(window: int) -> None:
    made = case(window=window)
    q, k, v = (x.double().requires_grad_() for x in (made.q, made.k, made.v))
    out = in_torch(q, k, v, LENGTHS, PREFIX, SCALE, window)
    gradients = torch.autograd.grad(out, (q, k, v), made.gradient.double())
    for mine, (exact, _) in zip((out, *gradients), dense(made), strict=True):
        torch.testing.assert_close(mine, exact, atol=1e-11, rtol=0)


@pytest.mark.parametrize("window", [0, 50])
@pytest.mark.parametrize("dtype", list(EPS))
def test_bits_are_those_of_the_paged_attention(dtype: torch.dtype, window: int) -> None:
    """Prompt and response as one sequence, prefilled whole, and decoded token by token."""
    made = case(dtype=dtype, window=window)
    result = made.run()[0].split(LENGTHS)
    parts = [x.split(LENGTHS) for x in (made.q, made.k, made.v)]
    for s, before in enumerate(PREFIX):
        q, k, v = (torch.cat([part[before], part[s]]) if before >= 0 else part[s] for part in parts)
        for step in (len(q), 1):
            cache = PagedKVCache(1, -(-len(q) // 16), 2, 20, dtype=dtype)
            handle = cache.prefill()
            outs = []
            for first in range(0, len(q), step):
                plan = cache.extend([handle], [step])
                assert plan is not None
                span = slice(first, first + step)
                outs.append(cache.attend(0, plan, q[span], k[span], v[span], SCALE, window))
            assert torch.equal(torch.cat(outs)[len(q) - LENGTHS[s] :], result[s])


def test_other_segments_do_not_change_a_segments_bits() -> None:
    whole = case()
    result = whole.run()[0].split(LENGTHS)
    pick = torch.cat([torch.arange(70), torch.arange(101, 201)])  # the first prompt and its third response
    alone = Case(whole.q[pick], whole.k[pick], whole.v[pick], whole.gradient[pick], [70, 100], [-1, 0], 0)
    assert torch.equal(alone.run()[0], torch.cat([result[0], result[3]]))


@pytest.mark.parametrize("members", [3, 40])
def test_threads_do_not_change_bits(members: int) -> None:
    """Also where a family is divided between tasks, as here, and its prompt's gradients are added up at the end."""
    made = case([90, *range(1, members + 1)], [-1] + [0] * members, kv_heads=1)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(made.run())
    finally:
        torch.set_num_threads(before)
    assert_within_bounds(made, results[0])
    for other in results[1:]:
        assert all(torch.equal(x, y) for x, y in zip(results[0], other, strict=True))


def test_nothing_unwritten_is_read() -> None:
    """Results and the gaps between the inputs' rows start as NaN, and so do the threads' buffers."""
    made = case(dim=20)
    expected = made.run()
    poison = case(dim=20)
    poison.q.fill_(math.nan)
    poison.gradient.fill_(math.nan)

    def with_gaps(x: Tensor) -> Tensor:
        wide = torch.full((x.shape[0], x.shape[1] + 1, x.shape[2] + 3), math.nan)
        wide[:, :-1, :-3] = x
        return wide[:, :-1, :-3]

    made.q, made.k, made.v, made.gradient = (with_gaps(x) for x in (made.q, made.k, made.v, made.gradient))
    torch.use_deterministic_algorithms(True)  # fills new tensors with NaN
    try:
        assert torch.empty(3).isnan().all()
        assert poison.run()[1].isnan().all()
        got = made.run()
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(x, y) for x, y in zip(got, expected, strict=True))


def test_an_expanded_gradient() -> None:
    made = case()
    made.gradient = torch.ones(1, 1, 1).expand(made.q.shape)
    assert_within_bounds(made, made.run())


def test_the_op_is_registered_whole() -> None:
    made = case([5, 3], [-1, 0], dim=4)
    inputs = [x.requires_grad_() for x in (made.q, made.k, made.v)]
    op = torch.ops.thinktwice.prefix_attention.default
    torch.library.opcheck(op, (*inputs, torch.tensor([5, 3]), torch.tensor([-1, 0]), SCALE, 0))


def test_a_second_derivative_is_refused() -> None:
    made = case([5, 3], [-1, 0])
    out = prefix_attention(made.q.requires_grad_(), made.k, made.v, torch.tensor([5, 3]), torch.tensor([-1, 0]), SCALE)
    with pytest.raises(RuntimeError, match="no second derivative: drop create_graph=True"):
        torch.autograd.grad(out.sum(), made.q, create_graph=True)


def test_wrong_arguments() -> None:
    q, k = torch.zeros(8, 4, 16), torch.zeros(8, 2, 16)
    lengths, prefix = torch.tensor([5, 3]), torch.tensor([-1, 0])
    prefix_attention(q, k, k, lengths, prefix, 1.0)
    bad = [
        ((q, k, k, lengths + 1, prefix), "segment 1 of 4 tokens does not fit into the row of 8"),
        ((q, k, k, lengths - 1, prefix), "the segments have 6 tokens, the row has 8"),
        ((q, k, k, torch.tensor([9, -1]), prefix), "segment 0 of 9 tokens does not fit"),
        ((q, k, k, lengths, torch.tensor([-1, 1])), "the prefix of segment 1 is 1, must be an earlier segment without"),
        ((q, k, k, torch.tensor([5, 2, 1]), torch.tensor([-1, 0, 1])), "the prefix of segment 2 is 1"),
        ((q, k, k, lengths, torch.tensor([-2, 0])), "the prefix of segment 0 is -2"),
        ((q, k, k, lengths, prefix[:1]), "prefix has 1 entries, expected 2"),
        ((q, k, k, lengths.int(), prefix), "lengths must be a contiguous Long vector"),
        ((q[:, :3], k, k, lengths, prefix), "query heads that share the KV heads evenly"),
        ((q, k[:7], k, lengths, prefix), "k must be \\[8, 2, 16\\] of q's type"),
        ((q, k, k.half(), lengths, prefix), "v must be \\[8, 2, 16\\] of q's type"),
        ((q.double(), k.double(), k.double(), lengths, prefix), "type Double is not one of float32"),
    ]
    for arguments, message in bad:
        with pytest.raises(RuntimeError, match=message):
            prefix_attention(*arguments, 1.0)
    with pytest.raises(RuntimeError, match="window must not be negative"):
        prefix_attention(q, k, k, lengths, prefix, 1.0, -1)

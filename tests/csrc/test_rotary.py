"""QK-norm, rotation and the cache write in one op, against transformers' own modules and float64."""

from dataclasses import dataclass, fields, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.csrc.test_attention import EPS
from tests.small_models import FAMILIES, random_model
from thinktwice_fast.model import csrc, reference
from thinktwice_fast.model.attention import NAME

DTYPES = list(EPS)
SPACE = (7, 5)  # blocks of the cache and tokens of a block


@dataclass
class Given:
    """The op's arguments, in its order."""

    q: Tensor  # [T, Hq, D]
    k: Tensor  # [T, Hkv, D]
    v: Tensor  # [T, Hkv, D]
    q_norm: Tensor | None
    k_norm: Tensor | None
    eps: float
    cos: Tensor | None  # [P, D]
    sin: Tensor | None
    positions: Tensor  # int64 [T]
    slots: Tensor  # int64 [T]
    k_cache: Tensor  # [B, Hkv, bs, D]
    v_cache: Tensor

    def arguments(self) -> tuple[Any, ...]:
        """With copies of what the op writes, so that it can be run again."""
        own = {name: getattr(self, name).clone() for name in ("k_cache", "v_cache")}
        # Not clone(): q keeps its place among the others and its strides.
        own["q"] = self.q.new_empty(self.q.shape[0] * self.q.stride(0) + 1).as_strided(self.q.shape, self.q.stride())
        own["q"].copy_(self.q)
        return tuple(own.get(field.name, getattr(self, field.name)) for field in fields(self))

    def double(self) -> "Given":
        parts: dict[str, Any] = {field.name: getattr(self, field.name) for field in fields(self)}
        wide: dict[str, Any] = {
            name: x.double() if isinstance(x, Tensor) and x.is_floating_point() else x for name, x in parts.items()
        }
        return Given(**wide)


def results(op: Any, given: Given) -> list[Tensor]:
    """Queries and both caches after the op."""
    arguments = given.arguments()
    op(*arguments)
    return [arguments[0], *arguments[-2:]]


def problem(
    heads: int,
    kv_heads: int,
    dim: int,
    *,
    norm: str = "none",  # or "each head", "all heads"
    rotated: bool = True,
    tokens: int = 6,
    pad: int = 0,  # unused elements between tokens
    dtype: torch.dtype = torch.float32,
) -> Given:
    """Queries, keys and values stand side by side, as one projection leaves them."""
    random = torch.Generator().manual_seed(heads + dim)
    width = (heads + 2 * kv_heads) * dim
    row = torch.randn(tokens, width + pad, generator=random).to(dtype)
    q, k, v = (
        part.unflatten(1, (-1, dim)) for part in row[:, :width].split([heads * dim, kv_heads * dim, kv_heads * dim], 1)
    )

    def weight(own: int) -> Tensor | None:
        size = dim * (own if norm == "all heads" else 1)
        return None if norm == "none" else (1 + 0.3 * torch.randn(size, generator=random)).to(dtype)

    angles = torch.randn(40, dim, generator=random)  # halves that differ, so that a swap of them shows
    slots = torch.randperm(SPACE[0] * SPACE[1], generator=random)[:tokens]
    cache = torch.randn(2, SPACE[0], kv_heads, SPACE[1], dim, generator=random).to(dtype)
    cos, sin = (angles.cos(), angles.sin()) if rotated else (None, None)
    return Given(
        q, k, v, weight(heads), weight(kv_heads), 1e-5, cos, sin,
        torch.randint(40, (tokens,), generator=random), slots, cache[0], cache[1],
    )  # fmt: skip


CASES = [
    {"heads": 4, "kv_heads": 2, "dim": 16},
    {"heads": 5, "kv_heads": 1, "dim": 128, "norm": "each head"},
    {"heads": 40, "kv_heads": 8, "dim": 8, "norm": "each head", "pad": 2},
    {"heads": 6, "kv_heads": 3, "dim": 80, "norm": "all heads"},
    {"heads": 2, "kv_heads": 2, "dim": 256, "norm": "all heads", "pad": 1, "rotated": False},
    {"heads": 3, "kv_heads": 1, "dim": 96, "tokens": 1},
    {"heads": 4, "kv_heads": 2, "dim": 16, "tokens": 0},
]


UNEVEN = [  # not on a GPU
    {"heads": 3, "kv_heads": 1, "dim": 6, "norm": "all heads"},
    {"heads": 3, "kv_heads": 1, "dim": 7, "norm": "each head", "rotated": False},
]


def assert_rounded_once(got: list[Tensor], exact: list[Tensor], dtype: torch.dtype) -> None:
    """To the type; float32 within adds little. Rotation adds two products, so the error is one of their size."""
    for mine, truth in zip(got, exact, strict=True):
        torch.testing.assert_close(mine.double(), truth, rtol=1.01 * EPS[dtype], atol=3e-6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", [*CASES, *UNEVEN])
def test_the_op_computes_the_reference_in_float64(dtype: torch.dtype, case: dict[str, Any]) -> None:
    given = problem(**case, dtype=dtype)
    exact = results(reference.rotary_write_kv, given.double())
    assert_rounded_once(results(csrc.rotary_write_kv, given), exact, dtype)
    assert_rounded_once(results(reference.rotary_write_kv, given), exact, dtype)


class Captured:
    """The attention that a module asks for, kept instead of computed."""

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float, window: int) -> Tensor:
        self.q, self.k, self.v = q, k, v
        return q


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_transformers_modules_compute_the_same(family: str, dtype: torch.dtype) -> None:
    model = random_model(family, NAME).to(dtype)
    attention = model.model.layers[0].self_attn
    norms = [getattr(attention, name, None) for name in ("q_norm", "k_norm")]
    random = torch.Generator().manual_seed(0)
    for norm in filter(None, norms):
        norm.weight.copy_(1 + 0.3 * torch.randn(norm.weight.shape, generator=random))
    hidden = torch.randn(1, 9, 64, generator=random).to(dtype)
    positions = torch.tensor([0, 1, 2, 900, 901, 902, 7, 8, 9])
    kind = ["sliding_attention"] if isinstance(model.model.rotary_emb.rope_type, dict) else []
    theirs = Captured()
    attention(hidden, model.model.rotary_emb(hidden, positions[None], *kind), None, attention=theirs)

    dim = attention.head_dim
    q, k, v = (project(hidden)[0].unflatten(1, (-1, dim))
               for project in (attention.q_proj, attention.k_proj, attention.v_proj))  # fmt: skip
    cos, sin = (table[0] for table in model.model.rotary_emb(hidden, torch.arange(1000)[None], *kind))
    caches = torch.zeros(2, *SPACE[:1], k.shape[1], SPACE[1], dim, dtype=dtype)
    slots = torch.arange(20, 29)
    op = csrc.rotary_write_kv
    if dtype == torch.float64:
        op = reference.rotary_write_kv
    else:
        cos, sin = cos.float(), sin.float()
    q_norm, k_norm = (norm and norm.weight for norm in norms)
    op(q, k, v, q_norm, k_norm, model.config.rms_norm_eps, cos, sin, positions, slots, caches[0], caches[1])
    # Norms are computed in float32 there, whatever the type; bfloat16 is rounded up to five times there, once here.
    tolerance = {torch.float64: 1e-6, torch.float32: 1e-6, torch.bfloat16: 3 * EPS[torch.bfloat16]}[dtype]
    for ours, expected in zip((q, *caches), (theirs.q, theirs.k, theirs.v), strict=True):
        got = ours if ours is q else ours.transpose(1, 2).flatten(0, 1)[slots]
        torch.testing.assert_close(got, expected, rtol=0, atol=tolerance * expected.abs().max().item())


def test_wrong_arguments_change_nothing() -> None:
    given = problem(4, 2, 16, norm="all heads")
    assert given.cos is not None and given.sin is not None and given.q_norm is not None
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"slots": torch.tensor([0, 1, 2, 3, 4, 35])}, "slot 35 of token 5 lies outside the cache of 35 slots"),
        ({"positions": torch.tensor([0, 1, -1, 3, 4, 5])}, "position -1 of token 2 lies outside the tables of 40"),
        ({"positions": torch.arange(35, 41)}, "position 40 of token 5"),
        ({"positions": torch.arange(5)}, "positions has 5 entries, expected 6"),
        ({"q_norm": torch.ones(32)}, "q_norm has 32 elements, expected 16 or, over all heads, 64"),
        ({"k_norm": torch.ones(16).half()}, "k_norm must be a contiguous Float vector"),
        ({"sin": None}, "cos and sin are given together or not at all"),
        ({"cos": given.cos.half()}, r"contiguous float32 CPU tensors \[positions, 16\]"),
        ({"sin": given.sin[:39]}, "contiguous float32"),
        ({"q": given.q[:, :, :8]}, r"q is \[6, 4, 8\], expected \[6, 4, 16\]"),
        ({"k": given.k[:5]}, r"k is \[5, 2, 16\], expected \[6, 2, 16\]"),
        ({"v": given.v.half()}, "v must be a CPU tensor"),
    ]
    for change, message in wrong:
        arguments = replace(given, **change).arguments()
        with pytest.raises(RuntimeError, match=message):
            csrc.rotary_write_kv(*arguments)
        assert torch.equal(arguments[-1], given.v_cache) and torch.equal(arguments[-2], given.k_cache)
    odd = problem(2, 1, 7)
    with pytest.raises(RuntimeError, match="a head of 7 elements has no two halves"):
        csrc.rotary_write_kv(*odd.arguments())


def test_the_op_is_described_to_torch() -> None:
    torch.library.opcheck(csrc.ops.rotary_write_kv.default, problem(4, 2, 16, norm="each head").arguments())

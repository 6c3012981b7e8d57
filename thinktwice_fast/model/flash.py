"""Attention of a packed row by flash attention (Dao 2023, arXiv 2307.08691): two variable-length calls.

    own     each segment over itself, causal
    prefix  all responses of a prompt over it, as one block of queries; it holds for all of them alike

``merge_attention`` puts the two together. Backward, each part's own kernel gets the merged out and lse: its weights
exp(score - lse) are then those of the whole softmax, and the parts' gradients add up to the exact ones.

Lengths are data to these kernels. cuDNN's attention, which torch takes for one segment at a time, builds a graph for
every number of queries and keys that it has not met: 1.8 s of the host for a row of new lengths (an H200, 28 layers).

Where a layer's window hides nothing of a prompt from any response, only the own part needs it. Where it cuts a prompt,
it does so at another place for each response: then each segment gets its own copy of the keys that come before it, and
all are one causal call.

Letters: T tokens, N sequences of a call, Q / K their queries / keys together, K' keys of all segments, copies counted,
Hq / Hkv query / key-value heads, D head size.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from itertools import accumulate, pairwise
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from thinktwice_fast.config import RolloutOptions
from thinktwice_fast.model.lists import upload
from thinktwice_fast.model.shared_prefix import in_torch, spans
from thinktwice_kernels import merge_attention

log = logging.getLogger(__name__)
# How far results and gradients may lie from plain torch's in float32, relatively; 2^-8 is one rounding of bfloat16.
_TOLERANCE = 0.02
# Rows held against plain torch, lengths and prefix: several blocks of keys, single tokens, two shared prompts with a
# lone segment between them; one prompt, in copies.
_ROWS = (
    ((150, 70, 1, 200, 40, 33, 130, 5), (-1, 0, 0, 0, -1, -1, 5, 5)),
    ((140, 500, 300), (-1, 0, 0)),
)
_WINDOWS = 0, 24  # the second cuts prompts
# Backward, a program takes so many keys and goes over all queries that see them. With fewer programs to a head than
# this, heads alone do not keep a GPU's processors busy; nor is a program worth starting for fewer queries than that.
_KEYS, _PROGRAMS, _QUERIES = 128, 16, 256


class Layout(NamedTuple):
    """Of one call: its i-th run of queries sees its i-th run of keys; either may be empty."""

    cu_seqlens_q: Tensor  # int32 [N + 1]
    cu_seqlens_k: Tensor  # int32 [N + 1]
    longest_q: int
    longest_k: int
    causal: bool  # a run's last query stands at its last key


class Flash(NamedTuple):
    """The kernels. A query without keys gets an lse of plus or minus infinity, and no gradient."""

    # q [Q, Hq, D], k and v [K, Hkv, D], layout, scale, window (0 = all) -> out [Q, Hq, D], lse [Hq, Q]
    forward: Callable[[Tensor, Tensor, Tensor, Layout, float, int], tuple[Tensor, Tensor]]
    # out's gradient [Q, Hq, D], q, k, v, out, lse (contiguous), layout, scale, window -> gradients of q, k and v
    backward: Callable[
        [Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Layout, float, int], tuple[Tensor, Tensor, Tensor]
    ]


class Shared(NamedTuple):
    """The prefix part, on the row from the first shared prompt to the last response."""

    layout: Layout
    queries: slice  # of the row, from the first response on
    keys: slice  # of the row, up to the end of the last prompt
    copies: int  # of a row's only prompt, so that a short one's gradients are computed by more programs

    def of_keys(self, x: Tensor) -> Tensor:  # [T, Hkv, D] -> [K, Hkv, D]
        """Keys or values of the call."""
        return x[self.keys].repeat(self.copies, 1, 1) if self.copies > 1 else x[self.keys]

    def sum_copies(self, gradient: Tensor) -> Tensor:  # [K, Hkv, D] -> [keys, Hkv, D]
        """The gradient of what ``of_keys`` took."""
        return gradient.unflatten(0, (self.copies, -1)).sum(0) if self.copies > 1 else gradient


@dataclass(frozen=True)
class Parts:
    """A row's segments as the kernels take them."""

    flash: Flash
    lengths: tuple[int, ...]  # tokens of each segment
    prefix: tuple[int, ...]  # the segment that each continues, -1 = none
    own: Layout
    shared: Shared | None  # where a segment continues another

    @classmethod
    def from_segments(
        cls, flash: Flash, lengths: Sequence[int], prefix: Sequence[int], device: torch.device
    ) -> "Parts":
        """Of the S segments in their order in the row: each prompt, then what continues it, with nothing between."""
        families = _families(lengths, prefix)
        shared = [number for number, (_, continued) in enumerate(families) if continued]
        own = _layout(lengths, lengths, device, causal=True)
        if not shared:
            return cls(flash, (*lengths,), (*prefix,), own, None)
        before, between = families[: shared[0]], families[shared[0] : shared[-1] + 1]
        start = sum(map(sum, before))
        return cls(flash, (*lengths,), (*prefix,), own, _shared(between, start, device))

    @property
    def reach(self) -> int:
        """Positions of the longest sequence that has a prefix."""
        continued = zip(self.lengths, self.prefix, strict=True)
        return max((length + self.lengths[before] for length, before in continued if before >= 0), default=0)

    def attend(
        self,
        q: Tensor,  # [T, Hq, D], any strides but the last
        k: Tensor,  # [T, Hkv, D]
        v: Tensor,  # [T, Hkv, D]
        scale: float,
        window: int,
    ) -> Tensor:  # [T, Hq, D]
        """See ``shared_prefix.prefix_attention``; differentiable once."""
        own, shared = self.own, self.shared
        if 0 < window < self.reach:
            keys, own, shared = *self.gathered, None
            k, v = k[keys], v[keys]  # where autograd goes back through the index, the copies' gradients add up
        return cast(Tensor, _Attention.apply(q, k, v, self.flash, own, shared, scale, window))

    @cached_property
    def gathered(self) -> tuple[Tensor, Layout]:
        """Each segment's prefix, then its own keys: tokens of the row, int64 [K'], and the call over them."""
        places = spans(self.lengths)
        seen = [
            [*(range(places[before].start, places[before].stop) if before >= 0 else ()), *range(own.start, own.stop)]
            for own, before in zip(places, self.prefix, strict=True)
        ]
        device = self.own.cu_seqlens_q.device
        (keys,) = upload([torch.tensor([key for keys in seen for key in keys])], device)
        return keys, _layout(self.lengths, [len(keys) for keys in seen], device, causal=True)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        flash: Flash,
        own: Layout,
        shared: Shared | None,
        scale: float,
        window: int,
    ) -> Tensor:
        out, lse = flash.forward(q, k, v, own, scale, window)
        if shared is not None:
            queries = shared.queries
            of_prefix = flash.forward(q[queries], shared.of_keys(k), shared.of_keys(v), shared.layout, scale, 0)
            merge_attention(out[queries], lse[:, queries], *of_prefix)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.call = flash, own, shared, scale, window
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError("attention has no second derivative: drop create_graph=True")
        q, k, v, out, lse = ctx.saved_tensors
        flash, own, shared, scale, window = ctx.call
        gradients = flash.backward(grad, q, k, v, out, lse, own, scale, window)
        if shared is not None:
            queries = shared.queries
            inputs = q[queries], shared.of_keys(k), shared.of_keys(v)
            lse = lse[:, queries].contiguous()
            of_q, *of_keys = flash.backward(grad[queries], *inputs, out[queries], lse, shared.layout, scale, 0)
            gradients[0][queries].add_(of_q)
            for whole, part in zip(gradients[1:], of_keys, strict=True):
                whole[shared.keys].add_(shared.sum_copies(part))
        return *gradients, None, None, None, None, None


def _families(lengths: Sequence[int], prefix: Sequence[int]) -> list[tuple[int, int]]:
    """Tokens of each segment without prefix, and of all that continue it together."""
    found: list[tuple[int, int]] = []
    latest = -1
    for number, (length, before) in enumerate(zip(lengths, prefix, strict=True)):
        if before < 0:
            found.append((length, 0))
            latest = number
        else:
            assert before == latest, "what continues a segment stands behind it"
            prompt, continued = found[-1]
            found[-1] = prompt, continued + length
    return found


def _shared(families: Sequence[tuple[int, int]], start: int, device: torch.device) -> Shared:
    """Of families from the row's token ``start`` on, the first and the last of which share something."""
    tokens, (prompt, continued) = sum(map(sum, families)), families[0]
    queries = slice(start + prompt, start + tokens)
    keys = slice(start, start + tokens - families[-1][1])
    copies = max(1, min(_PROGRAMS // -(-prompt // _KEYS), continued // _QUERIES)) if len(families) == 1 else 1
    if copies > 1:
        ends = [continued * number // copies for number in range(copies + 1)]
        runs = [(after - before, prompt) for before, after in pairwise(ends)]
    else:  # runs lie one after another: in between, prompts see nothing, and nothing sees responses
        all_runs = [run for prompt, own in families for run in ((prompt, 0), (own, prompt), (0, own))]
        runs = all_runs[1:-1]
    counts = [number for number, _ in runs], [number for _, number in runs]
    return Shared(_layout(*counts, device, causal=False), queries, keys, copies)


def _layout(queries: Sequence[int], keys: Sequence[int], device: torch.device, *, causal: bool) -> Layout:
    """Of the runs' lengths."""
    ends = [torch.tensor([*accumulate(counts, initial=0)], dtype=torch.int32) for counts in (queries, keys)]
    cu_seqlens_q, cu_seqlens_k = upload(ends, device)
    # Told that no run has more than one query, the kernels would take each for one that has.
    return Layout(cu_seqlens_q, cu_seqlens_k, max(2, *queries), max(keys), causal)


def _aten_forward(q: Tensor, k: Tensor, v: Tensor, layout: Layout, scale: float, window: int) -> tuple[Tensor, Tensor]:
    out, lse, *_ = torch.ops.aten._flash_attention_forward(
        q, k, v, *layout[:4], 0.0, layout.causal, False, scale=scale, window_size_left=_left(window)
    )
    return out, lse


def _aten_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    layout: Layout,
    scale: float,
    window: int,
) -> tuple[Tensor, Tensor, Tensor]:
    unused = torch.empty(2, dtype=torch.uint64, device=q.device)  # state of the generator, which only dropout needs
    return torch.ops.aten._flash_attention_backward(
        grad, q, k, v, out, lse, *layout[:4], 0.0, layout.causal, unused, unused, scale=scale,
        window_size_left=_left(window),
    )  # fmt: skip


def _left(window: int) -> int | None:
    """Keys before a query that it sees."""
    return window - 1 if window else None


ATEN = Flash(_aten_forward, _aten_backward)
"""Torch's own, since 2.10, for NVIDIA GPUs from compute capability 8.0 on; key-value heads may be fewer."""


def takes(dtype: torch.dtype, size: int) -> bool:
    """Whether the kernels have heads of this size in this type."""
    return dtype in (torch.bfloat16, torch.float16) and size % 8 == 0 and size <= 256


@cache
def flash_for(device: torch.device, dtype: torch.dtype, query_heads: int, kv_heads: int, size: int) -> Flash | None:
    """The kernels for such heads, once they have been held against plain torch on the device itself.

    Returns:
        None where there are none; with a warning, where they do not run there or give something else.
    """
    if device.type != "cuda" or not takes(dtype, size):
        return None
    reason = "it gives something else"
    try:
        if reproduces(ATEN, device, dtype, query_heads, kv_heads, size):
            return ATEN
    except RuntimeError as error:  # built without, or for other GPUs
        reason = str(error).splitlines()[0]
    log.warning("flash attention is not used on %s (%s): updates attend segment by segment", device, reason)
    return None


def copying_layers(
    device: torch.device,
    dtype: torch.dtype,
    heads: tuple[int, int, int],  # query heads, key-value heads, size of each
    windows: Sequence[int],  # of each layer
    options: RolloutOptions,
) -> int:
    """Layers whose attention copies the keys of shared prompts, on ``device``, which may be another machine's.

    Those whose window may cut a prompt; all, where there is no flash attention.
    """
    if device.type != "cuda":
        return 0
    there = torch.cuda.is_available()
    if flash_for(device, dtype, *heads) is None if there else not takes(dtype, heads[2]):
        return len(windows)
    return sum(0 < window < options.max_prompt_tokens + options.max_response_tokens for window in windows)


def reproduces(
    flash: Flash, device: torch.device, dtype: torch.dtype, query_heads: int, kv_heads: int, size: int
) -> bool:
    """Whether a row's attention and its gradients are those of plain torch, with and without a window."""
    random = torch.Generator(device).manual_seed(0)
    heads = query_heads, kv_heads, kv_heads, query_heads

    @torch.enable_grad()
    def results(attend: Callable[..., Tensor], tensors: Sequence[Tensor], *rest: Any) -> list[Tensor]:
        *inputs, grad = (x.detach().requires_grad_() for x in tensors)
        out = attend(*inputs, *rest)
        return [out.detach().float(), *(x.float() for x in torch.autograd.grad(out, inputs, grad))]

    for lengths, prefix in _ROWS:
        shapes = [(sum(lengths), count, size) for count in heads]
        rounded = [torch.randn(shape, generator=random, device=device).to(dtype) for shape in shapes]
        attend = Parts.from_segments(flash, lengths, prefix, device).attend
        for window in _WINDOWS:
            found = results(attend, rounded, size**-0.5, window)
            wanted = results(in_torch, [x.float() for x in rounded], lengths, prefix, size**-0.5, window)
            for got, want in zip(found, wanted, strict=True):
                if not (got - want).norm() <= _TOLERANCE * want.norm():  # NaN is not
                    return False
    return True

"""The CUDA kernels of ``csrc/cuda`` run on the CPU: their sources built with g++ and an emulation of CUDA's threads.

Signatures and results are those of ``csrc.py``; the host's part, which ``csrc/cuda/ops.cpp`` plays on a GPU, is played
here. An emulated thread costs about a microsecond each time it waits, so problems have to be small.
"""

import ctypes
import platform
import subprocess
from ctypes import c_bool, c_float, c_int, c_int64, c_void_p
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.cpp_extension import include_paths

from tests.csrc.stable_abi import INCLUDES
from thinktwice_fast.model.csrc import Sampled

TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
SPLIT = 256  # keys per part of a row's softmax
SLICES = 8  # at most, of a row of logits


def build(folder: Path, compiler: str) -> Path:
    """The library of emulated kernels; with fused multiply-adds only where the sources say so."""
    library = folder / "kernels.so"
    fused = ["-mfma"] if platform.machine() == "x86_64" else []
    flags = [*fused, "-std=c++17", "-O1", "-ffp-contract=off", "-fPIC", "-shared", "-fsanitize=undefined"]
    warnings = ["-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", "-fno-sanitize-recover=all"]
    emulated = Path(__file__).parent / "emulated"
    includes = [f"-I{emulated}", *INCLUDES, *(f"-isystem{path}" for path in include_paths())]
    source = emulated / "kernels.cpp"
    command = [compiler, *flags, *warnings, *includes, str(source), "-o", str(library)]
    built = subprocess.run(command, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    return library


def _structure(name: str, **fields: Any) -> type[ctypes.Structure]:
    """Of kernels.h; a field's name may hold several, separated by two underscores."""
    members = [(part, kind) for names, kind in fields.items() for part in names.split("__")]
    return type(name, (ctypes.Structure,), {"_fields_": members})


CacheWrite = _structure(
    "CacheWrite",
    k__v__k_cache__v_cache__slots=c_void_p,
    tokens__k_token_stride__k_head_stride__v_token_stride__v_head_stride=c_int64,
    blocks__heads__block_size__dim__element_size=c_int64,
)
Rotary = _structure(
    "Rotary",
    q__k__v__q_norm__k_norm__k_cache__v_cache__cos__sin__positions__slots=c_void_p,
    tokens__table_rows__blocks__block_size=c_int64,
    q_token_stride__q_head_stride__k_token_stride__k_head_stride__v_token_stride__v_head_stride=c_int64,
    heads__kv_heads__dim__q_norm_is_whole__k_norm_is_whole=c_int,
    eps=c_float,
)
BlockCopy = _structure("BlockCopy", k_cache__v_cache__pairs=c_void_p, num_pairs__layers__blocks__block_bytes=c_int64)
Attention = _structure(
    "Attention",
    q__k_cache__v_cache__out__block_tables__context_lens__starts__group_offsets__shared_blocks=c_void_p,
    part_sums__part_states=c_void_p,
    q_token_stride__q_head_stride=c_int64,
    tokens__sequences__groups__heads__kv_heads__group__dim=c_int,
    num_blocks__block_size__table_width__splits__window=c_int,
    scale=c_float,
    parts=c_void_p,
    first_item__items=c_int,
)
Sampling = _structure(
    "Sampling",
    logits=c_void_p,
    rows__vocabulary__stride=c_int64,
    temperature__top_p__min_p__top_k__sample_ids__positions__seed=c_void_p,
    tokens__logps__raw_logps__entropies__statuses=c_void_p,
    maxima__totals__lowest=c_void_p,
)
Advance = _structure(
    "Advance",
    drawn__drawn_logps__drawn_entropies__stop_ids__block_tables=c_void_p,
    rows__steps__stop_count__table_width__block_size__spare_slot=c_int64,
    tokens__positions__draws__left__slots__counts__context_lens__new_tokens__new_logps__new_entropies=c_void_p,
)


class EmulatedKernels:
    """The ops over a library made by ``build``; ``backwards``: the last threads and blocks take their turn first."""

    def __init__(self, library: Path, *, backwards: bool):
        self._library = ctypes.CDLL(str(library))
        self._backwards = backwards
        self.launches_left = -1  # calls of CUDA that succeed before one fails; below 0: none fails

    def _call(self, name: str, work: ctypes.Structure, *rest: Any) -> None:
        self._library.prepare(c_bool(self._backwards), c_int(self.launches_left))
        error = getattr(self._library, name)(ctypes.byref(work), *rest)
        if error:
            raise RuntimeError(f"{name}: CUDA error {error}")

    def write_kv(self, k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slots: Tensor) -> None:
        pointers = [x.data_ptr() for x in (k, v, k_cache, v_cache, slots)]
        strides = (*k.stride()[:2], *v.stride()[:2])
        self._call("write_kv", CacheWrite(*pointers, len(slots), *strides, *k_cache.shape, k.itemsize))

    def rotary_write_kv(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        q_norm: Tensor | None,
        k_norm: Tensor | None,
        eps: float,
        cos: Tensor | None,
        sin: Tensor | None,
        positions: Tensor,
        slots: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
    ) -> None:
        given = (q, k, v, q_norm, k_norm, k_cache, v_cache, cos, sin, positions, slots)
        pointers = [None if x is None else x.data_ptr() for x in given]
        blocks, kv_heads, block_size, dim = k_cache.shape
        sizes = (len(slots), 0 if cos is None else len(cos), blocks, block_size)
        strides = (*q.stride()[:2], *k.stride()[:2], *v.stride()[:2])
        whole = [norm is not None and norm.numel() != dim for norm in (q_norm, k_norm)]
        self._call(
            "rotary_write_kv",
            Rotary(*pointers, *sizes, *strides, q.shape[1], kv_heads, dim, *whole, eps),
            TYPES[q.dtype],
        )

    def copy_blocks(self, k_cache: Tensor, v_cache: Tensor, pairs: Tensor) -> None:
        pointers = [x.data_ptr() for x in (k_cache, v_cache, pairs)]
        block_bytes = k_cache[0, 0].nbytes
        self._call("copy_blocks", BlockCopy(*pointers, len(pairs), *k_cache.shape[:2], block_bytes))

    def paged_attention(
        self,
        q: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        block_tables: Tensor,
        context_lens: Tensor,
        cu_seqlens_q: Tensor,
        scale: float,
        window: int = 0,
        *,
        items: int | None = None,  # decoded by one launch
    ) -> Tensor:
        work, out, kept = _describe(q, k_cache, v_cache, block_tables, context_lens, scale, window)
        work.starts = cu_seqlens_q.data_ptr()
        by_token = q.dtype == torch.float32 or len(q) == len(context_lens)
        everything = len(q) if by_token else len(context_lens)
        self._decode(work, kept, everything, items, TYPES[q.dtype], not by_token)
        if not by_token:
            self._call("prefill", work, TYPES[q.dtype])
        return out

    def grouped_decode_attention(
        self,
        q: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        block_tables: Tensor,
        context_lens: Tensor,
        group_offsets: Tensor,
        shared_blocks: Tensor,
        scale: float,
        window: int = 0,
        *,
        items: int | None = None,
    ) -> Tensor:
        work, out, kept = _describe(q, k_cache, v_cache, block_tables, context_lens, scale, window)
        work.group_offsets, work.shared_blocks = group_offsets.data_ptr(), shared_blocks.data_ptr()
        work.groups = len(shared_blocks)
        self._decode(work, kept, len(q), items, TYPES[q.dtype], False)
        return out

    def _decode(
        self, work: Any, kept: tuple[Tensor, Tensor], everything: int, items: int | None, dtype: int, single: bool
    ) -> None:
        """Lists all parts; then a launch for so many of the items at a time, which must not touch those of others."""
        work.items = everything
        self._library.parts.restype = c_int64
        self.parts = torch.full((1 + self._library.parts(ctypes.byref(work), dtype), 4), -1, dtype=torch.int32)
        work.parts = self.parts.data_ptr()
        self._call("list_parts", work, dtype, c_bool(single))
        for first in range(0, everything, items or everything):
            work.first_item, work.items = first, min(items or everything, everything - first)
            for part in kept:
                part.fill_(torch.nan)
            self._call("decode", work, dtype, c_bool(single))
            assert all(part[work.items :].isnan().all() for part in kept)

    def sample(
        self,
        logits: Tensor,
        temperature: Tensor,
        top_k: Tensor,
        top_p: Tensor,
        min_p: Tensor,
        seed: int,
        sample_ids: Tensor,
        positions: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        n, vocabulary = logits.shape
        tokens, numbers = torch.empty(n, dtype=torch.int64), [torch.empty(n) for _ in range(3)]
        statuses = torch.full((n,), -1, dtype=torch.int32)
        columns = [x.data_ptr() for x in (temperature, top_p, min_p, top_k, sample_ids, positions)]
        size = (n, vocabulary, logits.stride(0))
        key = torch.tensor([seed])
        workspace = [torch.full((n * most,), torch.nan) for most in (SLICES, SLICES * 8, 2)]
        pointers = [x.data_ptr() for x in (key, tokens, *numbers, statuses, *workspace)]
        work = Sampling(logits.data_ptr(), *size, *columns, *pointers)
        self._call("sample", work, TYPES[logits.dtype])
        return tokens, numbers[0], numbers[1], numbers[2], statuses

    def advance(
        self,
        drawn: Sampled | None,
        stop_ids: Tensor,
        block_tables: Tensor,
        block_size: int,
        spare_slot: int,
        state: Tensor,
        context_lens: Tensor,
        *new: Tensor,
    ) -> None:
        columns = (None, None, None) if drawn is None else (drawn.tokens, drawn.raw_logps, drawn.entropies)
        given = [None if x is None else x.data_ptr() for x in (*columns, stop_ids, block_tables)]
        sizes = (len(context_lens), len(new[0]), len(stop_ids), block_tables.shape[1], block_size, spare_slot)
        self._call("advance", Advance(*given, *sizes, *(x.data_ptr() for x in (*state, context_lens, *new))))


def _describe(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_tables: Tensor,
    context_lens: Tensor,
    scale: float,
    window: int,
) -> tuple[Any, Tensor, tuple[Tensor, Tensor]]:
    """The arguments, the output, and the workspace, which lives as long as it is held."""
    out = torch.full(q.shape, torch.nan, dtype=q.dtype)
    blocks, kv_heads, block_size, dim = k_cache.shape
    splits = -(-block_tables.shape[1] * block_size // SPLIT)
    sums = torch.full((max(len(q), len(context_lens)), q.shape[1], splits, dim), torch.nan)
    states = torch.full((*sums.shape[:3], 2), torch.nan)
    work: Any = Attention()
    for name, tensor in {
        "q": q, "k_cache": k_cache, "v_cache": v_cache, "out": out, "block_tables": block_tables,
        "context_lens": context_lens, "part_sums": sums, "part_states": states,
    }.items():  # fmt: skip
        setattr(work, name, tensor.data_ptr())
    for name, number in {
        "q_token_stride": q.stride(0), "q_head_stride": q.stride(1), "tokens": len(q),
        "sequences": len(context_lens), "heads": q.shape[1], "kv_heads": kv_heads, "group": q.shape[1] // kv_heads,
        "dim": dim, "num_blocks": blocks, "block_size": block_size, "table_width": block_tables.shape[1],
        "splits": splits, "window": window, "scale": scale,
    }.items():  # fmt: skip
        setattr(work, name, number)
    return work, out, (sums, states)

"""A paged KV cache: blocks of keys and values, shared between sequences that start alike.

Which blocks a sequence holds is kept by the C++ extension (``csrc/block_manager.h``); the data are two tensors.
"""

import math
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from thinktwice_fast.model.csrc import (
    copy_blocks,
    grouped_decode_attention,
    list_parts,
    ops,
    paged_attention,
    rotary_write_kv,
    torch_versions,
    write_kv,
)
from thinktwice_fast.model.lists import int64, upload
from thinktwice_fast.model.rotary import Rotation

# Keys that decoding sequences must share to be read together: whole chunks of the CPU's attention, whole splits of
# the GPU's.
_SHARED_KEYS_CPU, _SHARED_KEYS_GPU = 64, 256

_prefill = ops.cache_prefill.default
_extend = ops.cache_extend.default
_take_ahead = ops.cache_take_ahead.default
_trim = ops.cache_trim.default
_fork = ops.cache_fork.default
_release = ops.cache_release.default
_free_blocks = ops.cache_free_blocks.default


@dataclass(slots=True)
class Plan:
    """Where the tokens just reserved in N sequences go, T tokens in all; on the cache's device."""

    block_tables: Tensor  # int32 [N, blocks of the longest sequence], padded with 0
    context_lens: Tensor  # int32 [N], tokens of each sequence, the new ones included
    cu_seqlens_q: Tensor  # int32 [N + 1], where each sequence's new tokens start among the T
    positions: Tensor  # int64 [T], place in the own sequence, from 0
    slots: Tensor  # int64 [T], block * block_size + place in the block
    # Where each has one new token and some share their first blocks; see ``csrc.grouped_decode_attention``.
    group_offsets: Tensor | None = None  # int32 [groups + 1]
    shared_blocks: Tensor | None = None  # int32 [groups]
    # By window, as the layers ask for them; see ``csrc.list_parts``. The lengths must not change after that.
    parts: dict[int, Tensor] = field(default_factory=dict, kw_only=True)


class LentMemory(Protocol):
    """Memory of a cache that others have while the cache is idle; its addresses stay. See ``arena.Arena``."""

    def map(self) -> None:
        """Take it, of unknown content; nothing where it is there."""

    def unmap(self) -> None:
        """Give it back; nothing where it is not there."""

    def tensor(self) -> Tensor:  # uint8 [size]
        """It, made while it is there."""
        ...

    def close(self) -> None:
        """Give it up for good."""


class Blocks(NamedTuple):
    """Those of N sequences, with some taken ahead; on the CPU. Groups as in ``Plan``."""

    tables: Tensor  # int32 [N, blocks of the longest sequence], padded with 0
    group_offsets: Tensor  # int32 [groups + 1]; of no groups [0]
    shared_blocks: Tensor  # int32 [groups]


class PagedKVCache:
    """Keys and values of all layers in blocks of ``block_size`` tokens, drawn from one pool.

    A sequence is named by a handle. It is created empty (``prefill``), grows (``extend``), is duplicated at the price
    of one block (``fork``), and is given back (``release``). Blocks carry the policy version that wrote them:
    extending a sequence of another version is an error.

    Args:
        num_layers: layers, each with its own part of every block.
        num_blocks: blocks in the pool.
        kv_heads: key-value heads per layer.
        head_dim: elements per head.
        block_size: tokens per block.
        dtype: float32, bfloat16 or float16.
        spare_blocks: blocks beyond the pool, which no sequence gets: somewhere to write what nobody reads.
        group_attention: decoding reads keys that neighbours among the sequences share once for all of them.
        memory: makes memory of so many bytes that can be lent: the cache has none until ``take_memory``. None =
            torch's, which is there throughout.
        device: of the data. Memory: 2 * layers * blocks * kv_heads * block_size * head_dim elements.

    Raises:
        ValueError: from any method for a handle that is unknown, released or named twice in one call.
    """

    def __init__(
        self,
        num_layers: int,
        num_blocks: int,
        kv_heads: int,
        head_dim: int,
        *,
        block_size: int = 16,
        spare_blocks: int = 0,
        group_attention: bool = True,
        memory: Callable[[int], LentMemory] | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ):
        shape = (num_layers, num_blocks + spare_blocks, kv_heads, block_size, head_dim)
        self.id: int = ops.cache_create(num_blocks, block_size)
        self._close = weakref.finalize(self, ops.cache_destroy, self.id)
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.spare_blocks = range(num_blocks, num_blocks + spare_blocks)
        self.policy_version = 0
        self._memory = memory(2 * math.prod(shape) * dtype.itemsize) if memory is not None else None
        self.k_cache, self.v_cache = self._tensors(shape, dtype, device)  # [L, B, Hkv, bs, D] each
        self._layers = list(zip(self.k_cache.unbind(0), self.v_cache.unbind(0), strict=True))
        self._on_cpu = self.k_cache.device.type == "cpu"
        self._lists_parts = not self._on_cpu and "paged_attention" not in torch_versions
        shared_keys = _SHARED_KEYS_CPU if self._on_cpu else _SHARED_KEYS_GPU
        self._shared_keys = shared_keys if group_attention else 0
        self.group_attention = group_attention

    def _tensors(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device | str) -> tuple[Tensor, Tensor]:
        if self._memory is None:
            return torch.empty(shape, dtype=dtype, device=device), torch.empty(shape, dtype=dtype, device=device)
        self._memory.map()
        keys, values = self._memory.tensor().view(dtype).view(2, *shape)
        self._memory.unmap()
        return keys, values

    def take_memory(self) -> None:
        """Have memory, where it was lent.

        Raises:
            UserError: others have too much of it.
        """
        if self._memory is not None:
            self._memory.map()

    def lend_memory(self) -> None:
        """Leave the memory to others until ``take_memory``, where it can be lent. No sequence may be there."""
        if self._memory is not None:
            assert self.free_blocks == self.num_blocks, "what sequences hold would be lost"
            self._memory.unmap()

    @property
    def device(self) -> torch.device:
        """Where keys, values and plans live."""
        return self.k_cache.device

    @property
    def free_blocks(self) -> int:
        """Blocks that no sequence holds."""
        return _free_blocks(self.id)

    def prefill(self) -> int:
        """Handle of a new, empty sequence."""
        return _prefill(self.id)

    def extend(self, handles: Sequence[int], counts: Sequence[int]) -> Plan | None:
        """Reserve ``counts[i]`` more tokens in sequence ``handles[i]``, all or nothing.

        Blocks taken are stamped with ``policy_version``.

        Returns:
            Where the new tokens go, or None when the pool has too few free blocks; nothing changed then.

        Raises:
            RuntimeError: a sequence was written by another policy version.
        """
        missing, *plan = _extend(self.id, int64(handles), int64(counts), self.policy_version, self._shared_keys)
        if missing:
            return None
        if not len(plan[-1]):
            del plan[-2:]
        return Plan(*upload(plan, self.device))

    def take_ahead(self, handles: Sequence[int], counts: Sequence[int]) -> Blocks | None:
        """Take the blocks that ``counts[i]`` more tokens of sequence ``handles[i]`` will need, all or nothing.

        Lengths stay as they are until ``grow`` says how many tokens there were.

        Returns:
            The blocks of the sequences, or None when the pool has too few free ones; nothing changed then.

        Raises:
            RuntimeError: a sequence was written by another policy version.
        """
        missing, *blocks = _take_ahead(self.id, int64(handles), int64(counts), self.policy_version, self._shared_keys)
        return None if missing else Blocks(*blocks)

    def grow(self, handles: Sequence[int], counts: Sequence[int]) -> None:
        """``extend`` into blocks taken ahead, by tokens that are there already."""
        missing, *_ = _extend(self.id, int64(handles), int64(counts), self.policy_version, 0)
        assert not missing, "their blocks were taken ahead"

    def trim(self, handles: Sequence[int]) -> None:
        """Give back the blocks that these sequences took ahead and did not need."""
        _trim(self.id, int64(handles))

    def fork(self, handle: int, n: int) -> list[int]:
        """``n`` new sequences equal to ``handle``, which stays as it is; none has blocks that it took ahead.

        Full blocks are shared; a partly filled last block is copied for each, so this takes n free blocks, or none.

        Raises:
            RuntimeError: fewer blocks than that are free; nothing changed then.
        """
        handles, pairs = _fork(self.id, handle, n)
        if len(pairs):
            copy_blocks(self.k_cache, self.v_cache, *upload([pairs], self.device))
        return handles.tolist()

    def release(self, handles: Sequence[int]) -> None:
        """Give sequences back; blocks that no other sequence holds become free."""
        _release(self.id, int64(handles))

    def length(self, handle: int) -> int:
        """Tokens reserved in a sequence."""
        return ops.cache_sequence(self.id, handle)[0]

    def version(self, handle: int) -> int:
        """The policy version that wrote a sequence; -1 while it is empty."""
        return ops.cache_sequence(self.id, handle)[1]

    def blocks(self, handle: int) -> list[int]:
        """The blocks of a sequence, in order; those taken ahead come last."""
        return ops.cache_sequence(self.id, handle)[2].tolist()

    def ref_counts(self) -> list[int]:
        """How many sequences hold each block."""
        return ops.cache_ref_counts(self.id).tolist()

    def attend(
        self,
        layer: int,
        plan: Plan,
        q: Tensor,  # [T, Hq, D]
        k: Tensor,  # [T, Hkv, D]
        v: Tensor,  # [T, Hkv, D]
        scale: float,
        window: int = 0,
    ) -> Tensor:  # [T, Hq, D]
        """Write the plan's tokens into a layer, then let them attend; see ``csrc.paged_attention``."""
        write_kv(k, v, *self._layers[layer], plan.slots)
        return self._read(layer, plan, q, scale, window)

    def rotate_and_attend(
        self,
        layer: int,
        plan: Plan,
        qkv: Tensor,  # [T, (Hq + 2 * Hkv) * D], overwritten
        rotation: Rotation,
        scale: float,
        window: int = 0,
    ) -> Tensor:  # [T, Hq, D]
        """``attend`` from queries and keys that are not normed and rotated yet; see ``csrc.rotary_write_kv``."""
        r = rotation
        heads = [r.query_heads, r.kv_heads, r.kv_heads]
        q, k, v = qkv.unflatten(1, (sum(heads), -1)).split(heads, 1)
        tables = (r.q_norm, r.k_norm, r.eps, r.angles.cos, r.angles.sin, r.angles.rows, plan.slots)
        rotary_write_kv(q, k, v, *tables, *self._layers[layer])
        return self._read(layer, plan, q, scale, window)

    def _read(self, layer: int, plan: Plan, q: Tensor, scale: float, window: int) -> Tensor:
        caches, tables = self._layers[layer], (plan.block_tables, plan.context_lens)
        # Where a window may hide shared keys, each sequence reads those it sees.
        hides = 0 < window < plan.block_tables.shape[1] * self.block_size
        if plan.group_offsets is None or plan.shared_blocks is None or hides:
            parts = self._parts(plan, q, caches[0], window, plan.cu_seqlens_q)
            return paged_attention(q, *caches, *tables, plan.cu_seqlens_q, scale, window, parts)
        groups = (plan.group_offsets, plan.shared_blocks)
        parts = self._parts(plan, q, caches[0], window, None, groups)
        return grouped_decode_attention(q, *caches, *tables, *groups, scale, window, parts)

    def _parts(
        self,
        plan: Plan,
        q: Tensor,  # [T, Hq, D]
        k_cache: Tensor,  # [B, Hkv, bs, D]
        window: int,
        starts: Tensor | None,  # int32 [N + 1]
        groups: tuple[Tensor | None, Tensor | None] = (None, None),  # int32 [groups + 1] and [groups]
    ) -> Tensor | None:
        if not self._lists_parts:
            return None
        if window not in plan.parts:
            tables = (plan.block_tables, plan.context_lens)
            plan.parts[window] = list_parts(q, k_cache, *tables, starts, *groups, window)
        return plan.parts[window]

    def close(self) -> None:
        """Give up the pool and its memory; any use of the cache after that is an error."""
        self._close()
        self._layers.clear()
        del self.k_cache, self.v_cache
        if self._memory is not None:
            self._memory.close()

"""Memory of a GPU that changes hands: at addresses which stay, it is given back and taken again.

So a KV cache can leave its memory to an update, and the CUDA graphs that know where it stands need not be captured
anew. It is made of CUDA's virtual memory (``csrc/cuda/arena.h``), not of torch's: ``peak_bytes`` counts both.
"""

import weakref
from collections import defaultdict
from contextlib import suppress
from functools import partial

import torch
from torch import Tensor

from thinktwice_fast.errors import Option, UserError
from thinktwice_fast.model.csrc import ops

_GIB = 1 << 30
_PROBE_BYTES = 1 << 20

_mapped: defaultdict[int, int] = defaultdict(int)  # bytes that arenas have now, by GPU
_peaks: defaultdict[int, int] = defaultdict(int)  # the most that each GPU ever had of both, until arenas last changed


class Arena:
    """Addresses for so many bytes of a GPU, without memory behind them at first.

    Args:
        device: the GPU, with its index.
        size: bytes, rounded up to whole pages.

    Raises:
        RuntimeError: the GPU, its driver or this build of the extension has no virtual memory.
    """

    def __init__(self, device: torch.device, size: int):
        assert device.index is not None
        self._device = device
        self._id: int = ops.arena_create(device.index, size)
        self._close = weakref.finalize(self, _destroy, device, self._id)
        self._size = size
        self._is_mapped = False

    def map(self) -> None:
        """Put memory behind the addresses, of unknown content. What torch keeps for tensors to come is given up first.

        Raises:
            UserError: the GPU has not as much.
        """
        if self._is_mapped:
            return
        release_cached(self._device)
        try:
            ops.arena_map(self._id)
        except RuntimeError as error:
            raise UserError(
                f"{self._size / _GIB:.2f} GiB of GPU memory for the KV cache can't be had ({error})",
                "end what else runs on this GPU",
                ("lower ", Option("rollout.cache_tokens"), " or ", Option("rollout.max_sequences")),
            ) from error
        self._is_mapped = True
        _count(self._device, self._size)

    def unmap(self) -> None:
        """Give the memory back, once all that the GPU was asked to do is done."""
        if not self._is_mapped:
            return
        torch.cuda.synchronize(self._device)
        self._is_mapped = False
        _count(self._device, -self._size)
        ops.arena_unmap(self._id)

    def tensor(self) -> Tensor:  # uint8 [size]
        """The memory, while it is mapped. To be used whenever it is again, and not after ``close``."""
        return ops.arena_tensor(self._id)[: self._size]

    def close(self) -> None:
        """Give up memory and addresses."""
        self.unmap()
        self._close()


def _destroy(device: torch.device, number: int) -> None:
    """Steps may be under way still: to take memory away does not wait for them."""
    for task in (partial(torch.cuda.synchronize, device), partial(ops.arena_destroy, number)):
        with suppress(RuntimeError):  # of the steps: whoever asks the GPU for something hears of it
            task()


def why_no_arena(device: torch.device) -> str | None:
    """Why a GPU has no arenas, in one line; None where a small one does all that it has to."""
    if not torch._C._dispatch_has_kernel_for_dispatch_key("thinktwice::arena_create", "CompositeExplicitAutograd"):
        return "the extension is built without CUDA"
    try:
        torch.cuda.init()  # its peak can't be started anew before
        arena = Arena(device, _PROBE_BYTES)
        arena.map()
        memory, sums = arena.tensor(), []
        for _ in range(2):
            sums.append(int(memory.fill_(1).sum()))
            arena.unmap()
            arena.map()
        arena.close()
    except (RuntimeError, UserError) as error:
        return str(error).splitlines()[0]
    return None if sums == [_PROBE_BYTES] * 2 else "its memory does not hold what is written"


def release_cached(device: torch.device) -> None:
    """Give back what torch keeps for tensors to come. Steps of an engine that was let go may be under way in it."""
    torch.cuda.synchronize(device)
    torch.cuda.empty_cache()


def peak_bytes(device: torch.device) -> int:
    """The most that torch's tensors and arenas ever had of a GPU together."""
    return max(_peaks[_index(device)], torch.cuda.max_memory_allocated(device) + _mapped[_index(device)])


def restart_peak(device: torch.device) -> None:
    """``peak_bytes`` from now on."""
    _peaks[_index(device)] = 0
    torch.cuda.reset_peak_memory_stats(device)


def _count(device: torch.device, change: int) -> None:
    """From now on arenas have so many bytes more; torch's peak up to here stood beside what they had before."""
    _peaks[_index(device)] = peak_bytes(device)
    torch.cuda.reset_peak_memory_stats(device)
    _mapped[_index(device)] += change


def _index(device: torch.device) -> int:
    return device.index if device.index is not None else torch.cuda.current_device()

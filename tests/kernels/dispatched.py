"""The torch operations that a piece of code comes down to, for the tests that bound them."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# Views, memory that nobody writes, and moves to where a tensor already is.
_VIEWS = (
    "detach",
    "detach_",
    "lift_fresh",
    "resolve_conj",
    "resolve_neg",
    "select",
    "slice",
    "split_with_sizes",
    "unbind",
    "view",
)
_FREE = (*_VIEWS, "empty", "new_empty", "to")


class Dispatched(TorchDispatchMode):
    """Within it, `calls` gets the name and the result of every torch operation that runs, also in a backward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, Any]] = []

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        self.calls.append((str(func), result))
        return result

    def launches(self) -> list[str]:
        """The calls that are work for a GPU, or that wait for it."""
        return [name for name, _ in self.calls if name.removeprefix("aten.").partition(".")[0] not in _FREE]

    def filled(self, shape: torch.Size) -> list[str]:
        """The operations that wrote one and the same number all over a tensor of that shape."""
        return [
            name
            for name, result in self.calls
            if isinstance(result, Tensor) and result.shape == shape and ("zero" in name or "fill" in name)
        ]


class PeakMemory(TorchDispatchMode):
    """Within it, `peak` is the most bytes that memory which was taken within it has come to."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self._live: dict[int, tuple[StorageWeakRef, int]] = {}  # by address

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        given = set(_memory_of((args, kwargs)))
        result = func(*args, **(kwargs or {}))
        self._live = {place: held for place, held in self._live.items() if not held[0].expired()}
        for place, storage in _memory_of(result).items():
            if place not in given and place not in self._live:
                self._live[place] = StorageWeakRef(storage), storage.nbytes()
        self.peak = max(self.peak, sum(size for _, size in self._live.values()))
        return result


def _memory_of(values: Any) -> dict[int, torch.UntypedStorage]:
    storages = (value.untyped_storage() for value in tree_leaves(values) if isinstance(value, Tensor))
    return {storage.data_ptr(): storage for storage in storages if storage.nbytes()}

"""What an op makes of tensors while it runs."""

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class Watch(TorchDispatchMode):
    """The largest tensor made, in bytes, and the names of the operators called."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = 0
        self.called: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        results = func(*args, **(kwargs or {}))
        self.called.add(func.__name__)
        for result in results if isinstance(results, tuple | list) else (results,):
            # A view makes nothing: what it stands on was counted when it was made.
            if isinstance(result, torch.Tensor) and not result._is_view():
                self.largest = max(self.largest, result.nbytes)
        return results

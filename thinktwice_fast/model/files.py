"""Files of weights."""

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_UMASK = os.umask(0o077)  # asked for once: to ask is to change it, for every thread
os.umask(_UMASK)
# As safetensors calls them.
_TYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip


def readable_by_all(path: Path) -> None:
    """Give a file the permissions that the user's others get: safetensors leaves its own to their owner alone."""
    path.chmod(0o666 & ~_UMASK)


def write_safetensors(
    path: Path, outline: Mapping[str, Tensor], tensors: Iterable[tuple[str, Tensor]], metadata: Mapping[str, str]
) -> None:
    """Write a safetensors file, and see it reach the disk, tensor by tensor: no two have to be there at a time.

    Args:
        outline: names, shapes and types, those of the largest elements first; may be on the meta device.
        tensors: names and values, on the CPU, in the order of ``outline``.
        metadata: texts that go into the file's header.

    Raises:
        OSError: it can't be written.
    """
    header: dict[str, object] = {"__metadata__": dict(metadata)}
    end = 0
    for name, tensor in outline.items():
        assert end % tensor.element_size() == 0, "a reader maps the file, where elements have to be aligned"
        start, end = end, end + tensor.nbytes
        header[name] = {"dtype": _TYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for (expected, of), (name, tensor) in zip(outline.items(), tensors, strict=True):
            assert (name, tensor.shape, tensor.dtype) == (expected, of.shape, of.dtype), "the outline is another"
            values: Any = tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy()
            file.write(values)
        file.flush()
        os.fsync(file.fileno())

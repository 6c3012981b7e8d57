"""Which model is which: names of folders, and what tells weights from others."""

import hashlib
import re
from pathlib import Path

from thinktwice_fast.model.loading import model_folder

_PEEKS, _PEEK_BYTES = 16, 1 << 12  # of a file of weights
_WEIGHTS = ("*.safetensors", "*.bin")


def folder_name(model: str) -> str:
    """A model's name as a folder's."""
    return re.sub(r"[^\w.-]+", "-", model).strip("-.") or "model"


def fingerprint(model: str) -> str | None:
    """What tells a folder of weights from another of the same name; None for a hub name."""
    folder = Path(model_folder(model)).expanduser()
    if not folder.is_dir():
        return None
    digest = hashlib.blake2b(digest_size=8)
    for path in sorted((*folder.glob("*.safetensors"), *folder.glob("*.bin"))):
        size = path.stat().st_size
        digest.update(f"{path.name} {size}".encode())
        with path.open("rb") as file:
            for peek in range(_PEEKS):
                file.seek(size * peek // _PEEKS)
                digest.update(file.read(_PEEK_BYTES))
    return digest.hexdigest()

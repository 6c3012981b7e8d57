"""Files of weights."""

import os
from pathlib import Path


def readable_by_all(path: Path) -> None:
    """Give a file the permissions that the user's others get: safetensors leaves its own to their owner alone."""
    mask = os.umask(0o077)
    os.umask(mask)
    path.chmod(0o666 & ~mask)

"""What a run's figures were made with, for those who read them later: ``versions.json``."""

import json
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from thinktwice_fast import launch

VERSIONS = "versions.json"
_PACKAGES = ("thinktwice-fast", "thinktwice-kernels", "torch", "triton", "transformers", "tokenizers", "numpy")


def write_versions(folder: Path, device: torch.device) -> None:
    """Write the versions of packages, what computes, and how many processes there are."""
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        if (installed := installed_version(name)) is not None:  # triton is not, where there is no GPU
            found[name] = installed
    if device.type == "cuda":
        found["cuda"] = str(torch.version.cuda)
        found["device"] = torch.cuda.get_device_name(device)
    else:
        found["device"] = f"{platform.machine()} CPU, {torch.get_num_threads()} threads a process"
    found["processes"] = str(launch.env_world_size())
    (folder / VERSIONS).write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def installed_version(package: str) -> str | None:
    """The version of an installed distribution; None where it is not."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None

"""Who takes part in a comparison, and why one cannot."""

import importlib
import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

OURS, PLAIN, CEILING = "thinktwice", "torch", "ceiling"
Outputs = Mapping[str, Tensor]
Unable = Callable[[torch.device], str | None]


def always(device: torch.device) -> str | None:
    return None


def only_on(device_type: str) -> Unable:
    """Why a contender that is for one kind of device cannot run on another."""
    return lambda device: None if device.type == device_type else f"runs on {device_type} only"


def needs(module: str, device_type: str | None = None) -> Unable:
    """Why it cannot run, if the module is not installed or the device is another."""
    package = module.partition(".")[0]

    def unable(device: torch.device) -> str | None:
        if importlib.util.find_spec(package) is None:
            return f"{package} is not installed"
        return only_on(device_type)(device) if device_type else None

    return unable


def from_project(module: str, name: str) -> Any:
    """What a project that may not be installed has under that name."""
    return getattr(importlib.import_module(module), name)


@cache
def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(function)


@dataclass(frozen=True)
class Contender:
    """One way to compute an op, forward and backward: `run` gives results and gradients by name."""

    run: Callable[[Any], Any]
    unable: Unable = always  # why it cannot run on that device
    compiled: bool = False  # compiles for a shape when it first meets it
    in_targets: bool = False  # one that a target names

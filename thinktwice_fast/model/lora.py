"""LoRA (Hu et al. 2021, arXiv 2106.09685): peft's low-rank adapters on linear layers that are not trained themselves.

    y = W x + s B A x,   s = lora_alpha / lora_rank

A is drawn from the seed and B starts at 0, so training starts from the model as it was. Rollouts and saved models have
the adapters merged: W + s B A.

Letters: I inputs, O outputs, R rank.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from thinktwice_fast.config import ModelOptions
from thinktwice_fast.errors import UserError
from thinktwice_fast.model.files import readable_by_all

# How peft names parameters in a model, and what it adds to the names in a file.
_BASE, _A, _B, _PREFIX = ".base_layer.", ".lora_A.default.", ".lora_B.default.", "base_model.model."
_WEIGHTS = "adapter_model.safetensors"


@dataclass(frozen=True)
class Adapters:
    """What was put into a model; ``config`` is peft's ``LoraConfig``."""

    config: Any

    @property
    def scale(self) -> float:
        """s, what B A is multiplied by."""
        return self.config.lora_alpha / self.config.r

    def save(self, state: Mapping[str, Tensor], folder: Path) -> None:
        """Write the adapters' weights as a folder that peft's ``PeftModel.from_pretrained`` loads."""
        folder.mkdir(exist_ok=True)
        files = {_PREFIX + name.replace(".default.", "."): value.contiguous() for name, value in state.items()}
        save_file(files, folder / _WEIGHTS, metadata={"format": "pt"})
        readable_by_all(folder / _WEIGHTS)
        self.config.save_pretrained(folder)

    def read(self, folder: Path) -> dict[str, Tensor]:
        """The weights that ``save`` wrote there, under the names that they have in the model."""
        saved = load_file(folder / _WEIGHTS)
        return {name.removeprefix(_PREFIX).replace(".weight", ".default.weight"): saved[name] for name in saved}

    def differences(self, folder: Path) -> list[str]:
        """What the adapters that ``save`` wrote there have otherwise, in words."""
        there = json.loads((folder / "adapter_config.json").read_text())
        pairs = {
            "lora_rank": (there["r"], self.config.r),
            "lora_alpha": (there["lora_alpha"], self.config.lora_alpha),
            "lora_targets": (sorted(there["target_modules"]), sorted(self.config.target_modules)),
        }
        return [f"--model.{name} {saved}, not {asked}" for name, (saved, asked) in pairs.items() if saved != asked]


def check_library(options: ModelOptions) -> None:
    """Raise UserError where adapters are asked for and peft is missing."""
    if options.lora_rank and find_spec("peft") is None:
        raise UserError(
            f"--model.lora_rank {options.lora_rank} needs peft, which is not installed: pip install 'peft>=0.21'"
        )


def add_adapters(model: PreTrainedModel, options: ModelOptions, seed: int) -> Adapters:
    """Put adapters on the linear layers that ``lora_targets`` names; of all parameters they alone are trained now.

    Raises:
        UserError: peft is not installed, or the decoder has no linear layer of such a name.
    """
    check_library(options)
    from peft import LoraConfig, inject_adapter_in_model

    alpha: Any = options.lora_alpha  # peft says int, and takes any number
    config = LoraConfig(
        task_type="CAUSAL_LM",
        base_model_name_or_path=model.name_or_path,
        r=options.lora_rank,
        lora_alpha=alpha,
        target_modules=_targets(model, options.lora_targets),
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        inject_adapter_in_model(config, model)
    return Adapters(config)


def adapter_parameters(model: PreTrainedModel, options: ModelOptions) -> int:
    """How many parameters ``add_adapters`` would put into a model, which may have no memory yet."""
    targets = _targets(model, options.lora_targets)
    base: Any = model.base_model
    adapted = (
        module
        for name, module in base.named_modules()
        if isinstance(module, nn.Linear) and any(f".{name}".endswith(f".{target}") for target in targets)
    )
    return sum(options.lora_rank * (module.in_features + module.out_features) for module in adapted)


def merged_weights(weights: Mapping[str, Tensor], adapters: Adapters | None) -> Iterator[tuple[str, Tensor]]:
    """Name and value of each weight of the model without adapters, in the order of ``weights``. Collective if sharded.

    Where there is an adapter that is W + s B A, whole and in float32; other values are as they stand.
    """
    for name, value in weights.items():
        if adapters is not None and name.endswith(f"{_BASE}weight"):
            stem = name.removesuffix(f"{_BASE}weight")
            a, b = _whole(weights[f"{stem}{_A}weight"]), _whole(weights[f"{stem}{_B}weight"])  # [R, I], [O, R]
            yield f"{stem}.weight", _whole(value).float() + adapters.scale * (b @ a)
        elif not is_adapter(name):
            yield name.replace(_BASE, "."), value


def is_adapter(name: str) -> bool:
    """Whether a parameter of this name is part of an adapter."""
    return _A in name or _B in name


def _whole(value: Tensor) -> Tensor:
    value = value.detach()
    return value.full_tensor() if isinstance(value, DTensor) else value


def _targets(model: PreTrainedModel, asked: tuple[str, ...]) -> list[str]:
    """What to give peft, which matches the ends of full names."""
    base: Any = model.base_model
    names = [name for name, module in base.named_modules() if isinstance(module, nn.Linear)]
    short = sorted({name.rpartition(".")[2] for name in names})
    for target in asked:
        if not any(f".{name}".endswith(f".{target}") for name in names):
            raise UserError(
                f"--model.lora_targets {list(asked)}: {type(model).__name__} has no linear layer {target!r} below its "
                f"head: take some of {', '.join(short)}, or leave the option out for all of them"
            )
    return list(asked) or short

"""LoRA (Hu et al. 2021, arXiv 2106.09685): low-rank adapters on linear layers that are not trained themselves.

    y = W x + s B A x,   s = lora_alpha / lora_rank

A is drawn from the seed and B starts at 0, so training starts from the model as it was. Rollouts and saved models have
the adapters merged: W + s B A. A ``Transformer`` computes them itself, on their rows of a joint product; transformers'
modules get peft's. Saved they are peft's either way.

Letters: I inputs, O outputs, R rank.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from thinktwice_fast.config import ModelOptions
from thinktwice_fast.errors import Option, UserError
from thinktwice_fast.model.files import write_safetensors
from thinktwice_fast.model.transformer import Projection, Transformer

# How peft names parameters in a model, and what it adds to the names in a file.
_BASE, _NAME, _PREFIX = ".base_layer.", ".default.", "base_model.model."
_A, _B = ".lora_A.", ".lora_B."
WEIGHTS = "adapter_model.safetensors"


class Adapter(NamedTuple):
    """The parameters of one, by their names in the model."""

    weight: str  # that it changes
    first: int  # of the weight's rows, as many as `b` has
    a: str  # [R, I]
    b: str  # [O, R]
    saved: str  # as transformers calls the layer


@dataclass(frozen=True)
class Adapters:
    """What was put into a model; ``config`` is peft's ``LoraConfig``."""

    config: Any
    all: tuple[Adapter, ...]

    @property
    def scale(self) -> float:
        """s, what B A is multiplied by."""
        return self.config.lora_alpha / self.config.r

    def save(self, weights: Mapping[str, Tensor], folder: Path) -> None:
        """Write the adapters' weights, whole, as a folder that peft's ``PeftModel.from_pretrained`` loads.

        Args:
            weights: under the names that they have in the model, on the CPU.
        """
        folder.mkdir(exist_ok=True)
        files = {file: weights[name] for name, file in self.files().items()}
        write_safetensors(folder / WEIGHTS, files, files.items(), {"format": "pt"})
        self.config.save_pretrained(folder)

    def files(self) -> dict[str, str]:
        """What each parameter is called in the file."""
        names = (
            (adapter, getattr(adapter, part), kind) for adapter in self.all for part, kind in (("a", _A), ("b", _B))
        )
        return {name: f"{_PREFIX}{adapter.saved}{kind}weight" for adapter, name, kind in names}

    def differences(self, folder: Path) -> list[str]:
        """What the adapters that ``save`` wrote there have otherwise, in words."""
        there = json.loads((folder / "adapter_config.json").read_text())
        pairs = {
            "lora_rank": (there["r"], self.config.r),
            "lora_alpha": (there["lora_alpha"], self.config.lora_alpha),
            "lora_targets": (sorted(there["target_modules"]), sorted(self.config.target_modules)),
        }
        return [
            f"{Option(f'model.{name}', saved).shown(None)}, not {asked}"
            for name, (saved, asked) in pairs.items()
            if saved != asked
        ]


def check_library(options: ModelOptions) -> None:
    """Raise UserError where adapters are asked for and peft is missing."""
    if options.lora_rank and find_spec("peft") is None:
        raise UserError(
            (Option("model.lora_rank", options.lora_rank), " needs peft, which is not installed"),
            "pip install 'peft>=0.21'",
        )


def add_adapters(model: Transformer | PreTrainedModel, options: ModelOptions, seed: int) -> Adapters:
    """Put adapters on the linear layers that ``lora_targets`` names; of all parameters they alone are trained now.

    Raises:
        UserError: peft is not installed, or the decoder has no linear layer of such a name.
    """
    check_library(options)
    from peft import LoraConfig, inject_adapter_in_model

    alpha: Any = options.lora_alpha  # peft says int, and takes any number
    config = LoraConfig(
        task_type="CAUSAL_LM",
        base_model_name_or_path=model.config.name_or_path,
        r=options.lora_rank,
        lora_alpha=alpha,
        target_modules=_targets(model, options.lora_targets),
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if isinstance(model, Transformer):
            model.requires_grad_(False)
            return Adapters(config, tuple(_adapted(model, options, _targets(model, options.lora_targets))))
        inject_adapter_in_model(config, model)
    stems = [
        name.removesuffix(f"{_BASE}weight") for name, _ in model.named_parameters() if name.endswith(f"{_BASE}weight")
    ]
    return Adapters(config, tuple(
        Adapter(f"{stem}{_BASE}weight", 0, f"{stem}.lora_A{_NAME}weight", f"{stem}.lora_B{_NAME}weight", stem)
        for stem in stems
    ))  # fmt: skip


def _adapted(model: Transformer, options: ModelOptions, targets: list[str]) -> Iterator[Adapter]:
    """Put adapters on the parts of the model's products that the targets name."""
    parts = model.parts()
    for path, module in model.named_modules():
        if not isinstance(module, Projection):
            continue
        module.lora_scale = options.lora_alpha / options.lora_rank
        for name, part in zip(module.sizes, parts[f"{path}.weight"], strict=True):
            saved = part.name.removesuffix(".weight")
            if _is_target(saved, targets):
                module.add_adapter(name, options.lora_rank)
                yield Adapter(f"{path}.weight", part.first, f"{path}{_A}{name}", f"{path}{_B}{name}", saved)


def adapter_parameters(model: Transformer | PreTrainedModel, options: ModelOptions) -> int:
    """How many parameters ``add_adapters`` would put into a model, which may have no memory yet."""
    targets = _targets(model, options.lora_targets)
    shapes = (shape for name, shape in _linears(model).items() if _is_target(name, targets))
    return sum(options.lora_rank * sum(shape) for shape in shapes)


def merged_weights(weights: Mapping[str, Tensor], adapters: Adapters | None) -> Iterator[tuple[str, Tensor]]:
    """Name and value of each weight of the model without adapters, in the order of ``weights``. Collective if sharded.

    Where there is an adapter that is W + s B A, whole and in float32; other values are as they stand.
    """
    by_weight: dict[str, list[Adapter]] = {}
    for adapter in adapters.all if adapters is not None else ():
        by_weight.setdefault(adapter.weight, []).append(adapter)
    for name, value in weights.items():
        if adapters is not None and name in by_weight:
            merged = whole(value).to(torch.float32, copy=True)
            for adapter in by_weight[name]:
                a, b = whole(weights[adapter.a]), whole(weights[adapter.b])  # [R, I], [O, R]
                merged[adapter.first : adapter.first + len(b)] += adapters.scale * (b @ a)
            yield name.replace(_BASE, "."), merged
        elif not is_adapter(name):
            yield name.replace(_BASE, "."), value


def is_adapter(name: str) -> bool:
    """Whether a parameter of this name is part of an adapter."""
    return _A in name or _B in name


def whole(value: Tensor) -> Tensor:
    """All of a tensor, without its history. Collective if it is sharded."""
    value = value.detach()
    return value.full_tensor() if isinstance(value, DTensor) else value


def _targets(model: Transformer | PreTrainedModel, asked: tuple[str, ...]) -> list[str]:
    """What to give peft, which matches the ends of full names."""
    names = list(_linears(model))
    short = sorted({name.rpartition(".")[2] for name in names})
    for target in asked:
        if not any(_is_target(name, [target]) for name in names):
            raise UserError(
                (
                    Option("model.lora_targets", list(asked)),
                    f": {model.config.model_type} has no linear layer {target!r} below its head",
                ),
                f"take some of {', '.join(short)}",
                "leave the option out for all of them",
            )
    return list(asked) or short


def _linears(model: Transformer | PreTrainedModel) -> dict[str, tuple[int, int]]:
    """Inputs and outputs of each linear layer below the head, by its name in transformers."""
    if isinstance(model, Transformer):
        parts, projections = model.parts(), {n: m for n, m in model.named_modules() if isinstance(m, Projection)}
        return {
            part.name.removesuffix(".weight"): (module.weight.shape[1], part.rows)
            for path, module in projections.items()
            for part in parts[f"{path}.weight"]
        }
    base: Any = model.base_model
    return {
        name: (module.in_features, module.out_features)
        for name, module in base.named_modules()
        if isinstance(module, nn.Linear)
    }


def _is_target(name: str, targets: list[str]) -> bool:
    return any(f".{name}".endswith(f".{target}") for target in targets)

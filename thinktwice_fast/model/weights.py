"""A ``Transformer``'s folder, in transformers' format, read and written straight through safetensors."""

import copy
import json
import shutil
from collections.abc import Iterable, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download, split_torch_state_dict_into_shards
from safetensors import safe_open
from torch import Tensor
from transformers import GenerationConfig, PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from thinktwice_fast.model.files import write_safetensors
from thinktwice_fast.model.transformer import Transformer

_INDEX = "model.safetensors.index.json"
SHARD = "5GB"  # a file's largest size


def weight_files(name: str) -> list[Path]:
    """The safetensors files of a folder, or of a model of the hub, which are then fetched; none if it has none."""
    folder = Path(name)
    if not folder.is_dir():
        folder = Path(snapshot_download(name, allow_patterns=["model*.safetensors", _INDEX]))
    if (folder / _INDEX).is_file():
        places = json.loads((folder / _INDEX).read_text()).get("weight_map")
        if not places:
            raise ValueError(f"{_INDEX} has no weight_map")
        return [folder / file for file in sorted({*places.values()})]
    # Some hold the same weights once more, in a format of their maker's.
    return (
        [folder / "model.safetensors"]
        if (folder / "model.safetensors").is_file()
        else sorted(folder.glob("*.safetensors"))
    )


def read_transformer(files: list[Path], config: PreTrainedConfig, device: torch.device) -> Transformer:
    """The model on ``device``, in its config's type or else the files': tensor by tensor, with no second copy.

    Raises:
        ValueError: tensors are missing, or have other shapes than the config says.
        OSError, SafetensorError: a file can't be read.
    """
    with safe_open(files[0], "pt") as file:
        saved_type = next(iter(file.get_slice(name).get_dtype() for name in file.keys()), "F32")  # noqa: SIM118
    with device:
        model = Transformer(config, _dtype(config, saved_type))
    places = {
        part.name: part.of(model.get_parameter(name).detach())
        for name, parts in model.parts().items()
        for part in parts
    }
    missing = set(places)
    for path in files:
        with safe_open(path, "pt", device=str(device)) as file:
            for name in file.keys():  # noqa: SIM118
                known = name if name in places else f"model.{name}"  # of a decoder that was saved without its head
                if known in places:
                    _fill(places[known], file.get_tensor(name), known)
                    missing.discard(known)
    if missing:
        raise ValueError(f"{len(missing)} tensors are missing, among them {min(missing)}")
    return model


def write_weights(
    folder: Path, outline: Mapping[str, Tensor], weights: Iterable[tuple[str, Tensor]], dtype: torch.dtype
) -> None:
    """Write a model's weights as ``dtype``, under transformers' names, one after another.

    Args:
        outline: names and shapes; may be on the meta device.
        weights: names and values, on the CPU, in the order of ``outline``.
    """
    remove_weights(folder)
    saved = {name: torch.empty(weight.shape, dtype=dtype, device="meta") for name, weight in outline.items()}
    split = split_torch_state_dict_into_shards(
        saved, filename_pattern="model{suffix}.safetensors", max_shard_size=SHARD
    )
    cast = ((name, weight.to(dtype)) for name, weight in weights)
    for file, names in split.filename_to_tensors.items():
        part = {name: saved[name] for name in names}
        write_safetensors(folder / file, part, islice(cast, len(part)), {"format": "pt"})
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (folder / _INDEX).write_text(json.dumps(index, indent=2, sort_keys=True))


def remove_weights(folder: Path) -> None:
    """Clear away what an earlier model of another number of files would leave beside a new one's."""
    for old in (*folder.glob("model*.safetensors"), *folder.glob(_INDEX)):
        old.unlink()


def save_config(model: Transformer, folder: Path, dtype: torch.dtype) -> None:
    """Write what ``AutoModelForCausalLM`` has to know beside weights of ``dtype``."""
    config: Any = copy.deepcopy(model.config)
    config.dtype, config.architectures = dtype, [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[config.model_type]]
    config.save_pretrained(folder)
    model.generation_config.save_pretrained(folder)


def convert_model(source: Path, target: Path, dtype: torch.dtype) -> None:
    """Write the model of a folder into another one with weights of ``dtype``, tensor by tensor."""
    target.mkdir(parents=True, exist_ok=True)
    remove_weights(target)
    sizes = 0
    for path in sorted(source.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
        outline = {name: torch.empty(part.get_shape(), dtype=dtype, device="meta") for name, part in slices.items()}
        values = ((name, read_tensor(path, name).to(dtype)) for name in outline)
        write_safetensors(target / path.name, outline, values, {"format": "pt"})
        sizes += sum(tensor.nbytes for tensor in outline.values())
    for path in source.iterdir():
        if path.suffix != ".safetensors":
            shutil.copyfile(path, target / path.name)
    _change(target / "config.json", ("dtype",), str(dtype).removeprefix("torch."))
    if (target / _INDEX).is_file():
        _change(target / _INDEX, ("metadata", "total_size"), sizes)


def read_tensor(path: Path, name: str) -> Tensor:
    """One tensor of a safetensors file; nothing else of the file stays mapped into memory with it."""
    with safe_open(path, "pt") as file:
        return file.get_tensor(name)


def _change(path: Path, place: tuple[str, ...], value: object) -> None:
    content = json.loads(path.read_text())
    *outer, last = place
    inner = content
    for name in outer:
        inner = inner[name]
    inner[last] = value
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")


def generation_config(folder: str, config: PreTrainedConfig) -> GenerationConfig:
    """The folder's, or what the model's config says of it."""
    try:
        return GenerationConfig.from_pretrained(folder)
    except OSError:  # has none
        return GenerationConfig.from_model_config(config)


def _dtype(config: PreTrainedConfig, saved: str) -> torch.dtype:
    """bfloat16, float16, or float32 for any other; ``saved``: what safetensors calls the type of a tensor."""
    named: Any = config.dtype
    name = {"BF16": "bfloat16", "F16": "float16"}.get(saved, saved) if named is None else str(named)
    return {"bfloat16": torch.bfloat16, "float16": torch.float16}.get(name.removeprefix("torch."), torch.float32)


@torch.no_grad()
def _fill(place: Tensor, tensor: Tensor, name: str) -> None:
    if place.shape != tensor.shape:
        raise ValueError(f"{name} is {list(tensor.shape)} there, and {list(place.shape)} by config.json")
    place.copy_(tensor)

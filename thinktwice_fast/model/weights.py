"""A ``Transformer``'s folder, in transformers' format, read and written straight through safetensors."""

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download, split_torch_state_dict_into_shards
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import GenerationConfig, PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from thinktwice_fast.model.files import readable_by_all
from thinktwice_fast.model.transformer import Transformer

_INDEX = "model.safetensors.index.json"
_SHARD = "5GB"


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


def write_transformer(model: Transformer, weights: Mapping[str, Tensor], folder: Path, dtype: torch.dtype) -> None:
    """Write ``weights``, of transformers' names, with the model's config; ``AutoModelForCausalLM`` loads the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for old in (*folder.glob("model*.safetensors"), *folder.glob(_INDEX)):
        old.unlink()
    saved = {name: weight.to(dtype) for name, weight in weights.items()}
    split = split_torch_state_dict_into_shards(
        saved, filename_pattern="model{suffix}.safetensors", max_shard_size=_SHARD
    )
    for file, names in split.filename_to_tensors.items():
        save_file({name: saved[name] for name in names}, folder / file, metadata={"format": "pt"})
        readable_by_all(folder / file)
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (folder / _INDEX).write_text(json.dumps(index, indent=2, sort_keys=True))
    config: Any = copy.deepcopy(model.config)
    config.dtype, config.architectures = dtype, [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[config.model_type]]
    config.save_pretrained(folder)
    model.generation_config.save_pretrained(folder)


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

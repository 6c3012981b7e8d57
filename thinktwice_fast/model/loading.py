"""Loading a model and its tokenizer from a folder or the hub, and saving them back."""

import contextlib
import copy
import logging
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from importlib import resources
from pathlib import Path
from typing import Any, TypeVar

import torch
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from safetensors import SafetensorError, safe_open
from torch.utils.checkpoint import checkpoint
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedModel
from transformers.utils import logging as transformers_logging

from thinktwice_fast.config import ModelOptions
from thinktwice_fast.errors import Option, UserError
from thinktwice_fast.model.agreement import agrees, packed_logits
from thinktwice_fast.model.attention import NAME as ATTENTION_NAME
from thinktwice_fast.model.files import readable_by_all, write_safetensors
from thinktwice_fast.model.policy import Model, check_head_is_linear, decoder_layers
from thinktwice_fast.model.transformer import Layer, Transformer
from thinktwice_fast.model.weights import (
    SHARD,
    generation_config,
    read_transformer,
    remove_weights,
    save_config,
    weight_files,
    write_weights,
)

_T = TypeVar("_T")
SHIPPED = "tiny"
_WEIGHT_FILES = ("*.safetensors", "pytorch_model*.bin")
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class LoadedModel:
    """A model, its tokenizer, and the token ids that end a response."""

    model: Model
    tokenizer: Any
    stop_ids: frozenset[int]


def model_folder(path: str) -> str:
    """``path`` with the name of the shipped model replaced by its folder."""
    return str(resources.files("thinktwice_fast") / "assets" / "tiny") if path == SHIPPED else path


def pick_device(options: ModelOptions, local_rank: int) -> torch.device:
    """The device of this process; UserError where a GPU is asked for and there is none for it."""
    gpus = torch.cuda.device_count()
    if options.device == "cpu" or (options.device == "auto" and gpus == 0):
        return torch.device("cpu")
    use_cpu = ("use ", Option("model.device", "cpu"))
    if gpus == 0:
        raise UserError((Option("model.device", "cuda"), ": there is no GPU here"), use_cpu)
    if local_rank >= gpus:
        raise UserError(
            f"process {local_rank} has no GPU of its own (this machine has {gpus})",
            ("start fewer processes with ", Option("nproc-per-node")),
            use_cpu,
        )
    return torch.device("cuda", local_rank)


def pick_dtype(options: ModelOptions, device: torch.device) -> torch.dtype:
    """The compute type of weights and activations."""
    if options.compute_dtype == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return getattr(torch, options.compute_dtype)


def load_model(options: ModelOptions, seed: int, device: torch.device) -> LoadedModel:
    """Model (on ``device``, in the type it was saved in), tokenizer and stop ids.

    Raises:
        UserError: no such folder or hub name; a folder without tokenizer or chat template, or whose weights are
            missing, broken or not all there; an architecture this trainer can't run; a model too large for the GPU.
    """
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    folder = model_folder(options.path)
    config = _config(folder, options.path)
    tokenizer = load_tokenizer(options)
    try:
        if options.random_init:
            model = _random_model(config, options, seed, device)
        else:
            model = _saved_model(folder, config, options, device)
    except torch.OutOfMemoryError as error:
        raise UserError(
            (Option("model.path", options.path), f": the model does not fit {device} ({_first_line(error)})"),
            "take a smaller model or a larger GPU",
            ("see what a run takes with ", Option("dry-run")),
        ) from error
    model.eval()
    _check_vocabulary(config, tokenizer, options)
    if not isinstance(model, Transformer):
        check_head_is_linear(model)
    if options.activation_checkpointing:
        checkpoint_layers(model)
    return LoadedModel(model, tokenizer, _stop_ids(model, tokenizer, options.path))


def outline_model(options: ModelOptions) -> LoadedModel:
    """As ``load_model`` gives it, but on the meta device: shapes without memory, from the config alone.

    Raises:
        UserError: as ``load_model``, but for what only the weights can tell.
    """
    transformers_logging.set_verbosity_error()
    folder = model_folder(options.path)
    config = _config(folder, options.path)
    tokenizer = load_tokenizer(options)
    model = _random_model(config, options, 0, torch.device("meta")).eval()
    if not options.random_init:
        _require_weights(folder, options.path)
        with contextlib.suppress(OSError):  # has none: the model's own config says what ends a response
            model.generation_config = GenerationConfig.from_pretrained(folder)
    _check_vocabulary(model.config, tokenizer, options)
    return LoadedModel(model, tokenizer, _stop_ids(model, tokenizer, options.path))


def load_tokenizer(options: ModelOptions) -> Any:
    """The model's own tokenizer, with a chat template (its own or ``chat_template``'s)."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(model_folder(options.path))
    except (OSError, HfHubHTTPError, ValueError, KeyError, TypeError) as error:
        raise _no_tokenizer(options.path, _first_line(error)) from error
    # For some architectures transformers makes a tokenizer out of nothing where there are no files.
    if len(tokenizer) <= len(tokenizer.all_special_ids):
        raise _no_tokenizer(options.path, "no vocabulary")
    if options.chat_template is not None:
        try:
            tokenizer.chat_template = Path(options.chat_template).read_text()
        except (OSError, UnicodeDecodeError) as error:
            given = Option("model.chat_template", options.chat_template)
            raise UserError((given, f": can't read it ({_first_line(error)})"), "check the path") from error
    if tokenizer.chat_template is None:
        raise UserError(
            (Option("model.path", options.path), ": its tokenizer has no chat template"),
            ("give a Jinja file with ", Option("model.chat_template")),
        )
    return tokenizer


def checkpoint_layers(model: Model) -> None:
    """Recompute each layer in the backward pass instead of keeping its activations."""
    for layer in decoder_layers(model):
        if isinstance(layer, Layer):
            layer.recomputed = True
        else:  # not by transformers' own switch, which counts in training mode alone, where dropout wakes up as well
            layer.forward = partial(checkpoint, layer.forward, use_reentrant=False, preserve_rng_state=False)


def save_model(model: Model, state: dict[str, torch.Tensor], tokenizer: Any, folder: Path, dtype: torch.dtype) -> None:
    """Write ``state``, under transformers' names, as a folder that ``AutoModelForCausalLM.from_pretrained`` loads."""
    write_model(model, state, state.items(), model_files(model, tokenizer, dtype), folder, dtype)


def model_files(model: Model, tokenizer: Any, dtype: torch.dtype) -> dict[str, bytes]:
    """Name and content of what stands beside the weights in a model's folder: tokenizer and configs."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tokenizer.save_pretrained(folder)
        if isinstance(model, Transformer):
            save_config(model, folder, dtype)
        else:
            config = copy.deepcopy(model.config)
            config.dtype = dtype  # save_pretrained writes the model's own
            config.save_pretrained(folder)
        return {path.name: path.read_bytes() for path in folder.iterdir()}


def write_model(
    model: Model,
    outline: Mapping[str, torch.Tensor],
    weights: Iterable[tuple[str, torch.Tensor]],
    files: Mapping[str, bytes],
    folder: Path,
    dtype: torch.dtype,
) -> None:
    """Write weights, one after another, and the ``files`` beside them, as ``save_model`` does.

    Args:
        outline: transformers' names and shapes; may be on the meta device.
        weights: names and values, on the CPU, in the order of ``outline``.
        files: as ``model_files`` gives them.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if isinstance(model, Transformer):
        write_weights(folder, outline, weights, dtype)
    else:
        _write_module(model, outline, weights, folder, dtype)
    for name, content in files.items():
        (folder / name).write_bytes(content)


def under_every_name(saved: dict[str, _T], model: torch.nn.Module) -> dict[str, _T]:
    """Of tied parameters (embedding and head) transformers saves one; here it stands under all their names."""
    names: dict[torch.nn.Parameter, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(parameter, []).append(name)
    complete = dict(saved)
    for tied in names.values():
        known = [saved[name] for name in tied if name in saved]
        complete |= dict.fromkeys(tied, known[0]) if known else {}
    return complete


def _write_module(
    model: PreTrainedModel,
    outline: Mapping[str, torch.Tensor],
    weights: Iterable[tuple[str, torch.Tensor]],
    folder: Path,
    dtype: torch.dtype,
) -> None:
    """It is for transformers to say what its modules' weights are called in a file, and it wants them all at once.

    They are mapped from a file for it, so that they take no memory of their own.
    """
    remove_weights(folder)
    mapped = folder / "weights.tmp"
    saved = {name: torch.empty(weight.shape, dtype=dtype, device="meta") for name, weight in outline.items()}
    write_safetensors(mapped, saved, ((name, weight.to(dtype)) for name, weight in weights), {})
    with safe_open(mapped, "pt") as file:
        state = under_every_name({name: file.get_tensor(name) for name in saved}, model)
        model.save_pretrained(folder, state_dict=state, max_shard_size=SHARD)
    mapped.unlink()
    for path in folder.glob("*.safetensors"):
        readable_by_all(path)


def _config(folder: str, name: str) -> Any:
    if Path(folder).is_dir() and not (Path(folder) / "config.json").is_file():
        raise UserError(
            (Option("model.path", name), ": no config.json in it"), "give a model folder in transformers format"
        )
    if folder.startswith((".", "/", "~")) and not Path(folder).is_dir():
        raise UserError(
            (Option("model.path", name), ": no such folder"),
            "check the path",
            "give a hub name such as Qwen/Qwen3-4B",
        )
    try:
        return AutoConfig.from_pretrained(folder)
    except (OSError, HfHubHTTPError, HFValidationError, ValueError) as error:
        raise UserError(
            (
                Option("model.path", name),
                f": neither a model folder here nor a model the hub gives ({_first_line(error)})",
            ),
            "check the name",
        ) from error


def _random_model(config: Any, options: ModelOptions, seed: int, device: torch.device) -> Any:
    """Drawn on the device itself: a CPU takes a minute for what a GPU does in a second."""
    if Transformer.knows(config):
        with device:
            model = Transformer(config)
        model.init_weights(seed)
        return model
    torch.manual_seed(seed)
    try:
        with device:
            return AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation=ATTENTION_NAME)
    except ValueError as error:
        raise _unloadable(options.path, _first_line(error)) from error


def _saved_model(folder: str, config: Any, options: ModelOptions, device: torch.device) -> Any:
    _require_weights(folder, options.path)
    if Transformer.knows(config) and (own := _own_model(folder, config, options, device)) is not None:
        return own
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder, config=config, dtype="auto", attn_implementation=ATTENTION_NAME, output_loading_info=True
        )
    except (OSError, HfHubHTTPError, RuntimeError, ValueError, SafetensorError) as error:
        raise _unloadable(options.path, _first_line(error)) from error
    model, report = loaded
    # transformers fills these with random numbers.
    if missing := sorted(report["missing_keys"]):
        raise _unloadable(options.path, f"{len(missing)} tensors are missing, among them {missing[0]}")
    return model.to(device)


def _own_model(folder: str, config: Any, options: ModelOptions, device: torch.device) -> Transformer | None:
    """None where transformers has to load it: it is in another format, or not what its module would compute."""
    try:
        files = weight_files(folder)
        if not files:
            return None
        model = read_transformer(files, config, device)
    except (OSError, HfHubHTTPError, ValueError, SafetensorError) as error:
        raise _unloadable(options.path, _first_line(error)) from error
    model.generation_config = generation_config(folder, config)
    if agrees(lambda ids: packed_logits(model, ids), model):
        return model
    log.warning("the trainer's own decoder does not reproduce %s: transformers' modules run instead", config.model_type)
    return None


def _unloadable(name: str, reason: str) -> UserError:
    return UserError(
        (Option("model.path", name), f": can't load it as a causal language model ({reason})"),
        "check its config.json and weights",
    )


def _no_tokenizer(name: str, reason: str) -> UserError:
    return UserError(
        (Option("model.path", name), f": no tokenizer that loads is in it ({reason})"),
        "put tokenizer.json and tokenizer_config.json beside the weights",
    )


def _check_vocabulary(config: Any, tokenizer: Any, options: ModelOptions) -> None:
    if len(tokenizer) > config.get_text_config().vocab_size:
        raise UserError(
            (
                Option("model.path", options.path),
                f": its tokenizer has {len(tokenizer)} tokens but the model only {config.get_text_config().vocab_size}",
            ),
            "take both from the same place",
        )


def _require_weights(folder: str, name: str) -> None:
    path = Path(folder)
    if path.is_dir() and not any(any(path.glob(pattern)) for pattern in _WEIGHT_FILES):
        raise UserError(
            (Option("model.path", name), ": no weights (*.safetensors) in it"),
            "add them",
            ("start from random ones with ", Option("model.random_init", "true")),
        )


def _stop_ids(model: Model, tokenizer: Any, name: str) -> frozenset[int]:
    configured = model.generation_config.eos_token_id if model.generation_config is not None else None
    ids = set(configured if isinstance(configured, list) else [configured]) | {tokenizer.eos_token_id}
    ids.discard(None)
    if not ids:
        raise UserError(
            (Option("model.path", name), ": neither generation_config.json nor the tokenizer names an end token"),
            "set eos_token_id in generation_config.json",
        )
    return frozenset(ids)


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]

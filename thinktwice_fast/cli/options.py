"""Options that several commands share."""

from dataclasses import dataclass, field
from typing import Any, Literal

MODEL_NAMES = {
    "model.path": "model",
    "model.chat_template": "chat_template",
    "model.chat_template_args": "chat_template_args",
    "model.strip_default_system": "strip_default_system",
    "model.device": "device",
    "model.compute_dtype": "dtype",
}
"""What training calls the options of `ModelChoice`, and what they are called here."""


@dataclass
class OneModel:
    """Which model samples."""

    model: str = "tiny"
    """Model folder in transformers format, a hub name, or "tiny" for the small model shipped here, which knows nothing
    but sums such as 8-8+5+6-9."""


@dataclass
class ModelUse:
    """How models are computed, and their chats written."""

    chat_template: str | None = None
    """File with a Jinja chat template, for a tokenizer that has none (or to replace its own)."""
    chat_template_args: dict[str, Any] = field(default_factory=dict)
    """Variables for the chat template, as in training."""
    strip_default_system: bool = False
    """Leave out the system block that the chat template writes by itself, as in training."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to compute; "auto" takes a GPU when there is one."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Type of weights and activations; "auto": bfloat16 on CUDA, float32 on the CPU."""


@dataclass
class ModelChoice(ModelUse, OneModel):
    """Which model samples, and how it is computed."""

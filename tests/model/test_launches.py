"""Kernels that a GPU runs for one layer in an update, counted on the CPU; docs/step.md has the table."""

import importlib
import re
from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tests.command import ROOT
from tests.model.test_flash import AsOnAGPU
from tests.small_models import family_config
from thinktwice_fast.model.flash import Flash
from thinktwice_fast.model.transformer import Transformer
from thinktwice_kernels.launch import recording

CPU = torch.device("cpu")
LENGTHS, PREFIX = [512, *[1024] * 8], [-1, *[0] * 8]  # a group of eight
NO_KERNEL = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "detach", "_unsafe_view"}
MADE_OF_ZEROS = {"slice_backward", "select_backward", "zeros", "zeros_like", "new_zeros", "zero_", "fill_"}
PARTS = {
    "products": {"mm"},
    "norms and additions": {"rms_norm_rows", "rms_norm_gradients", "sum of a norm", "add"},
    "rotary": {"rotary_heads", "rotary_gradients", "sum of a head's norm"},
    "gate": {"swiglu_rows", "swiglu_gradients"},
    "attention": {"flash forward", "flash backward", "merge_heads", "clone", "repeat", "copy_", "sum", "add_"},
}


class Counting(TorchDispatchMode):
    """What torch's own operations launch, one kernel each."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        namespace, name = function._schema.name.split("::")
        if namespace == "aten" and not function.is_view and name not in NO_KERNEL:
            self.found[name] += 1
        return function(*args, **(kwargs or {}))


def flash(counts: Counter[str]) -> Flash:
    """Kernels that compute nothing."""

    def forward(q: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
        counts["flash forward"] += 1
        return torch.empty_like(q), torch.empty(q.shape[1], len(q))

    def backward(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
        # Gradient times result, all gradients, those of queries in their type; sums over heads that share keys, values.
        counts["flash backward"] += 3 + 2
        return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)

    return Flash(forward, backward)


def launches(family: str, layers: int) -> Counter[str]:
    """Of a forward and a backward pass over the row, whose values nobody looks at."""
    config: Any = family_config(family)
    config.num_hidden_layers, config.layer_types = layers, ["full_attention"] * layers
    model = Transformer(config, torch.bfloat16)
    model.init_weights(0)
    counts: Counter[str] = Counter()
    attention = AsOnAGPU.from_segments(LENGTHS, PREFIX, CPU, flash(counts))
    weights = [weight for layer in model.layers for weight in layer.parameters()]
    row = torch.zeros(sum(LENGTHS), dtype=torch.int64)
    with recording() as triton, Counting() as torch_ops:
        hidden = model(row, row, attention)
        torch.autograd.grad(hidden, weights, hidden)
    for kernel, arguments, *_ in triton:
        name = kernel.fn.__name__
        if name == "sum_rows":
            name = "sum of a norm" if arguments["size"] == config.hidden_size else "sum of a head's norm"
        counts[name] += 1
    return counts + torch_ops.found


@pytest.fixture(autouse=True)
def triton_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("norm", "gate", "rotary", "merge"):
        monkeypatch.setattr(importlib.import_module(f"thinktwice_kernels.{name}"), "uses_triton", lambda *_: True)


def test_a_layer_runs_the_kernels_that_the_document_says() -> None:
    """The document's are of a Qwen3 layer; its first figures were counted so before, with what each stood for."""
    whole = launches("qwen3", 3)
    assert not whole.keys() & MADE_OF_ZEROS
    layer = whole - launches("qwen3", 2)
    assert layer.keys() <= set.union(*PARTS.values())
    counted = {part: sum(layer[name] for name in names) for part, names in PARTS.items()}
    rows = re.findall(r"^\| ([\w ]+) \| \d+ \| (\d+) \|$", (ROOT / "docs" / "step.md").read_text(), re.M)
    assert {part: int(now) for part, now in rows} == counted | {"together": layer.total()}


@pytest.mark.parametrize(("family", "most"), [("llama", 45), ("olmo3", 51)])  # OLMo adds behind its norms
def test_other_families(family: str, most: int) -> None:
    assert (launches(family, 3) - launches(family, 2)).total() <= most

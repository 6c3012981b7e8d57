"""Kernels that a GPU runs for one layer in a step of decoding, counted on the CPU in what a graph holds."""

import importlib
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.model.test_launches import Counting
from tests.small_models import family_config
from thinktwice_fast.model.attention import PagedAttention
from thinktwice_fast.model.paged import PagedKVCache
from thinktwice_fast.model.policy import attention_heads
from thinktwice_fast.model.rotary import Rotation
from thinktwice_fast.model.transformer import Transformer
from thinktwice_fast.records import Rollout, Sampling
from thinktwice_fast.rollout.batch import Batch, Sequence
from thinktwice_fast.rollout.graphs import GraphRunner
from thinktwice_kernels.launch import recording

PROMPT = (1,) * 70  # long enough to be read together
LAYER = {
    "rms_norm_rows": 2,  # the second half's with the addition before it, the first half's with that of the layer before
    "linear": 4,  # queries, keys and values; output; gate and up; down
    "swiglu_rows": 1,
    "rotary_write_kv": 1,
    "grouped_decode_attention": 1,  # a launch over all splits, one that merges them: see tests/csrc
}

# Around the layers. The head is a product and a copy here, on a GPU one product; a draw is several kernels there.
STEP = {"embedding": 1, "rms_norm_rows": 1, "index_select": 1, "matmul": 1, "copy_": 1, "sample": 1, "advance": 1}


class CountingAll(Counting):
    """With the extension's own operations."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        namespace, name = function._schema.name.split("::")
        self.found[name] += namespace == "thinktwice"
        return super().__torch_dispatch__(function, types, args, kwargs)


def launches(family: str, layers: int) -> Counter[str]:
    """Of a captured step, whose values nobody looks at."""
    config: Any = family_config(family)
    config.num_hidden_layers, config.layer_types = layers, ["full_attention"] * layers
    model = Transformer(config, torch.bfloat16)
    model.init_weights(0)
    _, heads, dim = attention_heads(model)
    cache = PagedKVCache(layers, 40, heads, dim, spare_blocks=1, dtype=torch.bfloat16)
    found: Counter[str] = Counter()

    def capture(step: Callable[[], None]) -> Callable[[], None]:
        with recording():
            step()  # makes the tables of angles
        with recording() as triton, CountingAll() as others:
            step()
        found.update(others.found)
        found.update(kernel.fn.__name__ for kernel, *_ in triton)
        return step

    prompt = cache.prefill()
    cache.extend([prompt], [len(PROMPT)])
    handles = [prompt, *cache.fork(prompt, 3)]
    sequences = [
        Sequence([1], [Rollout(0, n, PROMPT, [1])], Sampling(), handle=handle) for n, handle in enumerate(handles)
    ]
    plan = cache.extend(handles, [1] * 4)
    assert plan is not None
    batch = Batch(sequences, [1] * 4, plan, 0, torch.tensor([5]), False)
    with torch.inference_mode():
        GraphRunner(model, cache, 4, 100, capture)._begin(batch, 1)
    return found


@pytest.fixture(autouse=True)
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    def rotate_and_attend(
        self: PagedAttention, layer: int, qkv: Tensor, rotation: Rotation, scale: float, window: int
    ) -> Tensor:
        return self.cache.rotate_and_attend(layer, self.plan, qkv, rotation, scale, window)

    monkeypatch.setattr(PagedAttention, "rotate_and_attend", rotate_and_attend)
    for name in ("norm", "gate"):
        monkeypatch.setattr(importlib.import_module(f"thinktwice_kernels.{name}"), "uses_triton", lambda *_: True)


def test_a_layer_is_ten_kernels() -> None:
    whole = launches("qwen3", 3)
    layer = whole - launches("qwen3", 2)
    assert layer == LAYER
    assert whole - Counter({name: 3 * count for name, count in layer.items()}) == STEP

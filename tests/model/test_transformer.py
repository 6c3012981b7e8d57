"""The trainer's own decoder against transformers: logits and gradients of every family, and the names at its border."""

import copy
import gc
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from tests.model.decoders import MODELS, made, paged, prompts
from tests.model.rounding import assert_as_exact
from tests.small_models import own, own_model
from thinktwice_fast.model.agreement import agrees, as_transformers, packed_logits
from thinktwice_fast.model.attention import NAME, PagedAttention, PrefixAttention
from thinktwice_fast.model.policy import Policy, linear_head
from thinktwice_fast.model.rotary import EVERY, Rotation
from thinktwice_fast.model.transformer import Transformer

CPU = torch.device("cpu")
# A prompt longer than the windows of 8 with three responses; a sequence that shares nothing.
LENGTHS, PREFIX = [21, 13, 5, 40, 9], [-1, 0, 0, 0, -1]
THETA = 10000.0
ROPES: dict[str, dict[str, Any]] = {
    "linear": {"rope_type": "linear", "factor": 4.0},
    "dynamic": {"rope_type": "dynamic", "factor": 4.0},
    "yarn": {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 64},
    "llama3": {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
}  # fmt: skip


def shared_row(tokens: Tensor) -> tuple[Tensor, Tensor, PrefixAttention, Tensor]:
    """What ``Policy`` takes; every row's logits."""
    starts = [LENGTHS[before] if before >= 0 else 0 for before in PREFIX]
    spans = [torch.arange(start, start + n) for start, n in zip(starts, LENGTHS, strict=True)]
    return tokens, torch.cat(spans), PrefixAttention.from_segments(LENGTHS, PREFIX, CPU), torch.arange(len(tokens))


def one_by_one(model: Any, tokens: Tensor) -> Tensor:  # [T, V]
    """Each segment behind its own copy of its prefix, by transformers' own attention."""
    parts = tokens.split(LENGTHS)
    whole = [torch.cat([parts[p], part]) if p >= 0 else part for part, p in zip(parts, PREFIX, strict=True)]
    logits = [model(input_ids=ids[None], use_cache=False).logits[0] for ids in whole]
    return torch.cat([rows[-n:] for rows, n in zip(logits, LENGTHS, strict=True)])


def results(model: Any, logits: Tensor) -> list[Tensor]:
    """The logits, and every parameter's gradient of a loss on them, in the order of transformers' names."""
    cross_entropy(logits, torch.arange(len(logits)) * 7 % logits.shape[1]).backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    named = dict(model.split(gradients.items())) if isinstance(model, Transformer) else gradients
    return [logits.detach(), *(named[name] for name in sorted(named))]


def assert_same(theirs: Any) -> None:
    """Of both decoders with these weights, in float32, whole and with layers recomputed."""
    tokens = torch.cat(prompts(theirs, [sum(LENGTHS)]))
    double = copy.deepcopy(theirs).double()
    peer, exact = one_by_one(theirs, tokens).detach(), results(double, one_by_one(double, tokens))
    for recomputed in (False, True):
        ours = own(theirs)
        for layer in ours.layers:
            layer.recomputed = recomputed
        found = results(ours, Policy(ours)(*shared_row(tokens), linear_head))
        assert_as_exact(found[:1], [peer], exact[:1])
        # Gradients that nearly cancel, those of a norm's weight among them, lose some digits more than the logits.
        for mine, truth in zip(found, exact, strict=True):
            assert (mine - truth).norm() <= 1e-5 * truth.norm()


@pytest.mark.parametrize("name", MODELS)
def test_logits_and_gradients_are_those_of_transformers(name: str) -> None:
    theirs = made(name)
    assert_same(theirs)
    assert agrees(lambda ids: packed_logits(own(theirs), ids), own(theirs))


@pytest.mark.parametrize("name", ["qwen3", "olmo2"])
def test_heads_tied_and_untied(name: str) -> None:
    theirs = made(name, tie_word_embeddings=name == "olmo2")  # the other way round than in the tests above
    assert (theirs.lm_head.weight is theirs.model.embed_tokens.weight) == (own(theirs).lm_head is None)
    assert_same(theirs)


@pytest.mark.parametrize("rope", ROPES)
def test_rotary_types(rope: str) -> None:
    parameters = {"rope_theta": THETA} | ROPES[rope]
    for name in ("mistral", "olmo2"):
        theirs = made(name, rope_parameters=parameters, max_position_embeddings=512)
        assert Transformer.knows(theirs.config)
        assert_same(theirs)


def test_tables_of_angles_stay_where_graphs_know_them() -> None:
    rotary = own_model("llama").rotary[EVERY]
    positions = torch.tensor([0, 7, 3])
    first = rotary.at(positions, torch.float32, 8)
    assert rotary.at(positions, torch.float32, 5).cos.data_ptr() == first.cos.data_ptr() and len(first.cos) == 8
    kept = weakref.ref(first.cos)
    expected = first.cos[positions]
    del first
    longer = rotary.at(positions, torch.float32, 9)
    assert len(longer.cos) == 16 and torch.equal(longer.cos[positions], expected)
    rotary.at(positions, torch.bfloat16, 64)
    gc.collect()
    assert kept() is not None


def test_what_it_does_not_know() -> None:
    longrope = {"rope_type": "longrope", "rope_theta": THETA}
    default = {"rope_type": "default", "rope_theta": THETA}
    others = [
        made("llama", hidden_act="gelu"),
        made("llama", model_type="gemma"),
        made("llama", quantization_config={"quant_method": "fp8"}),
    ]
    for other in others:
        assert not Transformer.knows(other.config)
    for name, parameters in (
        ("llama", longrope),
        ("olmo3", {"full_attention": longrope, "sliding_attention": default}),
    ):
        config = made(name).config
        config.rope_parameters = parameters
        assert not Transformer.knows(config)


class AsOnAGPU(PagedAttention):
    """Norm, rotation and cache write in one op also on the CPU."""

    def rotate_and_attend(self, layer: int, qkv: Tensor, rotation: Rotation, scale: float, window: int) -> Tensor:
        return self.cache.rotate_and_attend(layer, self.plan, qkv, rotation, scale, window)


@pytest.mark.parametrize("attention", [PagedAttention, AsOnAGPU])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_over_a_paged_cache_the_logits_are_those_of_a_row(
    name: str, dtype: torch.dtype, attention: type[PagedAttention]
) -> None:
    """In two passes; bfloat16 loses no more than transformers' modules do."""
    theirs = made(name, NAME).to(dtype)
    ours = own(theirs)
    ids = prompts(ours, [60])[0]
    cache = paged(ours, 4)
    handle, found = cache.prefill(), []
    for part in ids.split([47, 13]):
        plan = cache.extend([handle], [len(part)])
        assert plan is not None
        rows = torch.arange(len(part))
        longest = 70 if attention is AsOnAGPU else 0
        found.append(Policy(ours)(part, plan.positions, attention(cache, plan, longest), rows, linear_head))
    truth, peer = packed_logits(theirs.double(), ids), packed_logits(as_transformers(ours), ids)
    for logits in (torch.cat(found), packed_logits(ours, ids)):
        assert 0 < (logits - truth).norm() <= 2 * (peer - truth).norm()


@pytest.mark.parametrize("name", MODELS)
def test_the_names_are_those_of_transformers_and_the_weights_views(name: str) -> None:
    theirs = made(name)
    ours = own(theirs)
    split = dict(ours.split(ours.named_parameters()))
    assert split.keys() == dict(theirs.named_parameters()).keys()
    assert all(torch.equal(split[name], value) for name, value in theirs.named_parameters())
    own_places = {parameter.untyped_storage().data_ptr() for parameter in ours.parameters()}
    assert {parameter.untyped_storage().data_ptr() for parameter in as_transformers(ours).parameters()} == own_places


def test_without_memory() -> None:
    with torch.device("meta"):
        model = Transformer(made("olmo3").config, torch.bfloat16)
    model.init_weights(0)
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
    assert sum(parameter.numel() for parameter in model.parameters()) == made("olmo3").num_parameters()

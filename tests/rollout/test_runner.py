"""Which runner a model gets, and that both draw the same."""

import logging
from typing import Any

import pytest
import torch
from hypothesis import event, given, settings
from hypothesis import strategies as st
from transformers.models.qwen3.modeling_qwen3 import Qwen3MLP

from tests.rollout.drawing import LONGEST, Mix, as_text, draw, make, requests, tokens
from tests.small_models import VOCABULARY, foreign_model, own_model
from thinktwice_fast.config import RolloutOptions
from thinktwice_fast.errors import UserError
from thinktwice_fast.model.attention import NAME
from thinktwice_fast.model.policy import Model
from thinktwice_fast.records import Request, Sampling
from thinktwice_fast.rollout.engine import Engine
from thinktwice_fast.rollout.modules import ModuleRunner
from thinktwice_fast.rollout.runner import DecoderRunner, planned_runner
from thinktwice_fast.rollout.step import Runner


def engine_of(model: Model, decoder: str = "auto", longest: int = 160, **options: Any) -> Engine:
    return Engine(model, frozenset(), RolloutOptions(decoder=decoder, **options), longest)  # type: ignore[arg-type]


@pytest.fixture
def tampered(monkeypatch: pytest.MonkeyPatch) -> None:
    """Transformers' modules do more than their weights say, as in a version to come."""
    own = Qwen3MLP.forward
    monkeypatch.setattr(Qwen3MLP, "forward", lambda self, x: 1.1 * own(self, x))


def test_known_models_run_in_the_decoder_unless_modules_are_asked_for(caplog: pytest.LogCaptureFixture) -> None:
    for decoder, runner in (("auto", DecoderRunner), ("fused", DecoderRunner), ("modules", ModuleRunner)):
        assert isinstance(engine_of(own_model("qwen3"), decoder)._runner, runner)
    assert not caplog.records


def test_unknown_models_run_their_modules(caplog: pytest.LogCaptureFixture) -> None:
    engine = engine_of(foreign_model(NAME))
    assert isinstance(engine._runner, ModuleRunner) and not caplog.records
    draw(engine, requests(1, Sampling(max_tokens=4)))


@pytest.mark.parametrize(("kind", "way"), [("default", "gpu"), ("dynamic", "modules")])
def test_modules_that_look_at_positions_on_the_host_are_no_cuda_graphs(kind: str, way: str) -> None:
    """Planned only: it takes a GPU to run them."""
    model, gpu = foreign_model(NAME), torch.device("cuda")
    model.config.rope_parameters = {"rope_type": kind, "rope_theta": 1e4}
    assert planned_runner(model, RolloutOptions(), gpu, torch.bfloat16) == way
    assert planned_runner(model, RolloutOptions(decoder="modules"), gpu, torch.bfloat16) == "modules"
    fused = RolloutOptions(decoder="fused")
    if way == "gpu":
        assert planned_runner(model, fused, gpu, torch.bfloat16) == "gpu"
    else:
        with pytest.raises(UserError, match=r"--rollout.decoder fused does not know .* on cuda: leave the option out"):
            planned_runner(model, fused, gpu, torch.bfloat16)
    assert planned_runner(own_model("qwen3"), fused, gpu, torch.bfloat16) == "gpu"


def refuse_fused(model: Any, name: str) -> None:
    with pytest.raises(UserError) as caught:
        engine_of(model, "fused")
    assert str(caught.value) == (
        f"--rollout.decoder fused does not know {name} in torch.float32 on cpu: leave the option out"
    )


@pytest.mark.usefixtures("tampered")
def test_a_decoder_that_is_not_what_transformers_computes_is_left(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        engine = engine_of(own_model("qwen3"))
    assert [record.getMessage() for record in caplog.records] == [
        "the fused decoder does not reproduce qwen3: rollouts run its modules"
    ]
    asked = requests(2, Sampling(max_tokens=12))
    assert tokens(draw(engine, asked)) == tokens(draw(make(decoder="modules"), asked))
    refuse_fused(own_model("qwen3"), "qwen3")


def test_the_decoder_is_refused_where_it_is_not_known() -> None:
    refuse_fused(foreign_model(NAME), "llama")
    with pytest.raises(UserError, match=r"--rollout\.exact does not know llama: leave it out"):
        engine_of(foreign_model(NAME), exact=True)


def test_an_engine_for_short_sequences() -> None:
    short = [Request(0, (5, 6, 7), (0, 1), Sampling(max_tokens=5))]
    engine = engine_of(own_model("qwen3"), longest=8)
    assert isinstance(engine._runner, DecoderRunner)
    assert tokens(draw(engine, short)) == tokens(draw(make(decoder="modules"), short))


@settings(max_examples=15)
@given(st.data())
def test_rollouts_are_the_same_bits_in_any_cache_and_the_modules_tokens(data: st.DataObject) -> None:
    """Whatever is preempted, kept, extended, forked late or read together; the modules round otherwise."""
    mix = Mix(data)
    stops = frozenset(data.draw(st.sets(st.integers(0, VOCABULARY - 1), max_size=60), "stops"))
    options = {
        "cache_tokens": 16 * data.draw(st.integers(10, 25), "blocks"),
        "max_sequences": data.draw(st.integers(1, 12), "max_sequences"),
        "max_batch_tokens": data.draw(st.integers(12, 200), "max_batch_tokens"),
    }
    model = own_model("olmo3")
    kinds: list[dict[str, Any]] = [{}, options, {}, options | {"decoder": "modules"}]
    engines = [
        Engine(model, stops, RolloutOptions(**kind), LONGEST, decode=as_text, group_attention=number != 2)
        for number, kind in enumerate(kinds)
    ]
    whole, *others = [mix.drawn(engine) for engine in engines]
    event(f"preempted: {engines[1].counts.preemptions > 0}")
    event(f"extended: {engines[1].counts.extended > 0}")
    for got in others:
        assert tokens(got) == tokens(whole)
    for number, rollout in whole.items():
        for got in others[:2]:
            assert got[number].logps == rollout.logps and got[number].entropies == rollout.entropies
        torch.testing.assert_close(
            torch.tensor(others[2][number].logps), torch.tensor(rollout.logps), atol=1e-4, rtol=0
        )


def test_bfloat16_runs_in_torch_where_the_cpu_has_tiles_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def runner(dtype: torch.dtype, **options: Any) -> Runner:
        return Engine(own_model("qwen3").to(dtype), frozenset(), RolloutOptions(**options), 160)._runner

    for tiles, expected in ((False, DecoderRunner), (True, ModuleRunner)):
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda tiles=tiles: tiles)
        assert isinstance(runner(torch.bfloat16), expected)
        assert isinstance(runner(torch.bfloat16, decoder="fused"), DecoderRunner)
        assert isinstance(runner(torch.float32), DecoderRunner)

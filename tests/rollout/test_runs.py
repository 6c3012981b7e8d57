"""A run of the engine: requests that follow others, tokens as they are drawn, an early end."""

import gc
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch

from tests.rollout.drawing import DECODERS, LONGEST, draw, make, requests, tokens
from tests.small_models import own_model
from thinktwice_fast.config import RolloutOptions
from thinktwice_fast.errors import UserError
from thinktwice_fast.records import Request, Rollout, Sampling
from thinktwice_fast.rollout.engine import Engine


def all_free(engine: Engine) -> bool:
    return engine.cache.free_blocks == engine.cache.num_blocks


@pytest.mark.parametrize("decoder", DECODERS)
def test_requests_may_follow_what_has_ended(decoder: str) -> None:
    engine = make(decoder=decoder)
    expected = tokens(draw(engine, requests(3)))
    first, second, *others = requests(3)
    short = replace(first, sampling=Sampling(max_tokens=5))

    def ended(rollout: Rollout) -> list[Request]:
        return others if rollout.sample_id == 0 else []

    got = engine.run([short, second], ended, seed=0)
    assert got[0].group == 0 and len(got[0].response) == 5
    assert {r.sample_id: r.response for r in got if r.group} == {n: t for n, t in expected.items() if n >= 10}
    assert {r.group for r in got} == {0, 1, 2, 3} and all_free(engine)


def test_a_run_goes_on_while_its_last_rollout_is_followed() -> None:
    engine = make()
    first, second, *_ = requests(1)
    got = engine.run([first], lambda rollout: [second] if rollout.group == 0 else [], seed=0)
    assert [rollout.group for rollout in got] == [0, 1]


def test_a_request_that_never_fits_ends_the_run() -> None:
    engine = make(cache_tokens=80)
    small, *_, large = requests(1)
    asked = [replace(small, sample_ids=(7,)), replace(large, sampling=Sampling(max_tokens=41))]
    with pytest.raises(UserError, match=r"does not fit the KV cache of 80"):
        engine.run([small], lambda rollout: asked, seed=0)
    assert all_free(engine)


@pytest.mark.parametrize("most", [1, 8])
def test_tokens_stream_as_they_are_drawn(most: int) -> None:
    engine = make()
    expected = tokens(draw(engine, requests(2)))
    seen: dict[int, int] = dict.fromkeys(expected, 0)
    ended = set()
    for rollout in engine.stream(requests(2), seed=0, most=most):
        number = rollout.sample_id
        assert number not in ended and 0 < len(rollout.response) - seen[number] <= most
        seen[number] = len(rollout.response)
        assert rollout.response == expected[number][: seen[number]]
        ended |= {number} if rollout.ended else set()
    assert ended == set(expected) and all_free(engine)


def test_what_follows_a_rollout_is_asked_for_once_the_consumer_has_seen_it() -> None:
    order: list[str] = []

    def ended(rollout: Rollout) -> list[Request]:
        order.append("followed")
        return []

    for rollout in make().stream(requests(1)[:1], ended, seed=0):
        order += ["seen"] if rollout.ended else []
    assert order == ["seen", "followed"]


@pytest.mark.parametrize("decoder", DECODERS)
def test_a_stream_that_is_closed_or_let_go_frees_the_cache(decoder: str) -> None:
    engine = make(max_batch_tokens=25, max_sequences=9, decoder=decoder)
    for end in (lambda grown: grown.close(), lambda grown: None):
        grown = engine.stream(requests(4), seed=0)
        next(grown)
        assert not all_free(engine)
        end(grown)
        del grown
        gc.collect()
        assert all_free(engine)
    assert tokens(draw(engine, requests(1))) == tokens(draw(make(decoder=decoder), requests(1)))


def test_a_run_that_fails_frees_the_cache() -> None:
    engine = make()
    grown = engine.stream(requests(2), seed=0)
    next(grown)
    with torch.no_grad():
        next(engine.model.parameters()).fill_(float("nan"))
    with pytest.raises(UserError, match="logits are not finite"):
        list(grown)
    assert all_free(engine) and list(grown) == []


def letters(ids: Sequence[int]) -> str:
    """Each token as two letters."""
    return "".join(chr(97 + token // 26) + chr(97 + token % 26) for token in ids)


@pytest.mark.parametrize("decoder", ["auto", "modules"])
def test_a_stop_string_ends_a_response_with_the_token_that_completes_it(decoder: Any) -> None:
    model, asked = own_model("qwen3"), requests(2)
    engine = Engine(model, frozenset(), RolloutOptions(decoder=decoder), LONGEST, decode=letters)
    plain = draw(engine, asked)
    # Across the border of two tokens, at the 7th and 8th of the first sample.
    stop = letters(plain[0].response[6:8])[1:4]
    with_stops = [replace(r, sampling=replace(r.sampling, stop_strings=("????", stop))) for r in asked]
    for number, rollout in draw(engine, with_stops).items():
        whole = plain[number].response
        cut = next((n for n in range(1, len(whole) + 1) if stop in letters(whole[:n])), None)
        assert rollout.response == whole[:cut]
        # Once the other has ended the products have another shape, and round differently on some processors.
        assert rollout.logps == pytest.approx(plain[number].logps[:cut], abs=1e-5)
        assert (rollout.stop_string, rollout.finished) == ((stop, True) if cut else (None, False))
        assert rollout.ended
    assert draw(engine, with_stops)[0].stop_string == stop


def test_stop_strings_need_text() -> None:
    with pytest.raises(ValueError, match="stop strings are found in text: make the Engine with decode="):
        make().run([replace(r, sampling=Sampling(stop_strings=("a",))) for r in requests(1)], seed=0)

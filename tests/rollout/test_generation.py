"""A generation while it runs: requests added, samples cancelled, the rest carried over to a later one."""

import gc
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch

from tests.rollout.drawing import DECODERS, LONGEST, RESPONSE, draw, make, prompts, requests, tokens
from tests.small_models import own, own_model, random_model
from thinktwice_fast.config import RolloutOptions
from thinktwice_fast.errors import UserError
from thinktwice_fast.rollout.engine import Engine
from thinktwice_fast.rollout.records import Request, Rollout, Sampling
from thinktwice_fast.rollout.scheduler import _handle


def all_free(engine: Engine) -> bool:
    return engine.cache.free_blocks == engine.cache.num_blocks


@pytest.mark.parametrize("decoder", DECODERS)
def test_requests_may_be_added_while_others_decode(decoder: str) -> None:
    engine = make(decoder=decoder)
    expected = tokens(draw(engine, requests(3)))
    first, second, *others = requests(3)
    generation = engine.generate([replace(first, sampling=Sampling(max_tokens=5)), second], seed=0)
    got = [next(generation)]
    assert got[0].group == 0 and len(got[0].response) == 5
    generation.add(others)
    got += generation
    assert {r.sample_id: r.response for r in got if r.group} == {n: t for n, t in expected.items() if n >= 10}
    assert {r.group for r in got} == {0, 1, 2, 3} and all_free(engine)


def test_a_generation_that_ran_dry_goes_on_after_more_was_added() -> None:
    engine = make()
    first, second, *_ = requests(2)
    generation = engine.generate([first], seed=0)
    assert len(list(generation)) == 2
    generation.add([second])
    assert {rollout.group for rollout in generation} == {1}


def test_a_request_that_never_fits_leaves_the_others_alone() -> None:
    engine = make(cache_tokens=80)
    small, *_, large = requests(1)
    generation = engine.generate([small], seed=0)
    with pytest.raises(UserError, match=r"does not fit the KV cache of 80"):
        generation.add([replace(small, sample_ids=(7,)), replace(large, sampling=Sampling(max_tokens=41))])
    assert [rollout.sample_id for rollout in generation] == [0]


def test_tokens_stream_as_they_are_drawn() -> None:
    engine = make()
    expected = tokens(draw(engine, requests(2)))
    seen: dict[int, list[int]] = {number: [] for number in expected}
    ended = set()
    generation = engine.generate(requests(2), seed=0)
    for rollout in generation.stream():
        assert rollout.sample_id not in ended
        seen[rollout.sample_id].append(rollout.response[-1])
        assert rollout.response == seen[rollout.sample_id]
        ended |= {rollout.sample_id} if rollout.ended else set()
    assert seen == expected and ended == set(expected)
    assert list(generation) == []  # each rollout comes out once, by either way


@pytest.mark.parametrize(("passes", "decoder"), [(0, "auto"), (1, "auto"), (3, "auto"), (30, "auto"), (3, "modules")])
@pytest.mark.parametrize("ids", [{10}, {10, 11, 12, 13}, {0, 13, 31}])
def test_cancelled_samples_free_their_blocks_and_leave_the_others_alone(
    ids: set[int], passes: int, decoder: str
) -> None:
    expected = tokens(draw(make(decoder=decoder), requests(4)))
    engine = make(max_batch_tokens=25, max_sequences=9, decoder=decoder)  # some are in prefill, some wait
    generation = engine.generate(requests(4), seed=0)
    for _ in range(passes):
        generation._step(1)
    cancelled = generation.cancel(ids)
    assert {rollout.sample_id for rollout in cancelled} == ids
    assert all(expected[r.sample_id][: len(r.response)] == r.response and not r.ended for r in cancelled)
    cache = engine.cache
    held = {block for lane in generation._scheduler.active for block in cache.blocks(_handle(lane))}
    assert cache.num_blocks - cache.free_blocks == len(held)
    assert generation.cancel(ids) == []
    rest = {rollout.sample_id: rollout.response for rollout in generation}
    assert rest == {number: response for number, response in expected.items() if number not in ids}
    assert all_free(engine)


def test_a_sample_that_ended_can_not_be_cancelled() -> None:
    engine = make()
    short = [Request(n, prompt, (n,), Sampling(max_tokens=2)) for n, prompt in enumerate(prompts())]
    generation = engine.generate(short, seed=0)
    first = next(generation)
    assert generation.cancel([0, 1, 2, 3]) == []
    assert {first.sample_id} | {rollout.sample_id for rollout in generation} == {0, 1, 2, 3}


@pytest.mark.parametrize("decoder", DECODERS)
def test_what_a_closed_generation_left_is_carried_on(decoder: str) -> None:
    expected = draw(make(decoder=decoder), requests(4))
    engine = make(max_batch_tokens=25, max_sequences=9, decoder=decoder)
    short = [Request(4, prompts()[0], (40, 41), Sampling(max_tokens=3))]
    generation = engine.generate(short + requests(4), seed=0)
    first = next(generation)
    left = generation.close()
    assert all_free(engine)
    with pytest.raises(RuntimeError, match="this generation is closed"):
        generation.add(requests(1))
    assert {first.sample_id} | {rollout.sample_id for rollout in generation} == {40, 41}  # these had ended
    begun = {r.started.sample_id: (r.started, list(r.started.logps)) for r in left if r.started is not None}
    assert 0 < len(begun) < 16 and sorted(i for r in left for i in r.sample_ids) == sorted(expected)
    got = {rollout.sample_id: rollout for rollout in engine.generate(left, seed=0, version=1)}
    assert tokens(got) == tokens(expected)
    for number, rollout in got.items():
        assert rollout.group == expected[number].group and rollout.ended
        assert rollout.logps == pytest.approx(expected[number].logps, abs=1e-4)
        assert len(rollout.logps) == len(rollout.entropies) == RESPONSE
    for number, (rollout, logps) in begun.items():
        assert got[number] is rollout and rollout.logps[: len(logps)] == logps
    assert all_free(engine)


@pytest.mark.parametrize("decoder", DECODERS)
def test_a_carried_rollout_goes_on_under_the_new_weights(decoder: str) -> None:
    """Its old tokens and log-probabilities stay, the next ones are what the new weights draw after them."""
    engine, asked = make(decoder=decoder), requests(1)[3:]
    generation = engine.generate(asked, seed=0)
    for _ in range(8):
        generation._step(1)
    (left,) = generation.close()
    assert left.started is not None
    tokens, logps = list(left.started.response), list(left.started.logps)
    assert len(tokens) == 8
    other = random_model("qwen3", "sdpa", seed=9)
    with torch.no_grad():
        for mine, new in zip(engine.model.parameters(), own(other).parameters(), strict=True):
            mine.copy_(new)
    (rollout,) = engine.generate([replace(left, group=6)], seed=0, version=1)
    assert (rollout.response[:8], rollout.logps[:8], rollout.group) == (tokens, logps, 6)
    ids = torch.tensor([*rollout.prompt, *rollout.response[:-1]])
    with torch.no_grad():
        expected = other(input_ids=ids[None], use_cache=False).logits[0, len(rollout.prompt) + 7 :].log_softmax(-1)
    chosen = expected.gather(1, torch.tensor(rollout.response[8:])[:, None])[:, 0]
    assert rollout.logps[8:] == pytest.approx(chosen.tolist(), abs=1e-4)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"prompt": (1, 2)}, "of another prompt or sample"),
        ({"sample_ids": (5,)}, "of another prompt or sample"),
        ({"sample_ids": (4, 5)}, "of another prompt or sample"),
        ({"sampling": Sampling(max_tokens=2)}, "rollout 4 has 2 tokens and nothing left to draw: leave it out"),
    ],
)
def test_a_started_rollout_must_fit_its_request(change: dict[str, Any], says: str) -> None:
    started = Rollout(0, 4, (1, 2, 3), [7, 8], [-1.0, -1.0], [1.0, 1.0])
    good = Request(0, (1, 2, 3), (4,), Sampling(max_tokens=3), started=started)
    with pytest.raises(ValueError, match=says):
        replace(good, **change)


def test_an_abandoned_generation_frees_the_cache() -> None:
    engine = make()
    generation = engine.generate(requests(2), seed=0)
    generation._step(1)
    assert not all_free(engine)
    del generation
    gc.collect()
    assert all_free(engine)


def test_a_generation_that_failed_is_closed() -> None:
    engine = make()
    generation = engine.generate(requests(2), seed=0)
    generation._step(1)
    with torch.no_grad():
        next(engine.model.parameters()).fill_(float("nan"))
    with pytest.raises(UserError, match="logits are not finite"):
        next(generation)
    assert all_free(engine) and list(generation) == []
    with pytest.raises(RuntimeError, match="this generation is closed"):
        generation.add(requests(1))


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
        make().generate([replace(r, sampling=Sampling(stop_strings=("a",))) for r in requests(1)], seed=0)

"""Paired rollouts: a prompt that continues an earlier rollout begins with its cache, and draws the same tokens."""

from dataclasses import replace
from typing import Any

import pytest

from tests.rollout.drawing import make, prompts, requests, scheduler_of, tokens
from tests.small_models import FAMILIES
from thinktwice_fast.records import Request, Rollout, Sampling
from thinktwice_fast.rollout.engine import Engine
from thinktwice_fast.rollout.prefix_cache import Counts

GREEDY = Sampling(temperature=0.0, max_tokens=20)
INSTRUCTION = (5, 4, 3, 2, 1)


def solutions(engine: Engine, samples: int = 2, **options: Any) -> list[Rollout]:
    """Rollouts of lengths 7, 14, 21 and 28, with their caches kept."""
    asked = [
        replace(request, sampling=Sampling(max_tokens=7 * (request.group + 1)), keep=True)
        for request in requests(samples)
    ]
    return sorted(engine.run(asked, seed=0, **options), key=lambda rollout: rollout.sample_id)


def refinement(solution: Rollout, samples: int = 1, sampling: Sampling = GREEDY, **fields: Any) -> Request:
    first = 1000 + 100 * solution.sample_id
    prompt = (*solution.prompt, *solution.response, *INSTRUCTION)
    return Request(solution.sample_id, prompt, tuple(range(first, first + samples)), sampling, **fields)


def refine(engine: Engine, asked: list[Request], **options: Any) -> dict[int, Rollout]:
    return {rollout.sample_id: rollout for rollout in engine.run(asked, seed=0, **options)}


def prefilled(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Tokens of each batch from now on."""
    sizes: list[int] = []
    extend = engine.cache.extend

    def spy(handles: Any, counts: list[int]) -> Any:
        plan = extend(handles, counts)
        sizes.append(sum(counts) if plan is not None else 0)
        return plan

    monkeypatch.setattr(engine.cache, "extend", spy)
    return sizes


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("samples", [1, 3])
@pytest.mark.parametrize("sampling", [GREEDY, Sampling(max_tokens=20)], ids=["greedy", "sampled"])
def test_extended_caches_give_the_tokens_of_a_fresh_prefill(family: str, samples: int, sampling: Sampling) -> None:
    engine = make(family)
    solved = solutions(engine)
    assert engine.cache.free_blocks < engine.cache.num_blocks
    extended = refine(engine, [refinement(s, samples, sampling, extends=s) for s in solved])
    assert engine.counts == Counts(extended=8) and engine.cache.free_blocks == engine.cache.num_blocks
    fresh = refine(engine, [refinement(s, samples, sampling) for s in solved])
    assert engine.counts == Counts(extended=8)
    assert tokens(extended) == tokens(fresh) and len(fresh) == 8 * samples
    for number, rollout in extended.items():
        assert rollout.prompt == fresh[number].prompt
        assert rollout.logps == pytest.approx(fresh[number].logps, abs=1e-4)
        assert rollout.entropies == pytest.approx(fresh[number].entropies, abs=1e-4)


def test_only_what_follows_the_solution_is_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = make()
    (solution, *_) = solutions(engine)
    sizes = prefilled(engine, monkeypatch)
    refine(engine, [refinement(solution, extends=solution)])
    assert sizes[0] == 1 + len(INSTRUCTION)  # the solution's last token was never fed
    assert set(sizes[1:]) == {1}


def test_a_refinement_may_start_while_other_solutions_decode() -> None:
    engine = make()
    asked = [
        replace(request, sampling=Sampling(max_tokens=7 * (request.group + 1)), keep=True) for request in requests(1)
    ]

    def refined(rollout: Rollout) -> list[Request]:
        return (
            [refinement(rollout, sampling=Sampling(max_tokens=3), extends=rollout)] if rollout.sample_id < 1000 else []
        )

    order = [rollout.sample_id for rollout in engine.run(asked, refined, seed=0)]
    assert sorted(order) == [0, 10, 20, 30, 1000, 2000, 3000, 4000]
    assert order.index(1000) < order.index(20)
    assert engine.counts == Counts(extended=4) and engine.cache.free_blocks == engine.cache.num_blocks


def test_a_refinement_comes_before_prompts_that_wait() -> None:
    engine = make(max_sequences=1)

    def refined(rollout: Rollout) -> list[Request]:
        return [] if rollout.sample_id else [refinement(rollout, extends=rollout)]

    asked = [replace(request, keep=True) for request in requests(1, GREEDY)]
    assert [rollout.sample_id for rollout in engine.run(asked, refined, seed=0)] == [0, 1000, 10, 20, 30]


def test_a_chain_of_passes_carries_one_cache_along(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = make()
    (rollout, *_) = solutions(engine, 1)
    prompt_tokens = []
    for _ in range(3):
        sizes = prefilled(engine, monkeypatch)
        (rollout,) = engine.run([refinement(rollout, extends=rollout, keep=True)], seed=0)
        prompt_tokens.append(sizes[0])
    assert prompt_tokens == [6, 6, 6] and engine.counts == Counts(extended=3)


@pytest.mark.parametrize(
    ("change", "version", "counted"),
    [
        ({"prompt": prompts()[1]}, 0, Counts(prompt_differs=1)),  # it ends where the solution began
        ({"prompt": (*prompts()[1], 1, 2, 3, *INSTRUCTION)}, 0, Counts(prompt_differs=1)),
        ({}, 1, Counts(policy_changed=1)),
        ({"extends": Rollout(1, 10, prompts()[1], [1])}, 0, Counts(released=1)),  # never kept
    ],
    ids=["shorter", "another", "policy", "not kept"],
)
def test_what_does_not_hold_is_prefilled_anew_and_counted(
    change: dict[str, Any], version: int, counted: Counts
) -> None:
    engine = make()
    solved = solutions(engine, 1)
    request = replace(refinement(solved[1], extends=solved[1]), **change)
    extended = refine(engine, [request], version=version)
    assert engine.counts == counted and engine.counts.prefilled_anew == 1
    assert tokens(extended) == tokens(refine(make(), [replace(request, extends=None)]))


def test_one_token_that_differs_is_noticed_wherever_it_stands() -> None:
    for place in range(len(prompts()[0]) + 6):
        engine = make()
        solution = solutions(engine, 1)[0]
        request = refinement(solution, extends=solution)
        prompt = [*request.prompt]
        prompt[place] += 1
        request = replace(request, prompt=tuple(prompt))
        extended = refine(engine, [request])
        assert engine.counts == Counts(prompt_differs=1)
        assert tokens(extended) == tokens(refine(engine, [replace(request, extends=None)]))


def test_a_kept_cache_is_extended_once() -> None:
    engine = make()
    solution = solutions(engine, 1)[2]
    asked = [refinement(solution, extends=solution), replace(refinement(solution, extends=solution), sample_ids=(7,))]
    got = refine(engine, asked)
    assert engine.counts == Counts(extended=1, released=1)
    assert len({tuple(rollout.response) for rollout in got.values()}) == 1


def test_another_engines_rollout_has_no_cache_here() -> None:
    mine, other = make(), make()
    solved, (stranger, *_) = solutions(mine), solutions(other)
    assert stranger.cached in {rollout.cached for rollout in solved}
    refine(mine, [refinement(stranger, extends=stranger)])
    assert mine.counts == Counts(released=1)


def test_kept_caches_give_way_oldest_first_before_anything_runs_out() -> None:
    """Sequences of up to 80 tokens in a pool of 160: two running ones need all of it."""
    engine = make(cache_tokens=160)
    asked = [Request(n, prompts()[1], (n,), Sampling(max_tokens=15), keep=True) for n in range(4)]
    solved = sorted(engine.run(asked, seed=0), key=lambda rollout: rollout.sample_id)
    assert engine.cache.free_blocks == 10 - 4 * 2
    assert len(refine(engine, [Request(9, prompts()[2], (90,), Sampling(max_tokens=60))])) == 1
    assert engine.counts == Counts() and engine.cache.free_blocks == 10 - 2 * 2
    assert len(refine(engine, [Request(n, prompts()[3], (n,), Sampling()) for n in (91, 92)])) == 2
    assert engine.cache.free_blocks == 10
    extended = refine(engine, [refinement(rollout, extends=rollout) for rollout in solved])
    assert (engine.counts.extended, engine.counts.released) == (0, 4)
    assert tokens(extended) == tokens(refine(make(), [refinement(rollout) for rollout in solved]))


@pytest.mark.parametrize(
    "asked",
    [
        [Request(9, prompts()[2], (90,), Sampling(max_tokens=50))],  # grows to 5 blocks, where 2 are free
        [Request(n, prompts()[n], (90 + n,), Sampling(max_tokens=2)) for n in (0, 3)],  # the second wants 6 to come in
    ],
    ids=["growing", "coming in"],
)
def test_the_oldest_goes_first(asked: list[Request]) -> None:
    engine = make(cache_tokens=160)
    solve = [Request(n, prompts()[1], (n,), Sampling(max_tokens=15), keep=True) for n in range(4)]
    solved = [engine.run([request], seed=0)[0] for request in solve]
    assert engine.cache.free_blocks == 10 - 4 * 2
    refine(engine, asked)
    assert engine.cache.free_blocks == 10 - 2 * 2
    refine(engine, [refinement(rollout, extends=rollout) for rollout in solved[2:]])
    assert engine.counts == Counts(extended=2)


def test_kept_caches_make_room_for_a_group_to_fork(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rather than that its members have to bring in the prompt once more each."""
    engine = make(cache_tokens=160)
    solve = [Request(n, prompts()[1], (n,), Sampling(max_tokens=15), keep=True) for n in range(4)]
    engine.run(solve, seed=0)
    sizes = prefilled(engine, monkeypatch)
    refine(engine, [Request(9, prompts()[2], (90, 91, 92, 93), Sampling(max_tokens=5))])
    assert sizes == [17, 4] and engine.cache.free_blocks == 10 - 2 * 2


def test_a_refinement_rather_waits_than_give_up_the_cache_it_extends() -> None:
    engine = make(cache_tokens=96)
    (solution,) = engine.run([Request(0, prompts()[1], (0,), Sampling(max_tokens=15), keep=True)], seed=0)
    grown = engine.stream([Request(1, prompts()[0], (1,), Sampling(max_tokens=20))], seed=0)
    next(grown)
    prompt = (*solution.prompt, *solution.response, *range(45))
    scheduler_of(grown).add([Request(2, prompt, (2,), GREEDY, extends=solution)])
    assert [rollout.sample_id for rollout in grown if rollout.ended] == [1, 2]
    assert engine.counts == Counts(extended=1)


def test_a_cache_that_gave_way_while_its_refinement_waited_is_prefilled_anew() -> None:
    engine = make(cache_tokens=96, max_sequences=1)
    (solution,) = engine.run([Request(0, prompts()[1], (0,), Sampling(max_tokens=15), keep=True)], seed=0)
    grown = engine.stream([Request(1, prompts()[3], (1,), Sampling(max_tokens=41))], seed=0)
    next(grown)
    scheduler_of(grown).add([refinement(solution, extends=solution)])
    got = {rollout.sample_id: rollout for rollout in grown}
    assert engine.counts == Counts(released=1)
    assert tokens(got)[1000] == tokens(refine(make(), [refinement(solution)]))[1000]


def test_releasing_prefixes_frees_them_all() -> None:
    engine = make()
    solved = solutions(engine)
    engine.release_prefixes()
    assert engine.cache.free_blocks == engine.cache.num_blocks
    refine(engine, [refinement(solved[0], extends=solved[0])])
    assert engine.counts == Counts(released=1)


def test_releasing_prefixes_frees_those_named_alone() -> None:
    engine = make()
    solved = solutions(engine)
    engine.release_prefixes(solved[1:])
    engine.release_prefixes(solved[1:])  # have nothing any more
    assert engine.cache.free_blocks < engine.cache.num_blocks
    refine(engine, [refinement(s, extends=s) for s in solved[:2]])
    assert engine.counts == Counts(extended=1, released=1)
    assert engine.cache.free_blocks == engine.cache.num_blocks

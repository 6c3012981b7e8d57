"""Solutions and their refinements drawn in one go: what two rounds give, each refinement as soon as it can start."""

from collections.abc import Iterable, Iterator
from typing import Any, cast

import pytest
import torch

from tests.algorithms.stubs import Grader
from tests.update.worlds import one_process
from thinktwice_fast.algorithms.sampler import Sampler, SampleSpec
from thinktwice_fast.config import Config, ModelOptions, RolloutOptions
from thinktwice_fast.errors import UserError
from thinktwice_fast.model.loading import load_model
from thinktwice_fast.records import Base, Group, Request, Rollout, Sampling
from thinktwice_fast.rollout.engine import Engine, OnEnd
from thinktwice_fast.rollout.prefix_cache import Counts
from thinktwice_fast.run.evaluation import evaluate
from thinktwice_fast.tasks.arithmetic import RECHECK, ArithmeticSource
from thinktwice_fast.tasks.prompts import ChatFormat

__all__ = ["one_process"]
pytestmark = pytest.mark.usefixtures("one_process")

PROBLEMS = ArithmeticSource("tm5", held_out=True, limit=20)
DRAWN, GREEDY = Sampling(temperature=0.9, max_tokens=64), Sampling(temperature=0.0, max_tokens=64)


def make_sampler(**options: Any) -> Sampler:
    loaded = load_model(ModelOptions(device="cpu"), 0, torch.device("cpu"))
    engine = Engine(loaded.model, loaded.stop_ids, RolloutOptions(**options), 256)
    return Sampler(engine, ChatFormat(loaded.tokenizer), cast(Any, Grader()), RECHECK, loaded.stop_ids)


def solve_groups(sampler: Sampler, slots: tuple[int, ...] = (0, 1, 4, 7)) -> list[Group]:
    return [sampler.solve_group(slot, PROBLEMS[slot]) for slot in slots]


def in_two_rounds(sampler: Sampler, solved: list[Group], samples: int) -> list[Group]:
    sampler.fill(solved, SampleSpec(samples, DRAWN, stream=8, seed=5, version=0))
    refined = [
        sampler.refine_group(group, Base.of(rollout), group.slot * samples + n)
        for group in solved
        for n, rollout in enumerate(group.rollouts)
    ]
    sampler.fill(refined, SampleSpec(1, GREEDY, stream=9, seed=5, version=0))
    return refined


def at_once(sampler: Sampler, solved: list[Group], samples: int) -> list[Group]:
    return sampler.fill_pairs(solved, SampleSpec(samples, DRAWN, stream=8, seed=5, version=0), GREEDY)


def summary(groups: list[Group]) -> list[tuple[Any, ...]]:
    return [
        (group.slot, group.problem.index, group.messages, rollout.sample_id, rollout.response, rollout.reward)
        for group in groups
        for rollout in group.rollouts
    ]


@pytest.mark.parametrize("options", [{}, {"max_sequences": 3}, {"cache_tokens": 512}], ids=str)
@pytest.mark.parametrize("samples", [1, 3])
def test_pairs_are_what_two_rounds_give(samples: int, options: dict[str, int]) -> None:
    reference, sampler = make_sampler(), make_sampler(**options)
    expected_solved, solved = solve_groups(reference), solve_groups(sampler)
    expected = in_two_rounds(reference, expected_solved, samples)
    refined = at_once(sampler, solved, samples)
    assert summary(solved) == summary(expected_solved) and summary(refined) == summary(expected)
    assert len(refined) == 4 * samples
    assert reference.engine.counts == Counts()
    counts = sampler.engine.counts
    if "cache_tokens" in options and samples == 3:  # kept caches give way to what runs
        assert counts.released > 0 and counts.extended + counts.released == 12
    else:
        assert counts == Counts(extended=4 * samples)
    assert sampler.engine.cache.free_blocks == sampler.engine.cache.num_blocks


def test_each_group_of_solutions_and_each_refinement_is_graded_once() -> None:
    sampler = make_sampler()
    solved = solve_groups(sampler)
    refined = at_once(sampler, solved, 3)
    submitted = [(asked.index, prompt, texts) for asked, prompt, texts in cast(Any, sampler.grader).submitted]
    expected = [(group.problem.index, group.messages, [r.text for r in group.rollouts]) for group in solved + refined]
    assert sorted(submitted, key=repr) == sorted(expected, key=repr)


def test_refinements_start_while_solutions_decode(monkeypatch: pytest.MonkeyPatch) -> None:
    sampler = make_sampler()
    order: list[bool] = []  # whether each rollout that ended was a refinement
    run = sampler.engine.run

    def spy(requests: list[Request], on_end: OnEnd, **options: Any) -> Any:
        def watched(rollout: Rollout) -> Iterable[Request]:
            order.append(rollout.group >= len(requests))
            return on_end(rollout)

        return run(requests, watched, **options)

    monkeypatch.setattr(sampler.engine, "run", spy)
    many = tuple(range(12))
    solved = solve_groups(sampler, many)
    # Some solutions end early.
    sampler.fill_pairs(
        solved, SampleSpec(2, Sampling(temperature=2.5, max_tokens=64), stream=8, seed=5, version=0), GREEDY
    )
    assert sorted(order) == [False] * 24 + [True] * 24 and order != sorted(order)


def test_an_error_leaves_the_cache_free() -> None:
    sampler = make_sampler()
    grader = cast(Any, sampler.grader)
    grader.error = UserError("my_file.py: raised ZeroDivisionError: mend it")
    with pytest.raises(UserError, match=r"^my_file\.py: raised"):
        at_once(sampler, solve_groups(sampler), 2)
    assert sampler.engine.cache.free_blocks == sampler.engine.cache.num_blocks
    grader.error = None
    calls: Iterator[int] = iter(range(3))

    def fails_on_the_third(*arguments: Any) -> Any:
        if next(calls) == 2:
            raise UserError("the chat template refuses messages")
        return Sampler.refine_group(sampler, *arguments)

    object.__setattr__(sampler, "refine_group", fails_on_the_third)
    with pytest.raises(UserError, match="the chat template refuses"):
        at_once(sampler, solve_groups(sampler), 2)
    assert sampler.engine.cache.free_blocks == sampler.engine.cache.num_blocks


def test_evaluation_counts_the_pairs() -> None:
    config = Config()
    config.eval.samples, config.eval.temperature = 2, 0.9
    sampler, reference = make_sampler(), make_sampler()
    metrics = evaluate({"held_out": PROBLEMS}, sampler, config, 3)
    solved = [reference.solve_group(slot, PROBLEMS[slot]) for slot in range(20)]
    stream = 1 << 30
    reference.fill(solved, SampleSpec(2, Sampling(0.9, max_tokens=64), stream, seed=0, version=0))
    solutions = [rollout for group in solved for rollout in group.rollouts]
    refined = [
        reference.refine_group(group, Base.of(rollout), 2 * group.slot + n)
        for group in solved
        for n, rollout in enumerate(group.rollouts)
    ]
    reference.fill(refined, SampleSpec(1, GREEDY, stream + 1, seed=0, version=0))
    refinements = [group.rollouts[0] for group in refined]
    wrong = [n for n, rollout in enumerate(solutions) if not rollout.reward]
    assert metrics["eval/held_out/solve_accuracy"] == 1 - len(wrong) / 40
    assert metrics["eval/held_out/refine_accuracy"] == sum(rollout.reward or 0 for rollout in refinements) / 40
    assert metrics["eval/held_out/fix_wrong"] == sum(refinements[n].reward or 0 for n in wrong) / len(wrong)
    assert metrics["eval/held_out/refine_tokens"] == sum(len(rollout.response) for rollout in refinements) / 40
    assert sampler.engine.counts == Counts(extended=40)
    assert metrics["eval/held_out/refine_extended"] == 1

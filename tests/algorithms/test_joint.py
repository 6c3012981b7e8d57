"""Joint pairs: what a sequential pair would draw if its weights stayed, each refinement as soon as it can start."""

import dataclasses
import json
from typing import Any

import pytest

from tests.algorithms.joint_world import JointWorld, outcome
from tests.algorithms.stubs import Grader, Grading
from thinktwice_fast.algorithms.bases import base_ahead, choose_base
from thinktwice_fast.algorithms.sampler import Sampler
from thinktwice_fast.errors import UserError
from thinktwice_fast.records import Group, Request, Rollout
from thinktwice_fast.rollout.engine import Engine, OnEnd
from thinktwice_fast.rollout.prefix_cache import Counts
from thinktwice_fast.run.metrics import find_metric

pytestmark = pytest.mark.usefixtures("one_process")

both_selections = pytest.mark.parametrize("selection", ["uniform", "wrong_first"])


@pytest.fixture(scope="module", name="sequential")
def sequential_pairs() -> Any:
    """Outcomes of two sequential pairs by selection, drawn when first asked for."""
    drawn: dict[str, list[Any]] = {}

    def of(selection: str) -> list[Any]:
        if selection not in drawn:
            world = JointWorld(sequential=True, selection=selection)
            drawn[selection] = [[outcome(half.groups) for half in world.pair(number)] for number in (1, 2)]
        return drawn[selection]

    return of


@both_selections
@pytest.mark.parametrize("options", [{}, {"max_sequences": 2}, {"cache_tokens": 256}], ids=str)
def test_a_joint_pair_is_a_sequential_one_whose_weights_stay(
    selection: str, options: dict[str, Any], sequential: Any
) -> None:
    """Samples, bases, rewards and advantages, whatever decodes beside what."""
    world = JointWorld(selection=selection, **options)
    for number, expected in enumerate(sequential(selection), 1):
        assert [outcome(half.groups) for half in world.pair(number)] == expected
    counts = world.engine.counts
    assert counts.extended + counts.released == 8 and counts.prompt_differs == counts.policy_changed == 0
    if "cache_tokens" not in options:
        assert counts == Counts(extended=8)
    assert world.engine.cache.free_blocks == world.engine.cache.num_blocks


def test_one_update_per_pair_with_mini_batches_of_whole_pairs() -> None:
    world = JointWorld()
    world.config.update.minibatch_sequences = 12
    world.start()
    step = world.algorithm.step(1)
    assert step.phase == "pair" and step.groups == [] and [half.phase for half in step.halves] == ["solve", "refine"]
    (minibatches,) = world.updater.updates
    solve, refine = ([group.rollouts for group in half.groups] for half in step.halves)
    expected = [[*solve[0], *refine[0], *solve[1], *refine[1]], [*solve[2], *refine[2], *solve[3], *refine[3]]]
    assert [list(map(id, part)) for part in minibatches] == [list(map(id, part)) for part in expected]
    world.algorithm.step(2)
    assert len(world.updater.updates) == 2 and world.updater.version == 4


def test_samples_without_reward_are_not_trained_on() -> None:
    world = JointWorld(Grader(missing_one_in=3), selection="wrong_first")
    step = world.algorithm.step(1)
    ((minibatch,),) = world.updater.updates
    rollouts = [rollout for half in step.halves for group in half.groups for rollout in group.rollouts]
    missing = [sum(r.reward is None for g in half.groups for r in g.rollouts) for half in step.halves]
    assert len(rollouts) == 24 and sum(missing) > 0 and len(minibatch) == 24 - sum(missing)
    assert [half.metrics["rewards_missing"] for half in step.halves] == missing


@dataclasses.dataclass
class Begun:
    """A refinement that was asked for."""

    base: Rollout
    siblings: int  # solutions of its group that had ended by then
    ended: int  # solutions of all groups that had


@pytest.fixture(name="begun")
def watched_runs(monkeypatch: pytest.MonkeyPatch) -> list[Begun]:
    """Every refinement that is asked for from now on; checks that only caches are kept which may be extended."""
    begun: list[Begun] = []
    run = Engine.run

    def spy(self: Engine, requests: list[Request], on_end: OnEnd, **options: Any) -> list[Rollout]:
        ended: list[Rollout] = []

        def watched(rollout: Rollout) -> list[Request]:
            ended.append(rollout)
            more = list(on_end(rollout))
            for base in [request.extends for request in more]:
                assert base is not None
                family = [rollout for rollout in ended if rollout.group == base.group]
                begun.append(Begun(base, len(family), sum(rollout.group < 4 for rollout in ended)))
                assert [rollout for rollout in family if self._prefixes.handle(rollout) is not None] == [base]
            return more

        return run(self, requests, watched, **options)

    monkeypatch.setattr(Engine, "run", spy)
    return begun


def test_uniform_refinements_begin_when_their_base_has_ended(begun: list[Begun]) -> None:
    JointWorld().algorithm.step(1)
    assert len(begun) == 4 and begun[0].ended < 12
    assert any(refinement.siblings < 3 for refinement in begun), "none was ahead of its group"


def test_wrong_first_refinements_begin_when_their_group_is_graded(begun: list[Begun]) -> None:
    JointWorld(selection="wrong_first").algorithm.step(1)
    assert [refinement.siblings for refinement in begun] == [3] * 4
    assert begun[0].ended < 12


class SlowGrading(Grading):
    """Done after so many looks."""

    looks = 0

    def done(self) -> bool:
        self.looks -= 1
        return self.looks < 0


class SlowGrader(Grader):
    """The gradings of some solutions take long."""

    def __init__(self, *looks: int) -> None:
        super().__init__()
        self.looks = list(looks)

    def submit(self, *arguments: Any) -> SlowGrading:
        usual = super().submit(*arguments)
        grading = SlowGrading(usual.result(), None)
        grading.looks = self.looks.pop(0) if self.looks else 0
        return grading


@pytest.mark.parametrize("looks", [(9999,) * 12, (9999, 0), (0, 9999, 3)], ids=str)
def test_slow_grading_delays_its_own_refinements_alone(looks: tuple[int, ...], sequential: Any) -> None:
    world = JointWorld(SlowGrader(*looks), selection="wrong_first")
    assert [outcome(half.groups) for half in world.pair(1)] == sequential("wrong_first")[0]


def test_a_prompt_that_does_not_continue_its_base_is_prefilled_and_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    refine_group = Sampler.refine_group

    def other_beginning(self: Sampler, solve: Group, base: Any, slot: int) -> Group:
        group = refine_group(self, solve, base, slot)
        return dataclasses.replace(group, prompt=(group.prompt[0], *group.prompt)) if slot % 2 else group

    monkeypatch.setattr(Sampler, "refine_group", other_beginning)
    world = JointWorld()
    step = world.algorithm.step(1)
    assert world.engine.counts == Counts(extended=2, prompt_differs=2)
    assert step.metrics["refine_extended"] == 0.5
    assert all(len(group.rollouts) == 3 for group in step.halves[1].groups)


@both_selections
def test_an_error_leaves_the_cache_free(selection: str, monkeypatch: pytest.MonkeyPatch) -> None:
    world = JointWorld(selection=selection)
    world.grader.error = UserError("my_file.py: raised ZeroDivisionError: mend it")
    with pytest.raises(UserError, match=r"^my_file\.py: raised"):
        world.algorithm.step(1)
    assert world.engine.cache.free_blocks == world.engine.cache.num_blocks
    world.grader.error = None
    asked: list[int] = []
    refine_group = Sampler.refine_group

    def fails_on_the_third(self: Sampler, solve: Group, base: Any, slot: int) -> Group:
        asked.append(slot)
        if len(asked) == 3:
            raise UserError("the chat template refuses messages")
        return refine_group(self, solve, base, slot)

    monkeypatch.setattr(Sampler, "refine_group", fails_on_the_third)
    with pytest.raises(UserError, match="the chat template refuses"):
        world.algorithm.step(1)
    assert world.engine.cache.free_blocks == world.engine.cache.num_blocks
    assert world.algorithm.state() == {"position": 0} and not world.updater.updates


def test_a_resumed_run_goes_on_as_if_never_stopped() -> None:
    whole, second = JointWorld(), JointWorld()
    whole.algorithm.step(1)
    state = json.loads(json.dumps(whole.algorithm.state()))
    assert state == {"position": 4}
    second.algorithm.load_state(state)
    first, again = ([outcome(half.groups) for half in world.pair(2)] for world in (whole, second))
    assert first == again
    assert [group[1] for group in first[0]] == [4, 5, 6, 7]


def test_every_metric_is_declared_and_counts_its_own_samples() -> None:
    step = JointWorld().algorithm.step(1)
    for part in (step, *step.halves):
        for name in part.metrics:
            assert find_metric(f"{part.phase}/{name}")
    solve, refine = step.halves
    for half in step.halves:
        lengths = [len(rollout.response) for group in half.groups for rollout in group.rollouts]
        assert half.metrics["response_tokens"] == sum(lengths) / 12
    assert refine.metrics["prompt_tokens"] > solve.metrics["prompt_tokens"] + 10
    assert step.metrics["refine_extended"] == 1
    total = 12 * (solve.metrics["response_tokens"] + refine.metrics["response_tokens"])
    assert step.metrics["tokens_per_second"] == pytest.approx(total / step.metrics["seconds_rollout"])


def test_the_base_known_ahead_is_the_one_chosen() -> None:
    for slot in range(50):
        group = Group(slot, Any, (), (1,))  # type: ignore[arg-type]
        group.rollouts = [Rollout(0, sample, (1,), reward=float(sample % 2)) for sample in range(5)]
        place = base_ahead(5, "uniform", 3, 7, slot)
        assert place is not None and choose_base(group, "uniform", 3, 7) is group.rollouts[place]
    assert base_ahead(5, "wrong_first", 3, 7, 0) is None

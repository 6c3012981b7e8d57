"""Solutions and refinements of one policy, drawn in one go: each refine group as soon as its base is known."""

from collections.abc import Sequence
from contextlib import closing

from thinktwice_fast.algorithms.bases import base_ahead, choose_base
from thinktwice_fast.algorithms.groups import Group, as_base
from thinktwice_fast.algorithms.sampler import Draw, Gradings, Sampler, SamplingTimes, set_rewards
from thinktwice_fast.rollout.generation import Generation
from thinktwice_fast.rollout.records import Request, Rollout
from thinktwice_fast.tasks.pool import Grading


def fill_joint(
    sampler: Sampler, groups: Sequence[Group], draw: Draw, selection: str
) -> tuple[list[Group], SamplingTimes]:
    """As ``Sampler.fill``, and as many refinements of one solution of each group, by the same weights.

    A refine prompt extends its base's cache where it continues that token for token; ``engine.counts`` says how often
    it did. Refining begins while other solutions decode: with ``uniform`` selection, which can tell the base before it
    is drawn, as soon as the base has ended, with ``wrong_first`` as soon as its group is graded. So with
    ``wrong_first`` and graders in processes of their own their speed decides what decodes together: samples do not
    depend on that, up to the rounding of the matrix products.

    Args:
        groups: prompts, without rollouts yet.
        draw: what and how; refinements have the random numbers of the stream after it.
        selection: as in `choose_base`, which chooses by the draw's seed and stream.

    Returns:
        The refine group of each of ``groups``, in their order, and what it all took.

    Raises:
        UserError: as ``Sampler.fill``. Collective.
    """
    pairs = _PairDraw(sampler, groups, draw, selection)

    def sampled() -> Gradings:
        with closing(sampler.generate(draw.requests(groups, keep=True), draw)) as generation:
            return pairs.sample(generation)

    try:
        times = sampler.graded(sampled)
    finally:
        sampler.engine.release_kept()
    return pairs.refined(), times


class _PairDraw:
    """Groups are known by their number, their place in the list."""

    def __init__(self, sampler: Sampler, groups: Sequence[Group], draw: Draw, selection: str):
        self._sampler = sampler
        self._groups = groups
        self._draw = draw
        self._refine_draw = draw.refinements(draw.samples, draw.sampling)
        self._selection = selection
        self._bases: dict[int, Rollout] = {}  # those chosen
        self._refined: dict[int, Group] = {}
        self._undecided: dict[int, Grading] = {}  # complete groups whose base hangs on their rewards

    def sample(self, generation: Generation) -> Gradings:
        """Everything; gives what is being graded still."""
        gradings: Gradings = []
        while (rollout := next(generation, None)) is not None or self._undecided:
            requests: list[Request] = []
            if rollout is None:
                requests += self._decide(next(iter(self._undecided)))  # nothing decodes: wait for it
            elif rollout.group >= len(self._groups):
                refined = self._refined[rollout.group - len(self._groups)]
                gradings += self._sampler.collect(refined, rollout, self._draw.samples)
            else:
                requests += self._solved(rollout, gradings)
            for number in [number for number, grading in self._undecided.items() if grading.done()]:
                requests += self._decide(number)
            generation.add(requests)
        return gradings

    def refined(self) -> list[Group]:
        """The refine groups. A base that was refined before its group was graded has its reward only now."""
        for number, group in self._refined.items():
            group.base = as_base(self._bases[number])
        return [self._refined[number] for number in range(len(self._groups))]

    def _solved(self, rollout: Rollout, gradings: Gradings) -> list[Request]:
        """Take in a solution that ended."""
        number, group = rollout.group, self._groups[rollout.group]
        draw = self._draw
        complete = self._sampler.collect(group, rollout, draw.samples)
        place = base_ahead(draw.samples, self._selection, draw.seed, draw.stream, group.slot)
        if place is None:
            self._undecided.update((number, grading) for _, grading in complete)
            return []
        gradings += complete
        if rollout.sample_id == draw.ids(group.slot)[place]:
            return [self._refine(number, rollout)]
        self._sampler.engine.release_kept([rollout])
        return []

    def _decide(self, number: int) -> list[Request]:
        """Choose the base of a complete group, when its rewards have come."""
        group = self._groups[number]
        set_rewards(group, self._undecided.pop(number))
        base = choose_base(group, self._selection, self._draw.seed, self._draw.stream)
        self._sampler.engine.release_kept(rollout for rollout in group.rollouts if rollout is not base)
        return [self._refine(number, base)]

    def _refine(self, number: int, base: Rollout) -> Request:
        solve = self._groups[number]
        group = self._sampler.refine_group(solve, as_base(base), solve.slot)
        self._bases[number], self._refined[number] = base, group
        draw = self._refine_draw
        return Request(len(self._groups) + number, group.prompt, draw.ids(solve.slot), draw.sampling, extends=base)

"""Solutions and refinements of one policy, drawn in one go: each refine group as soon as its base is known."""

from collections.abc import Sequence
from contextlib import closing

from thinktwice_fast.algorithms.bases import base_ahead, choose_base
from thinktwice_fast.algorithms.groups import Group, as_base
from thinktwice_fast.algorithms.sampler import Gradings, Sampler, SamplingTimes, sample_ids, set_rewards
from thinktwice_fast.rollout.generation import Generation
from thinktwice_fast.rollout.records import Request, Rollout, Sampling
from thinktwice_fast.tasks.pool import Grading


def fill_joint(
    sampler: Sampler,
    groups: Sequence[Group],
    *,
    samples: int,
    sampling: Sampling,
    selection: str,
    stream: int,
    seed: int,
    version: int,
) -> tuple[list[Group], SamplingTimes]:
    """As ``Sampler.fill``, and as many refinements of one solution of each group, by the same weights.

    A refine prompt extends its base's cache where it continues that token for token; ``engine.counts`` says how often
    it did. Refining begins while other solutions decode: with ``uniform`` selection, which can tell the base before it
    is drawn, as soon as the base has ended, with ``wrong_first`` as soon as its group is graded. So with
    ``wrong_first`` and graders in processes of their own their speed decides what decodes together: samples do not
    depend on that, up to the rounding of the matrix products.

    Args:
        groups: prompts, without rollouts yet.
        samples: solutions per prompt, and refinements per base.
        sampling: how to draw both.
        selection: as in `choose_base`, which chooses by ``seed`` and ``stream``.
        stream: keeps the random numbers of different calls apart; refinements have those of ``stream + 1``.
        seed: of the run.
        version: of the weights.

    Returns:
        The refine group of each of ``groups``, in their order, and what it all took.

    Raises:
        UserError: as ``Sampler.fill``. Collective.
    """
    pairs = _PairDraw(sampler, groups, samples, sampling, selection, stream, seed)
    requests = [
        Request(number, group.prompt, sample_ids(stream, group.slot, samples), sampling, keep=True)
        for number, group in enumerate(groups)
    ]

    def draw() -> Gradings:
        with closing(sampler.engine.generate(requests, seed=seed, version=version)) as generation:
            return pairs.draw(generation)

    try:
        times = sampler.graded(draw)
    finally:
        sampler.engine.release_kept()
    return pairs.refined(), times


class _PairDraw:
    """Groups are known by their number, their place in the list."""

    def __init__(
        self,
        sampler: Sampler,
        groups: Sequence[Group],
        samples: int,
        sampling: Sampling,
        selection: str,
        stream: int,
        seed: int,
    ):
        self._sampler = sampler
        self._groups = groups
        self._samples = samples
        self._sampling = sampling
        self._selection = selection
        self._stream = stream
        self._seed = seed
        self._bases: dict[int, Rollout] = {}  # those chosen
        self._refined: dict[int, Group] = {}
        self._undecided: dict[int, Grading] = {}  # complete groups whose base hangs on their rewards

    def draw(self, generation: Generation) -> Gradings:
        """Everything; gives what is being graded still."""
        gradings: Gradings = []
        while (rollout := next(generation, None)) is not None or self._undecided:
            requests: list[Request] = []
            if rollout is None:
                requests += self._decide(next(iter(self._undecided)))  # nothing decodes: wait for it
            elif rollout.group >= len(self._groups):
                gradings += self._sampler.collect(
                    self._refined[rollout.group - len(self._groups)], rollout, self._samples
                )
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
        complete = self._sampler.collect(group, rollout, self._samples)
        place = base_ahead(self._samples, self._selection, self._seed, self._stream, group.slot)
        if place is None:
            self._undecided.update((number, grading) for _, grading in complete)
            return []
        gradings += complete
        if rollout.sample_id == sample_ids(self._stream, group.slot, self._samples)[place]:
            return [self._refine(number, rollout)]
        self._sampler.engine.release_kept([rollout])
        return []

    def _decide(self, number: int) -> list[Request]:
        """Choose the base of a complete group, when its rewards have come."""
        group = self._groups[number]
        set_rewards(group, self._undecided.pop(number))
        base = choose_base(group, self._selection, self._seed, self._stream)
        self._sampler.engine.release_kept(rollout for rollout in group.rollouts if rollout is not base)
        return [self._refine(number, base)]

    def _refine(self, number: int, base: Rollout) -> Request:
        solve = self._groups[number]
        group = self._sampler.refine_group(solve, as_base(base), solve.slot)
        self._bases[number], self._refined[number] = base, group
        ids = sample_ids(self._stream + 1, solve.slot, self._samples)
        return Request(len(self._groups) + number, group.prompt, ids, self._sampling, extends=base)

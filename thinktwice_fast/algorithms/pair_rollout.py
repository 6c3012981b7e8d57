"""Solutions and refinements of one policy, sampled in one go: each refine group as soon as its base is known."""

from collections.abc import Iterator, Sequence

from thinktwice_fast.algorithms.bases import base_ahead, choose_base
from thinktwice_fast.algorithms.sampler import Gradings, Sampler, SampleSpec, SamplingTimes, set_rewards
from thinktwice_fast.records import Base, Group, Request, Rollout
from thinktwice_fast.tasks.pool import Grading


def fill_joint(
    sampler: Sampler, groups: Sequence[Group], spec: SampleSpec, selection: str
) -> tuple[list[Group], SamplingTimes]:
    """As ``Sampler.fill``, and as many refinements of one solution of each group, by the same weights.

    A refine prompt extends its base's cache where it continues that token for token; ``engine.counts`` says how often
    it did. Refining begins while other solutions decode: with ``uniform`` selection, which can tell the base before it
    is sampled, as soon as the base has ended, with ``wrong_first`` as soon as its group is graded. So with
    ``wrong_first`` and graders in processes of their own their speed decides what decodes together: samples do not
    depend on that, up to the rounding of the matrix products.

    Args:
        groups: prompts, without rollouts yet.
        spec: what and how; refinements have the random numbers of the stream after it.
        selection: as in `choose_base`, which chooses by the spec's seed and stream.

    Returns:
        The refine group of each of ``groups``, in their order, and what it all took.

    Raises:
        UserError: as ``Sampler.fill``. Collective.
    """
    pairs = _Pairs(sampler, groups, spec, selection)
    times = sampler.run(spec.requests(groups, keep=True), spec, pairs.ended, pairs.gradings)
    return pairs.refined(), times


class _Pairs:
    """Groups are known by their number, their place in the list."""

    def __init__(self, sampler: Sampler, groups: Sequence[Group], spec: SampleSpec, selection: str):
        self.gradings: Gradings = []  # on their way, but for those of undecided groups
        self._sampler = sampler
        self._groups = groups
        self._spec = spec
        self._refine_spec = spec.refinements(spec.samples, spec.sampling)
        self._selection = selection
        self._bases: dict[int, Rollout] = {}  # those chosen
        self._refined: dict[int, Group] = {}
        self._undecided: dict[int, Grading] = {}  # complete groups whose base hangs on their rewards
        self._left = len(groups) * spec.samples  # samples that are asked for and have not ended

    def ended(self, rollout: Rollout) -> list[Request]:
        """Take in a solution or a refinement; gives the refinements that can begin."""
        self._left -= 1
        if rollout.group >= len(self._groups):
            refined = self._refined[rollout.group - len(self._groups)]
            self.gradings += self._sampler.collect(refined, rollout, self._spec.samples)
            requests = []
        else:
            requests = self._solved(rollout)
        requests += self._graded()
        if not self._left and self._undecided:
            requests.append(self._decide(next(iter(self._undecided))))  # nothing decodes: wait for it
        return requests

    def refined(self) -> list[Group]:
        """The refine groups. A base that was refined before its group was graded has its reward only now."""
        for number, group in self._refined.items():
            group.base = Base.of(self._bases[number])
        return [self._refined[number] for number in range(len(self._groups))]

    def _solved(self, rollout: Rollout) -> list[Request]:
        number, group = rollout.group, self._groups[rollout.group]
        spec = self._spec
        complete = self._sampler.collect(group, rollout, spec.samples)
        place = base_ahead(spec.samples, self._selection, spec.seed, spec.stream, group.slot)
        if place is None:
            self._undecided.update((number, grading) for _, grading in complete)
            return []
        self.gradings += complete
        if rollout.sample_id == spec.ids(group.slot)[place]:
            return [self._refine(number, rollout)]
        self._sampler.engine.release_prefixes([rollout])
        return []

    def _graded(self) -> Iterator[Request]:
        """The refinements of groups whose rewards have come."""
        for number in [number for number, grading in self._undecided.items() if grading.done()]:
            yield self._decide(number)

    def _decide(self, number: int) -> Request:
        """Choose the base of a complete group, when its rewards have come."""
        group = self._groups[number]
        set_rewards(group, self._undecided.pop(number))
        base = choose_base(group, self._selection, self._spec.seed, self._spec.stream)
        self._sampler.engine.release_prefixes(rollout for rollout in group.rollouts if rollout is not base)
        return self._refine(number, base)

    def _refine(self, number: int, base: Rollout) -> Request:
        solve = self._groups[number]
        group = self._sampler.refine_group(solve, Base.of(base), solve.slot)
        self._bases[number], self._refined[number] = base, group
        spec = self._refine_spec
        self._left += spec.samples
        return Request(len(self._groups) + number, group.prompt, spec.ids(solve.slot), spec.sampling, extends=base)

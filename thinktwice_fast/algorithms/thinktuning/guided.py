"""Which rollouts a teacher is asked about: a fraction of each group that falls over the first third of a run."""

import random
from collections.abc import Collection

from thinktwice_fast.records import Group, Rollout
from thinktwice_fast.thinktuning_options import ThinkTuningOptions


def guided_fraction(options: ThinkTuningOptions, steps: int, number: int) -> float:
    """The fraction in global step ``number`` (from 1) of a run of ``steps``; 0 once the teacher is off."""
    decay = options.decay_steps or steps / 3
    value = options.fraction - (options.fraction - options.min_fraction) * min(number - 1, decay) / decay
    return value if value > options.cutoff else 0.0


def guided_count(eligible: int, fraction: float) -> int:
    """How many of a group's eligible rollouts are guided: at least one, where there is one and the teacher is on."""
    return min(eligible, max(1, int(eligible * fraction))) if fraction else 0


def choose_guided(
    group: Group, fraction: float, stop_ids: Collection[int], seed: int, step: int
) -> list[tuple[int, Rollout]]:
    """Some of the rollouts that ended properly, right or wrong, at random by (seed, step, slot).

    Args:
        group: filled.
        fraction: as `guided_fraction` gives it.
        stop_ids: token ids that end a response.
        seed: of the run.
        step: global step.

    Returns:
        Their places in the group, and they themselves.
    """
    eligible = [(place, r) for place, r in enumerate(group.rollouts) if r.finished and r.response[-1] in stop_ids]
    count = guided_count(len(eligible), fraction)
    return sorted(random.Random(f"guided:{seed}:{step}:{group.slot}").sample(eligible, count), key=_place)


def choose_behaviour(behaviours: int, seed: int, step: int, slot: int, place: int) -> int:
    """Which of so many behaviours, from 0, is asked for one rollout, where each request names one."""
    return random.Random(f"behaviour:{seed}:{step}:{slot}:{place}").randrange(behaviours)


def _place(chosen: tuple[int, Rollout]) -> int:
    return chosen[0]

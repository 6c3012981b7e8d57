"""Which of a problem's solutions its refine group starts from."""

import random

from thinktwice_fast.records import Group, Rollout, is_right


def choose_base(group: Group, selection: str, seed: int, step: int) -> Rollout:
    """One of a complete solve group's rollouts, at random by (seed, step, slot).

    Args:
        selection: ``uniform`` ignores correctness; ``wrong_first`` draws among those with a reward below 1,
            where there is one.
    """
    candidates = group.rollouts
    if selection == "wrong_first":
        candidates = [r for r in candidates if r.reward is not None and not is_right(r.reward)] or candidates
    return candidates[_place(len(candidates), seed, step, group.slot)]


def base_ahead(samples: int, selection: str, seed: int, step: int, slot: int) -> int | None:
    """Which rollout, from 0, `choose_base` will choose of a group of ``samples``; None where it hangs on rewards."""
    return _place(samples, seed, step, slot) if selection == "uniform" else None


def _place(candidates: int, seed: int, step: int, slot: int) -> int:
    return random.Random(f"base:{seed}:{step}:{slot}").choice(range(candidates))

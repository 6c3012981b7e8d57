"""Which process computes which sequences, micro-batch by micro-batch.

A micro-batch is one row: at most so many tokens, unless a single sequence has more. All processes get equally many, so
that their collectives meet, and those they compute at the same time take about equal work. What an optimizer step sees
does not depend on any of it.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from thinktwice_fast.config import Config
from thinktwice_fast.model.flops import Flops
from thinktwice_fast.update.batches import Trainable, families

# sequences' indices, by process and micro-batch; processes with nothing to do have empty micro-batches
Plan = list[list[list[int]]]


# Rows of 8 to 9 thousand tokens keep a large GPU busy: longer ones are no faster, and their activations take memory.
# A fifth more is for what does not pack evenly.
_LEAST, _MOST = 10_240, 16_384


@dataclass
class _Load:
    """Sequences of one row, its tokens and the operations that these take."""

    members: list[int] = field(default_factory=list)
    tokens: int = 0
    flops: int = 0

    def add(self, *others: "_Load") -> None:
        for other in others:
            self.members += other.members
            self.tokens += other.tokens
            self.flops += other.flops


@dataclass(frozen=True)
class _Group:
    """Sequences with one prompt, which a row has once for all it holds of them."""

    prompt: _Load
    responses: list[_Load]


def row_budget(config: Config) -> int:
    """Tokens of a row, by ``update.microbatch_tokens`` or, where that leaves it open, by the size of a group."""
    if config.update.microbatch_tokens:
        return config.update.microbatch_tokens
    together = config.samples_per_problem if config.update.shared_prefix else 1
    group = config.rollout.max_prompt_tokens + together * (config.rollout.max_response_tokens - 1)
    return min(max(_LEAST, group * 6 // 5), _MOST)


def plan_microbatches(
    sequences: Sequence[Trainable], budget: int, processes: int, flops: Flops, *, shared_prefix: bool
) -> Plan:
    """Deal the sequences of all processes out.

    Args:
        sequences: with at least one prompt and one response token each.
        budget: tokens of a row; a longer sequence has a row of its own.
        processes: that share the work.
        flops: what the model takes.
        shared_prefix: sequences with one prompt share a row where they fit, and are parted where several processes
            get done sooner for it: each part then has the prompt again.

    Returns:
        At least one micro-batch, maybe empty, for each process; the same for equal arguments.
    """
    parts = families(sequences) if shared_prefix else [[index] for index in range(len(sequences))]
    groups = [_group(sequences, members, flops) for members in parts]
    pieces = sorted(_pieces(groups, budget), key=lambda piece: -piece.flops)
    rows = -(-sum(min(piece.tokens, budget) for piece in pieces) // budget)
    count = max(1, -(-rows // processes))
    plan = _deal(lambda n: _balanced(pieces, budget, n), count, processes)
    if processes > 1:
        plan = min(plan, _deal(lambda n: _in_line(groups, budget, n), count, processes), key=_makespan)
    return [[sorted(load.members) for load in loads] for loads in plan]


def _group(sequences: Sequence[Trainable], members: list[int], flops: Flops) -> _Group:
    prompt = len(sequences[members[0]].prompt)
    own = [(member, len(sequences[member].response) - 1) for member in members]  # the last token is only a target
    responses = [_Load([member], tokens, flops.segment(tokens, prompt, tokens + 1)) for member, tokens in own]
    return _Group(_Load([], prompt, flops.segment(prompt, 0, 0)), responses)


def _pieces(groups: Iterable[_Group], budget: int) -> list[_Load]:
    """Groups, whole where they fit, else as much of them as does."""
    pieces: list[_Load] = []
    for group in groups:
        for number, response in enumerate(group.responses):
            if number == 0 or pieces[-1].tokens + response.tokens > budget:
                pieces.append(_Load())
                pieces[-1].add(group.prompt)
            pieces[-1].add(response)
    return pieces


def _deal(fill: Callable[[int], list[_Load] | None], count: int, processes: int) -> list[list[_Load]]:
    """Rows by process and micro-batch, from ``count`` of each process on as few as ``fill`` can do with."""
    while (loads := fill(count * processes)) is None:
        count += 1
    loads.sort(key=lambda load: -load.flops)  # those computed at the same time are alike
    return [loads[process::processes] for process in range(processes)]


def _balanced(pieces: list[_Load], budget: int, count: int) -> list[_Load] | None:
    """``count`` rows: each piece, from the largest on, into that with the least work (Graham 1969)."""
    loads = [_Load() for _ in range(count)]
    for piece in pieces:
        open_to_it = [load for load in loads if not load.members or load.tokens + piece.tokens <= budget]
        if not open_to_it:
            return None
        min(open_to_it, key=lambda load: load.flops).add(piece)
    return loads


def _in_line(groups: list[_Group], budget: int, count: int) -> list[_Load] | None:
    """``count`` rows: all groups end to end, cut wherever a row has its share of the work that is left."""
    loads = [_Load() for _ in range(count)]
    row, left = 0, sum(load.flops for group in groups for load in (group.prompt, *group.responses))
    share = left / count
    for group in groups:
        left -= group.prompt.flops
        added = -1  # the row that has the prompt
        for response in group.responses:
            new = (response,) if added == row else (group.prompt, response)
            full = loads[row].tokens + sum(load.tokens for load in new) > budget
            done = loads[row].flops + sum(load.flops for load in new) / 2 > share
            if loads[row].members and (full or (done and row + 1 < count)):
                row += 1
                if row == count:
                    return None
                share = left / (count - row)
                new = (group.prompt, response)
            loads[row].add(*new)
            added = row
            left -= response.flops
    return loads


def _makespan(loads: list[list[_Load]]) -> int:
    """Operations until all are done, where each micro-batch waits for the slowest process."""
    return sum(max(load.flops for load in together) for together in zip(*loads, strict=True))

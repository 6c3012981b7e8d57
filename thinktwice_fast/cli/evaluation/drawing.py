"""Draws the responses of one model to one set: solutions, and what its mode makes of each."""

import time
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from functools import lru_cache

from thinktwice_fast.cli.evaluation.aside import Aside
from thinktwice_fast.cli.evaluation.modes import Asked, Chain, Mode, Turn
from thinktwice_fast.cli.evaluation.replies import LOOK_SECONDS, GradeBook, Replies, mark
from thinktwice_fast.cli.evaluation.store import NONE, REFINEMENTS, SOLUTIONS, Key, Line, Store
from thinktwice_fast.errors import UserError
from thinktwice_fast.records import Problem, Request, Rollout, Sampling
from thinktwice_fast.rollout.engine import STEPS_AT_ONCE, Engine
from thinktwice_fast.tasks.prompts import ChatFormat

# Bits of a sample id, which with the seed says what is drawn: of the turn, problem, solution and refinement.
_TURN_BITS, _PROBLEM_BITS, _SAMPLE_BITS, _REFINEMENT_BITS = 16, 22, 14, 10
MOST_PROBLEMS, MOST_SAMPLES, MOST_REFINEMENTS = 1 << _PROBLEM_BITS, 1 << _SAMPLE_BITS, 1 << _REFINEMENT_BITS


@dataclass
class Times:
    """Seconds of this process."""

    start_up: float = 0.0  # imports, problems, models
    engine: float = 0.0
    grading: float = 0.0  # waiting for graders when nothing was left to draw
    began: float = 0.0  # on the clock

    @property
    def other(self) -> float:
        """Prompts, texts, the store, figures."""
        return time.perf_counter() - self.began - self.start_up - self.engine - self.grading


@dataclass(frozen=True)
class Policy:
    """A model that answers."""

    engine: Engine
    chat: ChatFormat
    stop_ids: frozenset[int]
    longest: int  # tokens that a prompt and its response may take


@dataclass(frozen=True)
class Amounts:
    """How much is drawn."""

    samples: int  # solutions of a problem
    refinements: int  # of a solution
    sampling: Sampling  # of solutions
    seed: int


class Drawing:
    """One model on one set.

    Args:
        policy: that answers.
        mode: what comes after a solution.
        amounts: how much.
        problems: this process's share, by number.
        store: that responses are written to.
        replies: what the store holds already; the rest is added.
        book: that has them graded.
        reward_name: that grades them.
        drawn: called with the number of responses when some are there.
    """

    def __init__(
        self,
        policy: Policy,
        mode: Mode,
        amounts: Amounts,
        problems: Mapping[int, Problem],
        store: Store,
        replies: Replies,
        book: GradeBook,
        reward_name: str,
        drawn: Callable[[int], None],
    ):
        self._policy = policy
        self._mode = mode
        self._amounts = amounts
        self._problems = problems
        self._store = store
        self._replies = replies
        self._book = book
        self._reward_name = reward_name
        self._drawn = drawn
        self._prompts = {number: tuple(policy.chat.prompt_ids(p.messages)) for number, p in problems.items()}
        self._marks = {number: mark(prompt) for number, prompt in self._prompts.items()}
        self._chains: dict[int, Chain] = {}  # those that decode, by sample id
        self._left: dict[int, int] = {}  # solutions to be drawn yet, by problem
        self._aside = Aside(book.look, LOOK_SECONDS)
        self._own = 0.0  # seconds that were not the engine's while it ran

    def run(self, times: Times, bases: Mapping[Key, str] | None = None) -> None:
        """Draw and grade what is missing.

        Args:
            times: that this takes is added.
            bases: texts of another model's solutions to refine, instead of drawing any.

        Raises:
            UserError: drawing, grading or writing failed.
        """
        requests = self._refinements(bases)
        if bases is None:
            requests += self._solutions()
        engine, amounts = self._policy.engine, self._amounts
        began, self._own = time.perf_counter(), 0.0
        try:
            with (
                self._aside,
                closing(engine.stream(requests, self._ended, seed=amounts.seed, most=STEPS_AT_ONCE)) as grown,
            ):
                for _ in grown:
                    self._aside.look()
                drawn = time.perf_counter()
                times.engine += drawn - began - self._own
        finally:
            engine.release_prefixes()
        self._book.finish()
        times.grading += time.perf_counter() - drawn

    def _solutions(self) -> list[Request]:
        requests = []
        for number in self._problems:
            keys = [Key(number, sample) for sample in range(self._amounts.samples)]
            missing = [key for key in keys if key not in self._replies.by_key]
            if not missing:
                self._grade(keys)
                continue
            self._left[number] = len(missing)
            ids = self._prompts[number]
            asked = Asked(self._problems[number].messages, ids, self._amounts.sampling, not self._amounts.refinements)
            requests += self._request(missing, 0, asked, None)
        return requests

    def _refinements(self, bases: Mapping[Key, str] | None) -> list[Request]:
        """Of the solutions that are there already."""
        if bases is None:
            bases = {key: text for key, text in self._replies.texts.items() if key.refinement == NONE}
        requests = []
        for key, text in list(bases.items()):
            missing = self._missing(key)
            reply = self._replies.by_key.get(key)
            if not missing:
                self._grade_refinements(key)
            else:
                ids = self._replies.ids.get(key) or self._policy.chat.encode(text)
                turn = Turn(text, len(ids), reply is None or reply.finished)
                requests += self._begin(key, missing, ids, turn, None)
        return requests

    def _missing(self, solution: Key) -> list[Key]:
        wanted = [solution._replace(refinement=number) for number in range(self._amounts.refinements)]
        return [key for key in wanted if key not in self._replies.by_key]

    def _ended(self, rollout: Rollout) -> Iterable[Request]:
        began = time.perf_counter()
        key, turn = _key_of(rollout.sample_id)
        follows = self._turn_ended(key, rollout) if turn else self._solution_ended(key, rollout)
        self._own += time.perf_counter() - began
        return follows

    def _solution_ended(self, key: Key, rollout: Rollout) -> list[Request]:
        turn = self._turn(rollout)
        line: Line = {"asked": self._marks[key.problem], "ids": rollout.response}
        self._aside.put(self._solved, key, line | {"text": turn.text, "finished": turn.finished})
        missing = self._missing(key)
        return self._begin(key, missing, rollout.response, turn, rollout) if missing else []

    def _solved(self, key: Key, line: Line) -> None:
        self._take(key, SOLUTIONS, line)
        self._left[key.problem] -= 1
        if not self._left[key.problem]:
            self._grade([Key(key.problem, sample) for sample in range(self._amounts.samples)])

    def _begin(
        self, key: Key, missing: Sequence[Key], ids: Sequence[int], solution: Turn, rollout: Rollout | None
    ) -> list[Request]:
        messages, prompt = self._problems[key.problem].messages, self._prompts[key.problem]
        first = Chain(Asked(messages, prompt, self._amounts.sampling, False), ids, solution)
        asked = self._mode.next(first)
        assert asked is not None, "every mode has something to ask after a solution"
        chains = {refined: Chain(asked, (), solution) for refined in missing}
        self._chains |= {_sample_id(refined, 1): chain for refined, chain in chains.items()}
        return self._request(missing, 1, asked, rollout)

    def _turn_ended(self, key: Key, rollout: Rollout) -> list[Request]:
        chain = self._chains.pop(rollout.sample_id)
        turn = self._turn(rollout)
        chain.turns.append(replace(turn, text=chain.asked.forced + turn.text) if chain.asked.forced else turn)
        chain.response = rollout.response
        asked = self._mode.next(chain)
        if asked is None:
            self._aside.put(self._refined, key, chain)
            return []
        chain.asked = asked
        number = len(chain.turns) + 1
        self._chains[_sample_id(key, number)] = chain
        return self._request([key], number, asked, rollout)

    def _refined(self, key: Key, chain: Chain) -> None:
        line: Line = {
            "text": self._mode.answer(chain),
            "tokens": sum(turn.tokens for turn in chain.turns),
            "finished": chain.latest.finished,
        }
        if len(chain.turns) > 1:
            line["turns"] = [turn.text for turn in chain.turns]
        self._take(key, REFINEMENTS, line)
        if not self._missing(key.solution):
            self._grade_refinements(key.solution)

    def _request(self, keys: Sequence[Key], turn: int, asked: Asked, extends: Rollout | None) -> list[Request]:
        """For a response of each; none where the prompt leaves no room, which gives empty ones that were cut off."""
        sampling, room = asked.sampling, self._policy.longest - len(asked.ids)
        ids = tuple(_sample_id(key, turn) for key in keys)
        if room >= 1:
            if room < sampling.max_tokens:
                sampling = _shortened(sampling, room)
            return [Request(keys[0].problem, asked.ids, ids, sampling, keep=not asked.last, extends=extends)]
        follows = []
        for key, sample_id in zip(keys, ids, strict=True):
            nothing = Rollout(key.problem, sample_id, asked.ids)
            follows += self._turn_ended(key, nothing) if turn else self._solution_ended(key, nothing)
        return follows

    def _turn(self, rollout: Rollout) -> Turn:
        text = self._policy.chat.response_text(rollout.response, self._policy.stop_ids, rollout.stop_string)
        return Turn(text, len(rollout.response), rollout.finished)

    def _take(self, key: Key, kind: str, line: Line) -> None:
        self._store.append(kind, key.line() | line)
        self._replies.add(key, line, self._reward_name)
        self._replies.ids.pop(key, None)  # they are needed for what was drawn before only
        self._drawn(1)

    def _grade(self, keys: Sequence[Key]) -> None:
        """Of one prompt each; what is refined of them is on its way already, and nobody needs their texts any more."""
        if keys:
            self._book.submit(self._problems[keys[0].problem], keys)
        for key in keys:
            self._replies.forget(key)

    def _grade_refinements(self, solution: Key) -> None:
        self._grade([solution._replace(refinement=number) for number in range(self._amounts.refinements)])


def check_prompts(policy: Policy, problems: Mapping[int, Problem], name: str) -> str | None:
    """A note of how many problems leave no room for an answer, if any do; they count as wrong.

    Raises:
        UserError: none leaves room.
    """
    lengths = [len(policy.chat.prompt_ids(problem.messages)) for problem in problems.values()]
    over = sum(length >= policy.longest for length in lengths)
    if lengths and over == len(lengths):
        raise UserError(f"{name}: no prompt leaves room for an answer in the model's context of {policy.longest}")
    return f"{name}: {over} prompts leave no room for an answer and count as wrong" if over else None


def seed_of(seed: int, set_name: str) -> int:
    """Of the random numbers of a set, whatever other sets there are."""
    return (seed + zlib.crc32(set_name.encode())) % (1 << 31)


@lru_cache
def _shortened(sampling: Sampling, most: int) -> Sampling:
    return replace(sampling, max_tokens=most)


def _sample_id(key: Key, turn: int) -> int:
    number = turn if turn < 1 << _TURN_BITS else 1 + turn % ((1 << _TURN_BITS) - 1)
    number = number << _PROBLEM_BITS | key.problem
    number = number << _SAMPLE_BITS | key.sample
    return number << _REFINEMENT_BITS | max(0, key.refinement)


def _key_of(sample_id: int) -> tuple[Key, int]:
    rest, refinement = divmod(sample_id, MOST_REFINEMENTS)
    rest, sample = divmod(rest, MOST_SAMPLES)
    turn, problem = divmod(rest, MOST_PROBLEMS)
    return Key(problem, sample, refinement if turn else NONE), turn

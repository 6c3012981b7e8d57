"""What is known of each response while an evaluation goes on, and its grades."""

import hashlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from thinktwice_fast.cli.evaluation.store import GRADES, REFINEMENTS, SOLUTIONS, Key, Line, Store
from thinktwice_fast.errors import UserError
from thinktwice_fast.records import Problem, is_right
from thinktwice_fast.run.figures import Response, Solved
from thinktwice_fast.tasks.answers import extract_boxed
from thinktwice_fast.tasks.graders import GRADERS, choice_letter
from thinktwice_fast.tasks.grading import Graders
from thinktwice_fast.tasks.pool import Grading
from thinktwice_fast.tasks.user_reward import split_reward

LOOK_SECONDS = 0.2
"""How often rewards on their way are looked after."""
_HASH_BYTES = 8
Texts = dict[Key, str]
_Waiting = tuple[Sequence[Key], Grading]


@dataclass(slots=True)
class Reply:
    """A solution or refinement, without its text."""

    tokens: int
    finished: bool
    boxed: bool
    vote: str | None
    reward: float | None = None

    def response(self) -> Response:
        """As figures count it."""
        return Response(is_right(self.reward), self.boxed, self.tokens, self.finished, self.vote)


@dataclass
class Replies:
    """The responses of one model to one set, on this process's share of the problems."""

    by_key: dict[Key, Reply] = field(default_factory=dict)
    texts: Texts = field(default_factory=dict)  # of those that are to be graded or refined yet
    ids: dict[Key, Sequence[int]] = field(default_factory=dict)  # token ids of the solutions among them
    graded: set[Key] = field(default_factory=set)

    def add(self, key: Key, line: Line, reward_name: str) -> None:
        """Take in a response as it stands in the store."""
        boxed = extract_boxed(line["text"])
        tokens = len(line["ids"]) if "ids" in line else line["tokens"]
        self.by_key[key] = Reply(tokens, line["finished"], boxed is not None, vote(line["text"], boxed, reward_name))
        self.texts[key] = line["text"]
        if "ids" in line:
            self.ids[key] = line["ids"]

    def forget(self, key: Key) -> None:
        """Let go of a text that nobody needs any more."""
        self.texts.pop(key, None)
        self.ids.pop(key, None)

    def solved(self, problem: int, samples: int, refinements: int) -> list[Solved]:
        """A problem's solutions with their refinements."""
        return [
            Solved(
                self.by_key[Key(problem, sample)].response(),
                tuple(self.by_key[Key(problem, sample, number)].response() for number in range(refinements)),
            )
            for sample in range(samples)
        ]


def vote(text: str, boxed: str | None, reward_name: str) -> str | None:
    """What a response says for the majority: the boxed answer, a letter, or for text graders the text itself."""
    if reward_name == "exact":
        return text.strip()
    if reward_name == "choice":
        return choice_letter(text)
    return None if boxed is None else "".join(boxed.split())


def load_replies(
    store: Store, wanted: Callable[[Key], bool], reward_name: str, asked: Callable[[int], str] | None = None
) -> Replies:
    """What a store holds of the responses that are wanted.

    Args:
        store: to read.
        wanted: which.
        reward_name: that grades them.
        asked: the mark (`mark`) of a problem's prompt; None = not to be looked at.

    Raises:
        UserError: a solution answers another prompt than the problem's now.
    """
    replies = Replies()
    for kind in (SOLUTIONS, REFINEMENTS):
        for line in store.lines(kind):
            key = Key.of(line)
            if not wanted(key):
                continue
            if asked is not None and line.get("asked", asked(key.problem)) != asked(key.problem):
                raise UserError(
                    f"{store.folder}: problem {key.problem} (from 0) was another, or asked in another way, when its "
                    "solutions were drawn",
                    "give another --output",
                    "give the problems, instruction and chat template of then",
                )
            replies.add(key, line, reward_name)
    grader = grader_name(reward_name)
    for line in store.lines(GRADES):
        key = Key.of(line)
        if line["grader"] == grader and key in replies.by_key:
            replies.by_key[key].reward = line["reward"]
            replies.graded.add(key)
    return replies


def mark(prompt: Sequence[int]) -> str:
    """A hash of a prompt's token ids."""
    text = " ".join(map(str, prompt))
    return hashlib.blake2b(text.encode(), digest_size=_HASH_BYTES).hexdigest()


def grader_name(reward: str) -> str:
    """What grades are stored under: of a user's function with a hash of its file, so that a changed one counts."""
    if reward in GRADERS:
        return reward
    content = Path(split_reward(reward)[0]).read_bytes()
    return f"{reward}@{hashlib.blake2b(content, digest_size=_HASH_BYTES).hexdigest()}"


class GradeBook:
    """Has responses graded, and writes the grades as they come.

    A user's function sees the question as the prompt, of refinements too, so that it grades again what it never saw
    being drawn.

    Args:
        graders: that grade.
        store: of the responses.
        replies: whose rewards it sets.
        reward_name: of the set.
    """

    def __init__(self, graders: Graders, store: Store, replies: Replies, reward_name: str):
        self._graders = graders
        self._store = store
        self._replies = replies
        self._grader = grader_name(reward_name)
        self._waiting: list[_Waiting] = []
        self._next_look = 0.0

    def submit(self, problem: Problem, keys: Sequence[Key]) -> None:
        """Have those graded together that are not graded yet."""
        new = [key for key in keys if key not in self._replies.graded]
        if new:
            texts = [self._replies.texts[key] for key in new]
            self._waiting.append((new, self._graders.submit(problem, problem.messages, texts)))

    def look(self) -> None:
        """Write what has been graded since; cheap, to be called again and again.

        Raises:
            UserError: grading failed.
        """
        if time.monotonic() < self._next_look:
            return
        self._next_look = time.monotonic() + LOOK_SECONDS
        self._graders.look()
        ready: list[_Waiting] = []
        waiting: list[_Waiting] = []
        for pair in self._waiting:
            (ready if pair[1].done() else waiting).append(pair)
        self._waiting = waiting
        self._write(ready)

    def finish(self) -> None:
        """Wait for the rest.

        Raises:
            UserError: grading failed.
        """
        self._write(self._waiting)
        self._waiting = []

    def _write(self, gradings: Sequence[_Waiting]) -> None:
        lines: list[Line] = []
        for keys, grading in gradings:
            for key, reward in zip(keys, grading.result(), strict=True):
                self._replies.by_key[key].reward = reward
                self._replies.graded.add(key)
                lines.append({**key.line(), "reward": reward, "grader": self._grader})
        if lines:
            self._store.append(GRADES, *lines)

"""What comes after a solution: the turns of every mode, each a request that goes on from the one before.

But for `two_pass`, which is what ThinkTwice trains, they refine by prompts alone: Self-Refine (arXiv 2303.17651),
Reflexion (2303.11366), self-verification and self-correction (2310.01798), and s1's budget forcing (2501.19393). The
words are our own.
"""

import re
from bisect import bisect_right
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

from thinktwice_fast.records import Message, Sampling
from thinktwice_fast.tasks.prompts import ChatFormat

_END = "End with the final answer, given in the form that the question asks for."
_AGAIN = f"Now solve the problem once more from the beginning, and heed what you have just said. {_END}"
PROMPTS: dict[str, tuple[str, ...]] = {
    "self_refine": (
        "Now be the reviewer of your answer above. Go through it step by step; of each step say whether it holds, "
        "what could be better, and how. Do not write a new solution yet.",
        f"Write an improved solution that takes up every point of your review. {_END}",
    ),
    "reflexion": (
        "Suppose that your answer above failed its check. Reflect on it in a few sentences: what has most likely gone "
        "wrong, and what will you do differently? Do not solve the problem again yet.",
        _AGAIN,
    ),
    "self_verify": (
        "Check your answer above in another way than you found it: put it back into the question, or derive it anew. "
        "The last line of your check must be either 'Verdict: correct' or 'Verdict: incorrect'.",
        _AGAIN,
    ),
    "self_correct": (
        "Look for mistakes in your answer above and list those that you find.",
        f"Correct the answer accordingly; if you found no mistake, give it again. {_END}",
    ),
}
"""The user messages after a solution, by mode."""

CONTINUATION = " Wait,"
"""What s1 puts in the place of the end of a thought."""
ANSWER_PREFIX = "\n\nFinal answer: \\boxed{"
"""What s1 puts in front of the answer."""

_VERDICT = re.compile(r"verdict\W*(correct|incorrect)\b", re.IGNORECASE)
_THINK, _END_OF_THINK = "<think>", "</think>"


@dataclass(frozen=True)
class Turn:
    """A response of a chain."""

    text: str
    tokens: int  # drawn
    finished: bool  # False = cut off


@dataclass(frozen=True)
class Asked:
    """What the next turn answers, and how it is drawn."""

    messages: tuple[Message, ...]
    ids: tuple[int, ...]  # the same as token ids, and what a response has to begin with
    sampling: Sampling
    last: bool  # of the chain, whatever is said
    forced: str = ""  # text at the end of ``ids`` that is the response's own


@dataclass
class Chain:
    """A solution and the turns after it so far; the last of them is to be continued."""

    asked: Asked
    response: Sequence[int]  # token ids of the latest turn
    solution: Turn
    turns: list[Turn] = field(default_factory=list)

    @property
    def latest(self) -> Turn:
        """The turn that the next one follows."""
        return self.turns[-1] if self.turns else self.solution


class Mode(Protocol):
    """A way to go on after a solution."""

    def next(self, chain: Chain) -> Asked | None:
        """What is asked after the latest turn; None: nothing is."""
        ...

    def answer(self, chain: Chain) -> str:
        """The text that is graded when nothing more is asked."""
        ...

    def longest(self, prompt: int, messages: Sequence[Message]) -> int:
        """Tokens that a chain may take whose first prompt takes ``prompt``, responses included."""
        ...


@dataclass(frozen=True)
class Dialogue:
    """User messages after the solution, one after another."""

    chat: ChatFormat
    stop_ids: Collection[int]
    instructions: tuple[str, ...]
    solve: Sampling
    sampling: Sampling  # of all turns after the solution
    verdict: bool = False  # the first turn may find that the solution stands

    def next(self, chain: Chain) -> Asked | None:
        """The next user message, with the whole chat so far."""
        done = len(chain.turns)
        if done == len(self.instructions) or (done and self._stands(chain)):
            return None
        asked, latest = chain.asked, chain.latest
        prompt = self.chat.refine(
            asked.messages, asked.ids, chain.response, latest.text, self.instructions[done], self.stop_ids
        )
        return Asked(prompt.messages, prompt.ids, self.sampling, done + 1 == len(self.instructions))

    def answer(self, chain: Chain) -> str:
        """The last turn's, or the solution's where that stands."""
        return chain.solution.text if self._stands(chain) else chain.latest.text

    def longest(self, prompt: int, messages: Sequence[Message]) -> int:
        """A response that thinks may be quoted beside its answer."""
        quoted = 2 if self.chat.thinks else 1
        ids = self.chat.prompt_ids(messages)
        between = [
            len(self.chat.refine(messages, ids, (), "", instruction, self.stop_ids).ids) - len(ids)
            for instruction in self.instructions
        ]
        turns = (self.solve, *(self.sampling for _ in self.instructions))
        return prompt + sum(between) + sum(quoted * turn.max_tokens for turn in turns[:-1]) + turns[-1].max_tokens

    def _stands(self, chain: Chain) -> bool:
        if not self.verdict or len(chain.turns) != 1:
            return False
        said = _VERDICT.findall(chain.turns[0].text)
        return not said or said[-1].lower() == "correct"


@dataclass(frozen=True)
class BudgetForcing:
    """s1: thinking goes on until the solution's longest length is spent, then the answer is asked for.

    Where the model ends its thought, or a response without thoughts, before that, the end is taken out and
    `CONTINUATION` put in its place. What is put in counts as spent.
    """

    chat: ChatFormat
    stop_ids: Collection[int]
    solve: Sampling  # its longest length is the budget
    final: Sampling  # of the answer
    context: int | None = None  # tokens that the whole may take; thinking is cut where it leaves no room for the answer

    def next(self, chain: Chain) -> Asked | None:
        """The chat so far with `CONTINUATION` or, once the budget is spent, `ANSWER_PREFIX`."""
        if chain.turns and chain.asked.last:
            return None
        question = self._question(chain)
        thinks = self._thinks(chain, question)
        kept = self._without_end(chain.response, thinks)
        thought = (*chain.asked.ids, *kept)
        prefix = (_END_OF_THINK if thinks else "") + ANSWER_PREFIX
        closing = tuple(self.chat.encode(prefix))
        most = question + self.solve.max_tokens
        if self.context is not None:
            most = min(most, max(question, self.context - len(closing) - self.final.max_tokens))
        word = tuple(self.chat.encode(CONTINUATION))
        left = most - len(thought) - len(word)
        if left > 0:
            stops = (_END_OF_THINK,) if thinks else ()
            sampling = replace(self.solve, max_tokens=left, stop_strings=stops)
            return Asked(chain.asked.messages, (*thought, *word), sampling, False, CONTINUATION)
        return Asked(chain.asked.messages, (*thought[:most], *closing), self.final, True, prefix)

    def answer(self, chain: Chain) -> str:
        """The forced answer."""
        return chain.latest.text

    def longest(self, prompt: int, messages: Sequence[Message]) -> int:
        """The budget, what is put in before the answer, and the answer."""
        prefix = len(self.chat.encode(_END_OF_THINK + ANSWER_PREFIX))
        return prompt + self.solve.max_tokens + prefix + self.final.max_tokens

    def _question(self, chain: Chain) -> int:
        """Tokens of the question's prompt, which every later one begins with."""
        return len(self.chat.prompt_ids(chain.asked.messages))

    def _thinks(self, chain: Chain, question: int) -> bool:
        if not self.chat.thinks:
            return False
        opening = chain.asked.ids[max(0, question - 8) :]
        return _THINK in self.chat.response_text((*opening, *chain.response), ())

    def _without_end(self, response: Sequence[int], thinks: bool) -> Sequence[int]:
        ids = list(response)
        if ids and ids[-1] in self.stop_ids:
            ids.pop()
        before, ended, _ = self.chat.response_text(ids, ()).partition(_END_OF_THINK)
        if not thinks or not ended:
            return ids
        lengths = range(len(ids) + 1)
        within = bisect_right(lengths, len(before), key=lambda count: len(self.chat.response_text(ids[:count], ())))
        return ids[: within - 1]


def make_mode(
    name: str,
    chat: ChatFormat,
    stop_ids: Collection[int],
    refine_instruction: str,
    solve: Sampling,
    refine: Sampling,
    context: int | None,
) -> Mode:
    """The mode of a name: ``two_pass``, one of `PROMPTS`, or ``s1``.

    Args:
        name: of the mode.
        chat: of the model.
        stop_ids: of the model.
        refine_instruction: of ``two_pass``.
        solve: how solutions are drawn.
        refine: how what follows them is drawn.
        context: of the model; None = without end.
    """
    if name == "s1":
        return BudgetForcing(chat, stop_ids, solve, refine, context)
    instructions = (refine_instruction,) if name == "two_pass" else PROMPTS[name]
    return Dialogue(chat, stop_ids, instructions, solve, refine, verdict=name == "self_verify")

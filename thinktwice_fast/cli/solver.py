"""Solve problems, then let the model refine its own solutions: what a trained model is for.

    from thinktwice_fast.cli.solver import Solver

    solver = Solver("runs/tiny/model")
    for answer in solver.solve(["8-8+5+6-9", "1+2+3+4+5"]):
        print(answer.solution.text, answer.turns[-1].boxed)

    for piece in solver.stream(["8-8+5+6-9"]):
        print(piece.text, end="", flush=True)

The command ``thinktwice-fast solve`` does the same (``solve.py``).
"""

import re
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from typing import Any

from thinktwice_fast.cli.inference import Inference
from thinktwice_fast.cli.options import ModelChoice
from thinktwice_fast.errors import UserError
from thinktwice_fast.model.policy import context_length
from thinktwice_fast.records import Message, Request, Rollout, Sampling
from thinktwice_fast.rollout.prefix_cache import Counts
from thinktwice_fast.tasks.answers import extract_boxed
from thinktwice_fast.tasks.arithmetic import running_totals
from thinktwice_fast.tasks.prompts import RefinePrompt
from thinktwice_fast.tasks.text_stream import TextStream

GREEDY = Sampling(temperature=0.0, max_tokens=2048)
_TERMS = 5  # of the arithmetic that the shipped model knows
_SUM = re.compile(r"\d+(?:\s*[-+]\s*\d+)+")


@dataclass(frozen=True)
class Turn:
    """A solution or a refinement."""

    text: str
    boxed: str | None  # content of the last \\boxed{}
    tokens: int  # stop token included
    finished: bool  # False = cut off at the longest response


@dataclass(frozen=True)
class Answer:
    """What the model made of a problem."""

    question: str
    turns: tuple[Turn, ...]  # the solution, then its refinements

    @property
    def solution(self) -> Turn:
        """The first pass."""
        return self.turns[0]


@dataclass(frozen=True)
class Piece:
    """Text as it is sampled; joined, the pieces of a turn are its text."""

    problem: int  # place among the questions
    turn: int  # 0 = solution, n = n-th refinement
    text: str
    ended: Turn | None  # the whole turn, with its last piece


@dataclass
class _Work:
    """A problem on its way through the passes."""

    number: int
    messages: Sequence[Message]  # of the turn under way: the question, then the chat so far
    prompt: tuple[int, ...]
    most: int  # tokens that a prompt and its response may take together
    sampling: Sampling
    stream: TextStream
    turns: list[Turn] = field(default_factory=list)

    def request(self, passes: int, extends: Rollout | None = None) -> Request:
        turn = len(self.turns)
        if len(self.prompt) >= self.most:
            raise UserError(
                f"the prompt of refinement {turn} takes {len(self.prompt)} tokens and leaves no room for a response",
                "lower --max_tokens or --passes",
            )
        sampling = replace(self.sampling, max_tokens=min(self.sampling.max_tokens, self.most - len(self.prompt)))
        ids = ((turn << 32) + self.number,)
        return Request(self.number, self.prompt, ids, sampling, keep=turn < passes, extends=extends)


class Solver:
    """A model that solves and refines.

    Args:
        model: folder in transformers format, hub name, or "tiny" for the shipped model.
        chat_template: file with a Jinja chat template, for a tokenizer that has none.
        chat_template_args: variables for it.
        strip_default_system: leave out the system block that it writes by itself.
        refine_instruction: the user message after a solution, or a .txt or .md file with it; "default" = the
            task-agnostic one that training takes.
        device: "auto", "cpu" or "cuda".
        dtype: "auto" (bfloat16 on a GPU, float32 on the CPU), "float32" or "bfloat16".
        max_sequences: problems worked on at once.

    Raises:
        UserError: no such model, or none that works here.
    """

    def __init__(
        self,
        model: str = "tiny",
        *,
        chat_template: str | None = None,
        chat_template_args: dict[str, Any] | None = None,
        strip_default_system: bool = False,
        refine_instruction: str = "default",
        device: str = "auto",
        dtype: str = "auto",
        max_sequences: int = 16,
    ):
        names: Any = {"device": device, "dtype": dtype}
        choice = ModelChoice(model, chat_template, chat_template_args or {}, strip_default_system, **names)
        self._inference = Inference(choice)
        self._chat, self._stop_ids = self._inference.chat, self._inference.stop_ids
        self._max_sequences = max_sequences
        self._arithmetic = self._inference.arithmetic
        self._instruction = self._inference.refine_instruction(refine_instruction)
        self.counts = Counts()  # of the last call: how many refinements extended their solution's cache

    def solve(
        self,
        questions: Sequence[str | Sequence[Message]],
        *,
        passes: int = 1,
        sampling: Sampling = GREEDY,
        seed: int = 0,
    ) -> list[Answer]:
        """An answer to each question; see ``stream``."""
        turns: list[list[Turn]] = [[] for _ in questions]
        for piece in self.stream(questions, passes=passes, sampling=sampling, seed=seed):
            if piece.ended is not None:
                turns[piece.problem].append(piece.ended)
        return [Answer(question_text(question), tuple(done)) for question, done in zip(questions, turns, strict=True)]

    def stream(
        self,
        questions: Sequence[str | Sequence[Message]],
        *,
        passes: int = 1,
        sampling: Sampling = GREEDY,
        seed: int = 0,
    ) -> Iterator[Piece]:
        """Text of all turns of all problems as it is sampled; problems are worked on beside each other.

        A refinement begins when what it refines has ended, and with its cache, where the chat template lets the refine
        prompt continue it token for token. The n-th refinement sees the whole chat before it, with the tokens that a
        stop string cut off the shown text.

        Args:
            questions: each a text, or chat messages that end with the question.
            passes: refinements of each solution.
            sampling: of every turn; ``max_tokens`` is less where the model's context leaves less.
            seed: of the random numbers; an answer does not depend on the other questions, but on its place.

        Raises:
            UserError: a question that leaves no room for a response, or that the chat template refuses; to the shipped
                model anything but a sum of one-digit numbers.
        """
        works = [self._work(number, question, passes, sampling) for number, question in enumerate(questions)]
        if not works:
            return
        sequences = min(self._max_sequences, len(works))
        engine = self._inference.engine(sequences, max(work.most for work in works))
        self.counts = engine.counts

        def refinement(rollout: Rollout) -> list[Request]:
            work = works[rollout.group]
            if len(work.turns) > passes:
                return []
            self._begin_refinement(work, rollout)
            return [work.request(passes, extends=rollout)]

        with closing(engine.stream([work.request(passes) for work in works], refinement, seed=seed)) as grown:
            for rollout in grown:
                work = works[rollout.group]
                number = len(work.turns)
                text = work.stream.text(rollout.response, rollout.ended, rollout.stop_string)
                if rollout.ended:
                    work.turns.append(self._turn(rollout))
                if text or rollout.ended:
                    yield Piece(work.number, number, text, work.turns[-1] if rollout.ended else None)

    def _work(self, number: int, question: str | Sequence[Message], passes: int, sampling: Sampling) -> _Work:
        messages = [{"role": "user", "content": question}] if isinstance(question, str) else list(question)
        if self._arithmetic:
            messages[-1] = {"role": "user", "content": arithmetic_question(messages[-1]["content"])}
        prompt = tuple(self._chat.prompt_ids(messages))
        refine = self._refine(messages, prompt, (), "")
        beside = len(prompt) + passes * (len(refine.ids) - len(prompt))
        # Twice what it should take: where a template makes earlier turns be tokenised anew, they may grow.
        most = 2 * (beside + (passes + 1) * sampling.max_tokens)
        context = context_length(self._inference.model)
        if context is not None and most > context:
            most = context
            left = (context - beside) // (passes + 1)
            sampling = replace(sampling, max_tokens=min(sampling.max_tokens, left))
        if sampling.max_tokens < 1:
            raise UserError(
                f"problem {number + 1} takes {beside} tokens with the instructions to refine and leaves no room for "
                f"{passes + 1} responses in the model's context of {context}",
                "shorten it",
                "lower --passes",
            )
        return _Work(number, messages, prompt, most, sampling, self._text_stream(sampling))

    def _turn(self, rollout: Rollout) -> Turn:
        text = self._chat.response_text(rollout.response, self._stop_ids, rollout.stop_string)
        return Turn(text, extract_boxed(text), len(rollout.response), rollout.finished)

    def _begin_refinement(self, work: _Work, rollout: Rollout) -> None:
        refine = self._refine(work.messages, work.prompt, rollout.response, work.turns[-1].text)
        work.messages, work.prompt = refine.messages, refine.ids
        work.stream = self._text_stream(work.sampling)

    def _refine(
        self, messages: Sequence[Message], prompt: Sequence[int], response: Sequence[int], text: str
    ) -> RefinePrompt:
        return self._chat.refine(messages, prompt, response, text, self._instruction, self._stop_ids)

    def _text_stream(self, sampling: Sampling) -> TextStream:
        return TextStream(self._chat, self._stop_ids, sampling.stop_strings)


def arithmetic_question(text: str) -> str:
    """The sum in a text, in the form that the shipped model knows: ``What is 3 + 4 - 2?`` -> ``3+4-2+0+0``.

    Raises:
        UserError: no sum, several, or one beyond what the model has learned.
    """
    sums = [re.sub(r"\s", "", match) for match in _SUM.findall(text)]
    terms = re.split("[-+]", sums[0]) if len(sums) == 1 else []
    one_digit = all(len(term) == 1 for term in terms)
    if not 2 <= len(terms) <= _TERMS or not one_digit or min(running_totals(sums[0])) < 0:
        raise UserError(
            f"the shipped model knows only sums of up to {_TERMS} one-digit numbers that never fall below 0, such as "
            f"8-8+5+6-9, not {text!r}",
            "ask one",
            "give another model with --model",
        )
    return sums[0] + "+0" * (_TERMS - len(terms))


def question_text(question: str | Sequence[Message]) -> str:
    """What is asked: the text, or the last message of a chat."""
    return question if isinstance(question, str) else question[-1]["content"]

"""What every teacher is to the algorithm, and the teachers that are models sampled here."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from thinktwice_fast.algorithms.thinktuning.feedback import Refusal
from thinktwice_fast.algorithms.thinktuning.prompt import TeacherPrompt, shared_prefix, teacher_ids
from thinktwice_fast.records import Request, Rollout, Sampling
from thinktwice_fast.rollout.engine import Engine
from thinktwice_fast.tasks.prompts import ChatFormat
from thinktwice_fast.thinktuning_options import ThinkTuningOptions

_LEAST_SHARED = 16  # tokens, from which on a common prefix is worth a request of its own


@dataclass(frozen=True)
class FeedbackRequest:
    """What a teacher is shown; the gold answer is not among it."""

    question: str
    response: str
    behaviour: int | None = None  # place of the shot that it is to follow; None = it chooses


@dataclass(frozen=True)
class Answer:
    """What came back."""

    text: str = ""
    refusal: Refusal | None = None  # why there is no text
    detail: str = ""  # the same in words, where a request failed


class Teacher(Protocol):
    """Gives feedback on responses."""

    def ask(self, asked: Sequence[FeedbackRequest]) -> list[Answer]:
        """One answer each, in order. A request that fails is an answer too; it ends no run."""
        ...


@dataclass(frozen=True)
class SampledModel:
    """A model that can be sampled from here, with its tokenizer."""

    engine: Engine
    chat: ChatFormat
    stop_ids: frozenset[int]
    version: int  # of its weights


class ModelTeacher:
    """A model sampled greedily, all requests of a step in one batch.

    Args:
        sampled: gives the model as it is now.
        prompt: what it reads.
        options: how long prompts and answers may be.
    """

    def __init__(self, sampled: Callable[[], SampledModel], prompt: TeacherPrompt, options: ThinkTuningOptions):
        self._sampled = sampled
        self._prompt = prompt
        self._options = options

    def ask(self, asked: Sequence[FeedbackRequest]) -> list[Answer]:
        """See ``Teacher``.

        Raises:
            UserError: the model's logits are not finite, or the cache can't hold a prompt with its answer.
        """
        if not asked:
            return []
        sampled, limit = self._sampled(), self._options.teacher_prompt_tokens
        chats = [self._prompt.messages(one.question, one.response, one.behaviour) for one in asked]
        prompts = [teacher_ids(sampled.chat, messages, limit) for messages in chats]
        rollouts = answer_prompts(sampled.engine, prompts, self._options.teacher_answer_tokens, sampled.version)
        return [_answer(sampled, rollout) for rollout in rollouts]


def answer_prompts(
    engine: Engine, prompts: Sequence[tuple[int, ...]], max_tokens: int, version: int = 0
) -> list[Rollout]:
    """A greedy response to each prompt, in order; what all begin with is computed once.

    Args:
        engine: free of other work.
        prompts: token ids, at least one of each.
        max_tokens: of each response.
        version: of the engine's weights.

    Raises:
        UserError: as ``Engine.run``.
    """
    sampling = Sampling(temperature=0.0, max_tokens=max_tokens)
    common = len(prompts)  # as a prompt's number: none of theirs

    def requests(prefix: Rollout | None) -> list[Request]:
        return [
            Request(number, prompt, (number,), sampling, extends=prefix, shares=prefix is not None)
            for number, prompt in enumerate(prompts)
        ]

    def ended(rollout: Rollout) -> Sequence[Request]:
        return requests(rollout) if rollout.group == common else ()

    first = requests(None)
    shared = shared_prefix(prompts)
    if len(prompts) > 1 and len(shared) >= _LEAST_SHARED:
        # It draws a token that nobody reads, and its cache stays for all.
        first = [Request(common, shared, (common,), Sampling(temperature=0.0, max_tokens=1), keep=True)]
    try:
        rollouts = engine.run(first, ended, seed=0, version=version)
    finally:
        engine.release_prefixes()
    return sorted((rollout for rollout in rollouts if rollout.group < common), key=_number)


def _answer(sampled: SampledModel, rollout: Rollout) -> Answer:
    if not rollout.finished:
        return Answer(refusal="unfinished")
    return Answer(sampled.chat.response_text(rollout.response, sampled.stop_ids))


def _number(rollout: Rollout) -> int:
    return rollout.group

"""What flows through a step, as plain data: problems, requests to the rollout engine, rollouts, groups of them."""

from dataclasses import dataclass, field
from typing import Any

from thinktwice_fast.errors import UserError

Message = dict[str, str]  # {"role": ..., "content": ...}, as chat templates take it


def is_right(reward: float | None) -> bool:
    """Whether a response with this reward counts as a right one; without one it does not."""
    return reward is not None and reward >= 1


@dataclass(frozen=True)
class Problem:
    """What is asked, and what a grader needs to judge an answer: one row of a problem source."""

    index: int  # its number in the source, from 0
    messages: tuple[Message, ...]  # the question as a chat, without the answer
    answer: str  # the gold answer that the reward compares with
    target: str | None = None  # a full worked response, where the source has one (needed by SFT)
    columns: dict[str, Any] = field(default_factory=dict)  # every column of the row, for user rewards
    reward: str | None = None  # how to grade it, of its evaluation set; None = as the run does

    @property
    def question(self) -> str:
        """The text of the last user message."""
        return self.messages[-1]["content"]


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn. ``temperature`` 0 is greedy; ``top_k`` 0, ``top_p`` 1 and ``min_p`` 0 are off."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    max_tokens: int = 64  # longest response, stop token included
    stop_strings: tuple[str, ...] = ()  # a response ends with the token that completes one of them

    def __post_init__(self) -> None:
        if "" in self.stop_strings:
            raise UserError("stop_strings: an empty string would end every response at once: leave it out")


@dataclass
class Rollout:
    """One sampled response, from its birth in the engine to the loss."""

    group: int
    sample_id: int
    prompt: tuple[int, ...]  # token ids
    response: list[int] = field(default_factory=list)  # token ids as sampled, stop token included
    logps: list[float] = field(default_factory=list)  # of each response token, under the sampling temperature
    entropies: list[float] = field(default_factory=list)  # nats, of the distribution each token was drawn from
    finished: bool = False  # ended by a stop token or string; False = cut off at max_tokens, or not ended yet
    stop_string: str | None = None  # the one that ended it
    text: str = ""  # the response decoded, without stop token or string; for graders and transcripts
    reward: float | None = None  # None: the reward function left this sample out
    advantage: float = 0.0
    ended: bool = False  # nothing more will be drawn: a stop token or string came, or max_tokens were drawn
    cached: int | None = None  # name of its cache, where that is kept for a request that extends it (`Request.keep`)
    guide: list[bool] = field(default_factory=list)  # which response tokens a teacher wrote (logp 0); empty = none

    @property
    def sampled(self) -> int:
        """Response tokens that the policy drew."""
        return len(self.response) - sum(self.guide)


@dataclass(frozen=True)
class Request:
    """One prompt and how many samples to draw of it; the samples share the prompt's cache."""

    group: int  # the caller's own number for this prompt, returned with every rollout
    prompt: tuple[int, ...]  # token ids
    sample_ids: tuple[int, ...]  # one per sample: with the seed and the position they key its random numbers
    sampling: Sampling
    keep: bool = False  # keep each rollout's cache when it ends, while there is room, to be extended
    extends: Rollout | None = None  # a kept rollout whose prompt and response this prompt continues
    shares: bool = False  # ... and leaves its cache to others that extend it too


@dataclass(frozen=True)
class Base:
    """A solution that a refine group starts from, written before the update that follows it."""

    response: tuple[int, ...]  # token ids as sampled
    text: str
    reward: float | None

    @classmethod
    def of(cls, rollout: Rollout) -> "Base":
        """A rollout as the base of a refinement."""
        return cls(tuple(rollout.response), rollout.text, rollout.reward)


@dataclass
class Group:
    """What a GRPO advantage is taken over: samples that share one prompt."""

    slot: int  # number of the problem within the step, over all processes
    problem: Problem
    messages: tuple[Message, ...]  # what the samples answer: the problem's, or its refine chat
    prompt: tuple[int, ...]  # the same as token ids
    base: Base | None = None  # of a refine group
    rollouts: list[Rollout] = field(default_factory=list)  # in the order of their sample ids

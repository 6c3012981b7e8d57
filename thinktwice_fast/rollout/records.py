"""What is asked of the rollout engine, and what comes back: token ids from birth to loss."""

from dataclasses import dataclass, field

from thinktwice_fast.errors import UserError


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


@dataclass(frozen=True)
class Request:
    """One prompt and how many samples to draw of it; the samples share the prompt's cache."""

    group: int  # the caller's own number for this prompt, returned with every rollout
    prompt: tuple[int, ...]  # token ids
    sample_ids: tuple[int, ...]  # one per sample: with the seed and the position they key its random numbers
    sampling: Sampling
    keep: bool = False  # keep each rollout's cache when it ends, while there is room, to be extended once
    extends: Rollout | None = None  # a kept rollout whose prompt and response this prompt continues

"""What one step of decoding works on: sequences, and what of them goes into the cache; plain data."""

from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

import torch

from thinktwice_fast.model.paged import Plan
from thinktwice_fast.records import Rollout, Sampling


@dataclass(eq=False)
class Sequence:
    """Tokens in the cache, or on their way into it.

    A prompt is one sequence with all the samples of its request; once its last token is in, it forks into one sequence
    per sample.
    """

    pending: list[int]  # token ids not in the cache yet
    samples: list[Rollout]  # that continue it; one, but for a prompt that has not forked yet
    sampling: Sampling
    keep: bool = False  # keep the cache when the sample ends
    handle: int | None = None  # in the cache; None = not admitted
    extends: Rollout | None = None  # whose kept cache it will begin with, once admitted
    shares: bool = False  # ... with a copy of it

    @property
    def cached(self) -> int:
        """Its handle in the cache, where it has one."""
        assert self.handle is not None
        return self.handle


@dataclass(frozen=True)
class Batch:
    """One step: of each sequence the first ``counts`` pending tokens, with their places reserved.

    The sequences whose last pending token is among them are *ready*: each of their samples draws.
    """

    sequences: list[Sequence]
    counts: list[int]
    plan: Plan
    seed: int  # of the random numbers
    stop_ids: torch.Tensor  # int64, tokens that end a sample
    others_wait: bool  # for a place that a sample's end gives free

    @cached_property
    def ready(self) -> list[Sequence]:
        """In the batch's order."""
        pairs = zip(self.sequences, self.counts, strict=True)
        return [sequence for sequence, count in pairs if count == len(sequence.pending)]

    @cached_property
    def samples(self) -> list[Rollout]:
        """Those of ready sequences, which draw."""
        return [sample for sequence in self.ready for sample in sequence.samples]

    @cached_property
    def samplings(self) -> list[Sampling]:
        """How each of them draws."""
        return [sequence.sampling for sequence in self.ready for _ in sequence.samples]

    @property
    def decodes(self) -> bool:
        """Whether each sequence has one sample and brings one token, its last."""
        return all(len(sequence.pending) == len(sequence.samples) == 1 for sequence in self.sequences)

    @property
    def tokens(self) -> list[int]:
        """Token ids of the forward pass, sequence after sequence."""
        pairs = zip(self.sequences, self.counts, strict=True)
        return [token for sequence, count in pairs for token in sequence.pending[:count]]

    @property
    def last_rows(self) -> list[int]:
        """Of those the last of each ready sequence, ascending."""
        triples = zip(accumulate(self.counts), self.sequences, self.counts, strict=True)
        return [end - 1 for end, sequence, count in triples if count == len(sequence.pending)]


@dataclass(frozen=True)
class NewTokens:
    """What each of a batch's ``samples`` drew, a token or more."""

    tokens: list[list[int]]
    logps: list[list[float]]  # nats, under the sampling temperature
    entropies: list[list[float]]  # nats, of the distribution that each token was drawn from

"""One step of decoding: what every runner offers, and the draw from logits that most of them end with.

Letters: V vocabulary, D samples that draw.
"""

from abc import ABC, abstractmethod

import torch

from thinktwice_fast.errors import Option, UserError
from thinktwice_fast.model.csrc import Sampled, sample
from thinktwice_fast.model.lists import float32, int64, upload
from thinktwice_fast.model.paged import Plan
from thinktwice_fast.rollout.batch import Batch, NewTokens
from thinktwice_kernels import token_logprobs


def not_finite() -> UserError:
    """What to raise for logits that no token can be drawn from."""
    return UserError(
        "the model's logits are not finite",
        ("lower ", Option("update.learning_rate")),
        ("compute with ", Option("model.compute_dtype", "float32")),
    )


class Runner(ABC):
    """Runs the model over the paged cache."""

    exact = False  # log-probabilities are those of training, bit for bit

    def refresh(self) -> None:  # noqa: B027 (most read the weights where they are)
        """The weights may have changed."""

    @abstractmethod
    def logits(self, tokens: list[int], plan: Plan, last: list[int]) -> torch.Tensor:  # float32 [len(last), V]
        """Put the plan's tokens into the cache; the logits of rows ``last``, ascending."""

    def step(self, batch: Batch, most: int) -> NewTokens:
        """Put the batch's tokens into the cache and draw for the sequences that are ready.

        Args:
            batch: with places reserved for its tokens.
            most: tokens that may be drawn for each, where the runner draws several at once and blocks are free for
                them; all but the last are then in the cache too.

        Raises:
            UserError: logits are not finite.
        """
        return sample_tokens(self.logits(batch.tokens, batch.plan, batch.last_rows), batch, exact=self.exact)


def sample_tokens(
    logits: torch.Tensor,  # float32 [ready sequences, V]
    batch: Batch,
    *,
    exact: bool = False,
) -> NewTokens:
    """A token for each of the batch's samples.

    Args:
        logits: of the last token of each ready sequence.
        batch: says who draws, and how.
        exact: log-probabilities rounded as training's are.
    """
    if not batch.ready:
        return NewTokens([], [], [])
    if len(batch.samples) > len(batch.ready):
        own = int64([row for row, sequence in enumerate(batch.ready) for _ in sequence.samples])
        (rows,) = upload([own], logits.device)
        logits = logits[rows]
    sampled = _sampled(logits, batch)
    logps = _training_logps(logits, sampled.tokens, batch) if exact else sampled.raw_logps
    columns = (sampled.tokens, logps, sampled.entropies)
    return NewTokens(*([[value] for value in column.tolist()] for column in columns))


def random_keys(batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """What, with the seed, keys each draw's random numbers: int64 [D] sample ids and int64 [D] positions; on the CPU"""
    samples = batch.samples
    return int64([sample.sample_id for sample in samples]), int64([len(sample.response) for sample in samples])


def sampling_columns(batch: Batch) -> tuple[torch.Tensor, ...]:
    """Temperature, top-k, top-p and min-p of each draw, [D] each, as `csrc.sample` takes them; on the CPU."""
    samplings = batch.samplings
    return (
        float32([sampling.temperature for sampling in samplings]),
        torch.tensor([sampling.top_k for sampling in samplings], dtype=torch.int32, device="cpu"),
        float32([sampling.top_p for sampling in samplings]),
        float32([sampling.min_p for sampling in samplings]),
    )


def _sampled(logits: torch.Tensor, batch: Batch) -> Sampled:  # [D, V]
    *columns, sample_ids, positions = upload([*sampling_columns(batch), *random_keys(batch)], logits.device)
    try:
        return sample(logits, *columns, seed=batch.seed, sample_ids=sample_ids, positions=positions)
    except RuntimeError as error:
        if torch.isfinite(logits).all():
            raise
        raise not_finite() from error


def _training_logps(logits: torch.Tensor, tokens: torch.Tensor, batch: Batch) -> torch.Tensor:  # [D, V], [D] -> [D]
    """The same numbers up to rounding as the sampler's, rounded as training's are."""
    temperatures = float32([sampling.temperature or 1.0 for sampling in batch.samplings])
    return token_logprobs(logits, tokens, temperature=temperatures.to(logits.device))

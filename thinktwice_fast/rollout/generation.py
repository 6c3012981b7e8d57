"""One generation: rollouts drawn pass by pass, while requests come and go."""

import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import accumulate

import torch

from thinktwice_fast.errors import UserError
from thinktwice_fast.model.csrc import Sampled, sample
from thinktwice_fast.model.lists import int64, upload
from thinktwice_fast.rollout.records import Request, Rollout
from thinktwice_fast.rollout.runner import DecoderRunner, Runner
from thinktwice_fast.rollout.scheduler import Batch, Lane, Scheduler
from thinktwice_kernels import token_logprobs

STEPS_AT_ONCE = 8  # tokens that the C++ decoder draws for each sequence before it reports
_TOKENS_BEFORE = 4  # that a stop string's tokens are decoded with
NOT_FINITE = "the model's logits are not finite: lower --update.learning_rate"

Decode = Callable[[Sequence[int]], str]  # token ids to text


class Generation(Iterator[Rollout]):
    """Rollouts as they end; made by ``Engine.generate``.

    Requests may be added between any two rollouts, and also once all have ended: iteration goes on then. ``close`` ends
    it early; a generation that nothing refers to any more frees its part of the cache too.
    """

    def __init__(
        self, runner: Runner, scheduler: Scheduler, stop_ids: frozenset[int], seed: int, decode: Decode | None = None
    ):
        self._runner = runner
        self._scheduler = scheduler
        self._stop_ids = stop_ids
        self._seed = seed
        self._text_of = decode
        self._ended: deque[Rollout] = deque()  # not given out yet
        self._closed = False
        weakref.finalize(self, scheduler.clear).atexit = False

    def add(self, requests: Iterable[Request]) -> None:
        """Queue more requests. One that extends a kept cache comes before prompts that wait.

        Raises:
            UserError: a sequence could outgrow the cache.
            ValueError: stop strings, and the engine has no ``decode``.
            RuntimeError: the generation is closed.
        """
        if self._closed:
            raise RuntimeError("this generation is closed: give the requests to a new one")
        requests = list(requests)
        if self._text_of is None and any(request.sampling.stop_strings for request in requests):
            raise ValueError("stop strings are found in text: make the Engine with decode=")
        self._scheduler.add(requests)

    def close(self) -> None:
        """Stop drawing and free the blocks of all samples; rollouts that had ended still come out of iteration."""
        self._closed = True
        self._scheduler.clear()

    def __next__(self) -> Rollout:
        while not self._ended:
            if self._step(STEPS_AT_ONCE) is None:
                raise StopIteration
        return self._ended.popleft()

    def stream(self) -> Iterator[Rollout]:
        """Each rollout every time a token was drawn for it, until all have ended; ``rollout.ended`` at its last."""
        while (drawn := self._step(1)) is not None:
            self._ended.clear()
            yield from (lane.members[0] for lane in drawn)

    def _step(self, most: int) -> list[Lane] | None:
        """Draw a token, or up to ``most``, for what is ready; gives the lanes that drew, None when nothing is left."""
        try:
            if isinstance(self._runner, DecoderRunner) and (drawn := self._decode(self._runner, most)):
                return drawn
            batch = self._scheduler.next_batch()
            if batch is None:
                return None
            logits = self._forward(batch)
            return self._sample(self._scheduler.advance(batch), logits)
        except BaseException:
            self.close()
            raise

    def _decode(self, runner: DecoderRunner, most: int) -> list[Lane]:
        """Many steps in one call, where all lanes are decoding; none drew if there was no room for a step."""
        lanes = list(self._scheduler.decoding())
        if not lanes:
            return []
        if any(lane.sampling.stop_strings for lane in lanes):
            most = 1  # each token is looked at before the next is drawn
        members = [lane.members[0] for lane in lanes]
        drawn = runner.decoder.decode(
            self._scheduler.cache,
            torch.tensor([lane.handle for lane in lanes]),
            torch.tensor([lane.pending[0] for lane in lanes]),
            _sampling_columns(lanes, runner.device),
            seed=self._seed,
            sample_ids=torch.tensor([rollout.sample_id for rollout in members]),
            positions=torch.tensor([len(rollout.response) for rollout in members]),
            left=torch.tensor([lane.sampling.max_tokens - len(lane.members[0].response) for lane in lanes]),
            stop_ids=torch.tensor(sorted(self._stop_ids), dtype=torch.int64),
            steps=most,
            enough_ended=1 if self._scheduler.queued else len(lanes),
        )
        counts = drawn.counts.tolist()
        if any(n and row[n - 1] < 0 for row, n in zip(drawn.tokens.tolist(), counts, strict=True)):
            raise UserError(NOT_FINITE)
        self._record(lanes, *(
            [row[:n] for row, n in zip(column.tolist(), counts, strict=True)]
            for column in (drawn.tokens, drawn.logps, drawn.entropies)
        ))  # fmt: skip
        return [lane for lane, n in zip(lanes, counts, strict=True) if n]

    def _forward(self, batch: Batch) -> torch.Tensor:  # [lanes whose last pending token is in the batch, V]
        tokens = [token for lane, n in zip(batch.lanes, batch.counts, strict=True) for token in lane.pending[:n]]
        last = [
            end - 1 for end, lane, count in zip(accumulate(batch.counts), batch.lanes, batch.counts, strict=True)
            if count == len(lane.pending)
        ]  # fmt: skip
        return self._runner.logits(tokens, batch.plan, last)

    def _sample(self, ready: list[Lane], logits: torch.Tensor) -> list[Lane]:
        if not ready:
            return ready
        if any(len(lane.members) > 1 for lane in ready):
            rows = [row for row, lane in enumerate(ready) for _ in lane.members]
            logits = logits[torch.tensor(rows, device=logits.device)]
            ready = [part for lane in ready for part in self._scheduler.split(lane)]
        drawn = _draw(logits, ready, self._seed)
        logps = _training_logps(logits, drawn.tokens, ready) if self._runner.exact else drawn.raw_logps
        columns = (drawn.tokens, logps, drawn.entropies)
        self._record(ready, *([[value] for value in column.tolist()] for column in columns))
        return ready

    def _record(
        self,
        lanes: list[Lane],
        tokens: list[list[int]],  # those that each lane drew, and of each the log-probability and the entropy
        logps: list[list[float]],
        entropies: list[list[float]],
    ) -> None:
        ended = []
        for lane, drawn, drawn_logps, drawn_entropies in zip(lanes, tokens, logps, entropies, strict=True):
            if not drawn:
                continue
            rollout = lane.members[0]
            rollout.response += drawn
            rollout.logps += drawn_logps
            rollout.entropies += drawn_entropies
            rollout.stop_string = self._completed(rollout, lane.sampling.stop_strings)
            rollout.finished = drawn[-1] in self._stop_ids or rollout.stop_string is not None
            if rollout.finished or len(rollout.response) == lane.sampling.max_tokens:
                rollout.ended = True
                ended.append(lane)
            elif lane.handle is None:
                self._scheduler.requeue_prompt(lane)
            else:
                lane.pending = drawn[-1:]
        self._scheduler.finish(ended)
        self._ended.extend(lane.members[0] for lane in ended)

    def _completed(self, rollout: Rollout, stop_strings: tuple[str, ...]) -> str | None:
        """The stop string that the latest token completes."""
        if not stop_strings or self._text_of is None:
            return None
        # A token is a byte or more; those before keep a character or a leading space whole.
        latest = max(len(string.encode()) for string in stop_strings) + _TOKENS_BEFORE
        text = self._text_of(rollout.response[-latest:])
        return min((string for string in stop_strings if string in text), key=text.find, default=None)


def _draw(logits: torch.Tensor, lanes: list[Lane], seed: int) -> Sampled:
    members = [lane.members[0] for lane in lanes]
    sample_ids, positions = upload(
        [int64([rollout.sample_id for rollout in members]), int64([len(rollout.response) for rollout in members])],
        logits.device,
    )
    try:
        columns = _sampling_columns(lanes, logits.device)
        return sample(logits, *columns, seed=seed, sample_ids=sample_ids, positions=positions)
    except RuntimeError as error:
        if torch.isfinite(logits).all():
            raise
        raise UserError(NOT_FINITE) from error


def _training_logps(logits: torch.Tensor, tokens: torch.Tensor, lanes: list[Lane]) -> torch.Tensor:
    """The same numbers up to rounding as the sampler's, rounded as training's are."""
    temperatures = [lane.sampling.temperature or 1.0 for lane in lanes]
    return token_logprobs(logits, tokens, temperature=_column(temperatures, torch.float32, logits.device))


def _sampling_columns(lanes: list[Lane], device: torch.device) -> tuple[torch.Tensor, ...]:
    first = lanes[0].sampling
    if all(lane.sampling is first for lane in lanes):
        n = (len(lanes),)
        return (
            torch.full(n, first.temperature, device=device),
            torch.full(n, first.top_k, dtype=torch.int32, device=device),
            torch.full(n, first.top_p, device=device),
            torch.full(n, first.min_p, device=device),
        )
    return (
        _column([lane.sampling.temperature for lane in lanes], torch.float32, device),
        _column([lane.sampling.top_k for lane in lanes], torch.int32, device),
        _column([lane.sampling.top_p for lane in lanes], torch.float32, device),
        _column([lane.sampling.min_p for lane in lanes], torch.float32, device),
    )


def _column(values: list[int] | list[float], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    return torch.tensor(values, dtype=dtype, device=device)

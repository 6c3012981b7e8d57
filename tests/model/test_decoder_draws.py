"""Many tokens drawn in one call: those that single steps draw, and when the call ends."""

from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from tests.model.decoders import feed, ours, paged, prompts, threads
from thinktwice_fast.model import csrc
from thinktwice_fast.model.decoder import Decoded, Decoder
from thinktwice_fast.model.paged import PagedKVCache

SEED = 5
STEPS = 12


class Prefilled(NamedTuple):
    """Sequences whose last token is not in the cache yet, and has no place in it."""

    decoder: Decoder
    cache: PagedKVCache
    handles: list[int]
    tokens: Tensor  # int64 [N], the last of each

    def sampling(self) -> list[Tensor]:
        """Temperature, top-k, top-p, min-p of each sequence: a different mix for each."""
        n = len(self.handles)
        mixes: list[list[float]] = [[1.0, 0.0, 0.7, 1.5], [0, 0, 5, 0], [1.0, 1.0, 1.0, 0.8], [0.0, 0.0, 0.0, 0.05]]
        types = (torch.float32, torch.int32, torch.float32, torch.float32)
        return [
            torch.tensor([mix[i % 4] for i in range(n)], dtype=dtype) for mix, dtype in zip(mixes, types, strict=True)
        ]

    def reserve(self) -> bool:
        """The places of the first step."""
        return self.cache.extend(self.handles, [1] * len(self.handles)) is not None

    def draw(self, **changes: Any) -> Decoded:
        assert self.reserve()
        return self.draw_reserved(**changes)

    def draw_reserved(self, **changes: Any) -> Decoded:
        n = len(self.handles)
        arguments: dict[str, Any] = {
            "handles": torch.tensor(self.handles), "tokens": self.tokens, "sampling": self.sampling(), "seed": SEED,
            "sample_ids": torch.arange(n) + 100, "positions": torch.arange(n) * 3, "left": torch.full((n,), 50),
            "stop_ids": torch.empty(0, dtype=torch.int64), "steps": STEPS, "enough_ended": n,
        }  # fmt: skip
        return self.decoder.decode(self.cache, **arguments | changes)

    def lengths(self) -> list[int]:
        return [self.cache.length(handle) for handle in self.handles]


def prefilled(model: Any, lengths: list[int], samples: int = 1, blocks: int = 200) -> Prefilled:
    """Prompts of those lengths, each forked into several sequences."""
    decoder, cache = Decoder(model, 400), paged(model, blocks)
    first = [cache.prefill() for _ in lengths]
    feed(decoder, cache, first, prompts(model, lengths))
    handles = [
        child for handle in first for child in (handle, *(cache.fork(handle, samples - 1) if samples > 1 else ()))
    ]
    (tokens,) = prompts(model, [len(handles)])
    return Prefilled(decoder, cache, handles, tokens)


def drawn_step_by_step(given: Prefilled, steps: int) -> csrc.Sampled:  # each [N, steps]
    """A pass and a call of the sampler for each token."""
    tokens, columns = given.tokens, []
    for step in range(steps):
        logits = torch.cat(feed(given.decoder, given.cache, given.handles, list(tokens[:, None])))
        n = len(tokens)
        sampled = csrc.sample(
            logits, *given.sampling(), seed=SEED, sample_ids=torch.arange(n) + 100, positions=torch.arange(n) * 3 + step
        )
        tokens = sampled.tokens
        columns.append(sampled)
    return csrc.Sampled(*(torch.stack(column, 1) for column in zip(*columns, strict=True)))


@pytest.mark.parametrize("cores", [1, 2])
@pytest.mark.parametrize(
    ("name", "dtype"), [("qwen3", torch.float32), ("olmo3", torch.bfloat16), ("olmo2 with biases", torch.float16)]
)
def test_draws_are_those_of_single_steps(name: str, dtype: torch.dtype, cores: int) -> None:
    """Bit for bit: the same passes and the same sampler, which sees the logits before they are copied anywhere."""
    model = ours(name).to(dtype)
    lengths = [3, 15, 64, 70, 130]
    expected = drawn_step_by_step(prefilled(model, lengths, samples=4), STEPS)
    with threads(cores):
        got = prefilled(model, lengths, samples=4).draw()
    assert torch.equal(got.tokens, expected.tokens)
    assert torch.equal(got.logps, expected.raw_logps) and torch.equal(got.entropies, expected.entropies)
    assert got.counts.tolist() == [STEPS] * 20


def test_calls_go_on_where_the_last_one_ended() -> None:
    model = ours("olmo3")
    whole = prefilled(model, [20, 70], samples=3).draw()
    parts = prefilled(model, [20, 70], samples=3)
    start, tokens = 0, parts.tokens
    for steps in (1, 4, 7):
        got = parts.draw(tokens=tokens, positions=torch.arange(6) * 3 + start, steps=steps)
        assert torch.equal(got.tokens, whole.tokens[:, start : start + steps])
        assert torch.equal(got.logps, whole.logps[:, start : start + steps])
        start, tokens = start + steps, got.tokens[:, -1].contiguous()
    assert start == STEPS


def test_a_sequence_ends_at_a_stop_token_or_its_limit_and_the_others_go_on() -> None:
    model = ours("qwen3")
    free = prefilled(model, [5, 20], samples=4)
    whole = free.draw()
    stops = [int(whole.tokens[0, 4]), int(whole.tokens[5, 7])]
    left = torch.tensor([50, 3, 50, 50, 1, 50, 12, 50])
    counts = []
    for row, limit in zip(whole.tokens.tolist(), left.tolist(), strict=True):
        ends = [place + 1 for place, token in enumerate(row) if token in stops]
        counts.append(min([STEPS, limit, *ends]))
    given = prefilled(model, [5, 20], samples=4)
    before = given.lengths()
    got = given.draw(stop_ids=torch.tensor(stops), left=left)
    assert got.counts.tolist() == counts and counts[0] == 5 and counts[1] == 3 and STEPS in counts
    for row, n in enumerate(counts):
        assert torch.equal(got.tokens[row, :n], whole.tokens[row, :n])
        assert torch.equal(got.logps[row, :n], whole.logps[row, :n])
    assert given.lengths() == [length + n for length, n in zip(before, counts, strict=True)]


@pytest.mark.parametrize(("enough", "drawn"), [(1, 2), (2, 4), (3, 4), (4, 9), (5, 12)])
def test_all_stop_once_enough_have_ended(enough: int, drawn: int) -> None:
    given = prefilled(ours("llama"), [9] * 5)
    limits = [4, 2, 50, 4, 9]
    got = given.draw(left=torch.tensor(limits), enough_ended=enough)
    assert got.counts.tolist() == [min(limit, drawn) for limit in limits]


def test_missing_blocks_end_the_call_with_what_was_drawn() -> None:
    """Four sequences of 12 tokens have room for 4 more in their blocks; then each needs one, and three are free."""
    whole = prefilled(ours("qwen3"), [12] * 4).draw()
    given = prefilled(ours("qwen3"), [12] * 4, blocks=7)
    got = given.draw()
    assert got.counts.tolist() == [4] * 4 and torch.equal(got.tokens[:, :4], whole.tokens[:, :4])
    assert given.lengths() == [16] * 4 and given.cache.free_blocks == 3
    assert not given.reserve() and given.lengths() == [16] * 4
    given.cache.release(given.handles[3:])
    fewer = given._replace(handles=given.handles[:3])
    rest = fewer.draw(tokens=got.tokens[:3, 3].contiguous(), positions=torch.arange(3) * 3 + 4, steps=8)
    assert torch.equal(rest.tokens, whole.tokens[:3, 4:])


def test_a_sequence_of_another_version_is_refused() -> None:
    given = prefilled(ours("qwen3"), [9, 5])
    given.reserve()
    given.cache.policy_version = 3
    with pytest.raises(RuntimeError, match="was written by policy version 0 and cannot be extended under version 3"):
        given.draw_reserved()
    assert given.lengths() == [10, 6]


def test_logits_that_are_no_numbers_give_minus_one() -> None:
    """Only to their own sequence; the call ends with that step."""
    model = ours("olmo3")
    given = prefilled(model, [9, 5, 7])
    broken = prefilled(model, [9, 5, 7])
    whole = given.draw().tokens
    third = whole[0, 2]
    assert third not in whole[1:, :3] and third not in whole[0, :2] and third not in given.tokens
    with torch.no_grad():
        model.embed_tokens.weight[third] = torch.nan
    got = broken.draw()
    assert got.counts.tolist() == [4] * 3
    whole[0, 3] = -1
    assert torch.equal(got.tokens[:, :4], whole[:, :4])


def test_wrong_arguments() -> None:
    given = prefilled(ours("llama"), [9, 5])
    bad: list[tuple[dict[str, Any], str]] = [
        ({"left": torch.tensor([1, 0])}, "sequence 1 has no token left to draw"),
        ({"steps": 0}, "steps must be at least 1"),
        ({"tokens": torch.tensor([0, 512])}, "token 512 of row 1 lies outside the vocabulary of 512"),
        ({"tokens": torch.tensor([0])}, "decoder_decode: tokens has 1 entries, expected 2"),
        ({"positions": torch.tensor([0, 1], dtype=torch.int32)}, "positions must be a contiguous Long vector"),
        ({"stop_ids": torch.tensor([1.0])}, "stop_ids must be a contiguous Long vector"),
        ({"cache": paged(ours("mistral"), 4)}, r"contiguous CPU tensors \[3, blocks, 2, block_size, 16\] of one type"),
    ]
    given.reserve()
    for change, message in bad:
        with pytest.raises(RuntimeError, match=message):
            changed = given._replace(cache=change.pop("cache", given.cache))
            changed.draw_reserved(**change)
        assert given.lengths() == [10, 6]
    short = given._replace(decoder=Decoder(ours("llama"), 10))
    with pytest.raises(RuntimeError, match="position 10 of row 0 lies outside the 10 that the rotary tables hold"):
        short.draw()
    given.cache.release(given.handles[1:])
    with pytest.raises(ValueError, match="handle"):
        given.draw_reserved()

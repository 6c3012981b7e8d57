"""The C++ decoder's logits: transformers' own, with the same bits whatever shares the batch, the cache, the machine."""

import copy
import random
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.model.decoders import MODELS, feed, made, ours, paged, prompts, threads
from tests.model.padded import PaddedAttention
from tests.model.rounding import assert_as_exact
from tests.small_models import own
from thinktwice_fast.model.attention import NAME
from thinktwice_fast.model.decoder import Decoder
from thinktwice_fast.model.policy import Policy, linear_head
from thinktwice_fast.model.transformer import Transformer

# On either side of windows of 8, blocks of 16 and chunks of 64 keys.
LENGTHS = [1, 7, 8, 9, 15, 16, 17, 40, 63, 64, 65, 100]


def logits_one_by_one(model: Any, parts: list[Tensor]) -> list[Tensor]:  # each [tokens, V]
    with torch.no_grad():
        return [model(input_ids=part[None], use_cache=False).logits[0] for part in parts]


def decoded_at_once(model: Transformer, parts: list[Tensor], **options: bool) -> list[Tensor]:  # each [tokens, V]
    cache = paged(model, sum(-(-len(part) // 16) for part in parts))
    longest = max(len(part) for part in parts)
    return feed(Decoder(model, longest, **options), cache, [cache.prefill() for _ in parts], parts)


@pytest.mark.parametrize("name", MODELS)
def test_logits_are_those_of_transformers(name: str) -> None:
    theirs = made(name)
    parts = prompts(theirs, LENGTHS)
    exact = logits_one_by_one(copy.deepcopy(theirs).double(), parts)
    assert_as_exact(decoded_at_once(own(theirs), parts), logits_one_by_one(theirs, parts), exact)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_types_lose_no_more_than_the_modules(name: str, dtype: torch.dtype) -> None:
    modules = made(name, NAME).to(dtype)
    model = own(modules)
    parts = prompts(model, LENGTHS)
    exact = torch.cat(logits_one_by_one(made(name).to(dtype).double(), parts))
    attention = PaddedAttention.from_lengths(LENGTHS, torch.device("cpu"))
    positions = torch.cat([torch.arange(n) for n in LENGTHS])
    with torch.no_grad():
        theirs = Policy(modules)(torch.cat(parts), positions, attention, torch.arange(sum(LENGTHS)), linear_head)
    found = torch.cat(decoded_at_once(model, parts))
    for order in (2, torch.inf):
        mine, peer = (float((logits - exact).flatten().norm(order)) for logits in (found, theirs))
        assert 0 < mine <= 2 * peer


class Sequences:
    """Sequences that grow by random tokens and fork, each with all the logits that it got."""

    def __init__(self, model: Any, decoder: Decoder, seed: int):
        self.decoder, self.cache = decoder, paged(model, 200)
        self.tokens = range(model.config.vocab_size)
        self.random = random.Random(seed)
        self.all: list[tuple[int, list[int], list[Tensor]]] = []  # handle, tokens, logits of each

    def begin(self) -> None:
        self.all.append((self.cache.prefill(), [], []))

    def fork(self, which: int, n: int) -> None:
        handle, tokens, rows = self.all[which]
        self.all += [(child, list(tokens), list(rows)) for child in self.cache.fork(handle, n)]

    def grow(self, which: list[int], counts: list[int]) -> None:
        parts = [torch.tensor(self.random.choices(self.tokens, k=n)) for n in counts]
        for i, part, logits in zip(
            which, parts, feed(self.decoder, self.cache, [self.all[i][0] for i in which], parts), strict=True
        ):
            self.all[i][1].extend(part.tolist())
            self.all[i][2].extend(logits)

    def check(self, model: Any) -> None:
        """Every row has the bits that it has in one pass over its sequence alone."""
        for _, tokens, rows in self.all:
            (alone,) = decoded_at_once(model, [torch.tensor(tokens)])
            assert torch.equal(torch.stack(rows), alone)


@pytest.mark.parametrize(("name", "dtype"), [("olmo3", torch.float32), ("qwen2", torch.bfloat16)])
@settings(max_examples=12)
@given(seed=st.integers(0, 2**32), cores=st.sampled_from([1, 2]), group=st.booleans())
def test_bits_depend_on_neither_batch_nor_chunks_nor_threads_nor_grouping(
    name: str, dtype: torch.dtype, seed: int, cores: int, group: bool
) -> None:
    """Prefill in chunks, forks, and decoding of many at once, on either number of threads."""
    model = ours(name).to(dtype)
    with threads(cores):
        sequences = Sequences(model, Decoder(model, 400, group_attention=group), seed)
        pick = sequences.random
        sequences.begin()
        sequences.grow([0], [pick.choice([64, 80, 130])])
        sequences.fork(0, pick.choice([1, 5, 70]))
        for _ in range(4):
            sequences.begin()
            everything = list(range(len(sequences.all)))
            fed = [i for i in everything if i == everything[-1] or pick.random() < 0.8]
            sequences.grow(fed, [pick.choice([1, 1, 1, 3, 20]) if i else 1 for i in fed])
            if pick.random() < 0.3:
                sequences.fork(pick.choice(everything), 2)
        sequences.grow(list(range(len(sequences.all))), [1] * len(sequences.all))
    sequences.all = pick.sample(sequences.all, 12) if len(sequences.all) > 12 else sequences.all
    sequences.check(model)


def test_models_beyond_the_caches_get_the_same_bits() -> None:
    """Layer by layer over blocks of 512 rows, where a small model goes row block by row block on its one thread."""
    large = ours("qwen3", vocab_size=66_000)
    small = ours("qwen3")
    assert sum(p.nbytes for p in small.parameters()) < 16 << 20 < large.head.nbytes
    with torch.no_grad():
        large.embed_tokens.weight[:512] = small.embed_tokens.weight
        for name, parameter in small.named_parameters():
            if "embed" not in name:
                large.get_parameter(name).copy_(parameter)
    lengths = [520, *range(1, 40)]
    parts = prompts(small, lengths)
    last = torch.tensor(lengths).cumsum(0) - 1
    rows = torch.cat([torch.arange(500, 530), last[10:]])
    results = []
    with threads(1):
        for model in (small, large):
            cache = paged(model, 120)
            plan = cache.extend([cache.prefill() for _ in parts], lengths)
            assert plan is not None
            results.append(Decoder(model, 520).forward(torch.cat(parts), plan, rows, cache)[:, :512])
    assert torch.equal(*results)


def test_only_the_rows_asked_for_and_in_their_order() -> None:
    model = ours("llama")
    parts = prompts(model, [100, 30])
    whole = torch.cat(decoded_at_once(model, parts))
    for select in ([], [0], [129], list(range(40, 120)), [3, 64, 65, 99, 100, 128]):
        cache = paged(model, 20)
        plan = cache.extend([cache.prefill(), cache.prefill()], [100, 30])
        assert plan is not None
        rows = torch.tensor(select, dtype=torch.int64)
        assert torch.equal(Decoder(model, 100).forward(torch.cat(parts), plan, rows, cache), whole[rows])


def test_changed_weights_are_seen_after_a_refresh() -> None:
    model, parts = ours("olmo2 with biases"), prompts(ours("olmo2"), [40])
    cache = paged(model, 10)
    decoder = Decoder(model, 40)
    before = decoded_at_once(model, parts)[0]
    with torch.no_grad():
        for number, parameter in enumerate(model.parameters()):
            parameter.mul_(1 + 0.1 * number)
    decoder.refresh()
    (after,) = feed(decoder, cache, [cache.prefill()], parts)
    assert torch.equal(after, decoded_at_once(model, parts)[0])
    assert not torch.equal(after, before)


def test_what_is_supported() -> None:
    for name in MODELS:
        assert Decoder.supports(ours(name)) and Decoder.supports(ours(name).bfloat16())
        assert Decoder.supports(ours(name).to("meta")), "a dry run asks before there are weights"
    assert not Decoder.supports(ours("llama").double())
    assert not Decoder.supports(made("llama", hidden_act="gelu"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", MODELS)
def test_untouched_models_do_not_differ(name: str, dtype: torch.dtype) -> None:
    model = ours(name).to(dtype)
    assert Decoder(model, 30).reproduces(model)


@pytest.mark.parametrize("positions", [1, 2, 20])
def test_a_model_for_short_sequences_is_compared_too(positions: int) -> None:
    model = ours("llama")
    assert Decoder(model, positions).reproduces(model)


def test_other_weights_differ() -> None:
    model = ours("qwen3")
    decoder = Decoder(model, 30)
    with torch.no_grad():
        model.layers[2].self_attn.o_proj.weight.mul_(1.1)
    assert not decoder.reproduces(model)
    decoder.refresh()
    assert decoder.reproduces(model)
    with torch.no_grad():
        model.layers[0].mlp.gate_up_proj.weight[3, 5] = torch.nan
    assert not decoder.reproduces(model)


def test_wrong_arguments_of_a_pass() -> None:
    model = ours("llama")
    decoder, cache = Decoder(model, 20), paged(model, 4)
    plan = cache.extend([cache.prefill(), cache.prefill()], [5, 3])
    assert plan is not None
    good = {"tokens": torch.arange(8), "select": torch.arange(8), "k_cache": cache.k_cache} | {
        name: getattr(plan, name) for name in ("positions", "slots", "block_tables", "context_lens", "cu_seqlens_q")
    }
    bad = [
        ("tokens", good["tokens"] + 505, "token 512 of row 7 lies outside the vocabulary of 512"),
        ("tokens", good["tokens"] - 1, "token -1 of row 0 lies outside the vocabulary of 512"),
        ("tokens", good["tokens"].int(), "tokens must be a contiguous Long vector"),
        ("positions", good["positions"] + 16, "position 20 of row 4 lies outside the 20 that the rotary tables hold"),
        ("positions", good["positions"][:7], "positions has 7 entries, expected 8"),
        ("slots", good["slots"] + 64, "slot 64 lies outside the cache of 64 slots"),
        ("block_tables", good["block_tables"] + 4, "block 4 of sequence 0 lies outside the cache of 4 blocks"),
        ("block_tables", good["block_tables"].long(), "block_tables must be a contiguous int32 CPU tensor"),
        ("context_lens", good["context_lens"] - 1, "sequence 0 has 5 new tokens, 4 in all and a table of 1 blocks"),
        ("context_lens", good["context_lens"] + 20, "sequence 0 has 5 new tokens, 25 in all and a table of 1 blocks"),
        ("cu_seqlens_q", good["cu_seqlens_q"] + 1, "cu_seqlens_q must run from 0 to 8"),
        ("cu_seqlens_q", torch.tensor([0, 8, 8], dtype=torch.int32), "sequence 0 has 8 new tokens, 5 in all"),
        ("select", torch.tensor([1, 1]), "select must name rows in ascending order"),
        ("select", torch.tensor([8]), "select must name rows in ascending order"),
        ("select", torch.tensor([-1]), "select must name rows in ascending order"),
        ("k_cache", cache.k_cache[:2], r"contiguous CPU tensors \[3, blocks, 2, block_size, 16\] of one type"),
        ("k_cache", cache.k_cache.half(), "of one type"),
    ]
    names = ("tokens", "positions", "slots", "block_tables", "context_lens", "cu_seqlens_q", "select", "k_cache")
    for name, value, message in bad:
        changed = good | {name: value}
        with pytest.raises(RuntimeError, match=message):
            torch.ops.thinktwice.decoder_forward(decoder._id, *(changed[n] for n in names), cache.v_cache)
    number = decoder._id
    del decoder
    with pytest.raises(RuntimeError, match=f"decoder {number} does not exist or was closed"):
        torch.ops.thinktwice.decoder_forward(number, *(good[n] for n in names), cache.v_cache)

"""The rollout engine: transformers' own tokens and log-probabilities, whatever shares the batch and the cache."""

import copy
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch

from tests.lent_memory import Lent
from tests.model.rounding import assert_as_exact
from tests.rollout.drawing import (
    DECODERS,
    LONGEST,
    PROMPT_LENGTHS,
    RESPONSE,
    draw,
    make,
    prompts,
    requests,
    response_logits,
    tokens,
)
from tests.small_models import FAMILIES, own, own_model, random_model
from thinktwice_fast.config import RolloutOptions
from thinktwice_fast.errors import UserError
from thinktwice_fast.model import csrc, reference
from thinktwice_fast.records import Request, Rollout, Sampling
from thinktwice_fast.rollout import engine as engine_module
from thinktwice_fast.rollout import step as step_module
from thinktwice_fast.rollout.engine import Engine


def ranks(logits: torch.Tensor, chosen: list[int]) -> list[int]:
    """How many tokens are likelier than each chosen one."""
    return (logits > logits.gather(1, torch.tensor(chosen)[:, None])).sum(1).tolist()


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_is_what_transformers_generates(family: str) -> None:
    greedy = requests(1, Sampling(temperature=0.0, max_tokens=RESPONSE))
    fused, modules = (draw(make(family, decoder=decoder), greedy) for decoder in DECODERS)
    model = random_model(family, "sdpa")
    for request in requests(1):
        ids = torch.tensor([request.prompt])
        expected = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=RESPONSE,
            eos_token_id=None,
            pad_token_id=0,
        )[0, ids.shape[1] :]
        rollout = fused[request.sample_ids[0]]
        best, second = response_logits(model, rollout).topk(2).values.unbind(1)
        assert (best - second).min() > 1e-4, "choose other weights: rounding may decide this token"
        assert rollout.response == modules[rollout.sample_id].response == expected.tolist()
        assert rollout.group == request.group and rollout.prompt == request.prompt


@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize("family", FAMILIES)
def test_log_probabilities_are_those_of_a_full_forward_pass(family: str, decoder: str) -> None:
    """Under the temperature alone, also where the draw was truncated: what the trainer will compute."""
    sampling = Sampling(temperature=0.7, top_p=0.9, top_k=20, max_tokens=RESPONSE)
    got = draw(make(family, decoder=decoder), requests(2, sampling))
    model = random_model(family, "sdpa")
    exact = copy.deepcopy(model).double()
    for rollout in got.values():
        peer, truth = (_logps_and_entropies(response_logits(m, rollout) / 0.7, rollout) for m in (model, exact))
        assert_as_exact((torch.tensor(rollout.logps), torch.tensor(rollout.entropies)), peer, truth)


def _logps_and_entropies(logits: torch.Tensor, rollout: Rollout) -> tuple[torch.Tensor, torch.Tensor]:
    table = logits.log_softmax(-1)
    return table.gather(1, torch.tensor(rollout.response)[:, None])[:, 0], -(table.exp() * table).sum(-1)


def test_bfloat16_weights_and_cache() -> None:
    model = own_model("llama").bfloat16()
    engine = Engine(model, frozenset(), RolloutOptions(), 40 + RESPONSE)
    assert engine.cache.k_cache.dtype == torch.bfloat16
    got = draw(engine, requests(2))
    exact = random_model("llama", "sdpa")
    for rollout in got.values():
        expected, _ = _logps_and_entropies(response_logits(exact, rollout), rollout)
        # bfloat16 keeps 8 bits of logits of about 3: off by up to 0.02 each, and more from the layers before.
        assert (torch.tensor(rollout.logps) - expected).abs().mean() < 0.05


def test_logits_of_bfloat16_weights_are_sampled_unrounded(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[torch.Tensor] = []

    def spy(logits: torch.Tensor, *columns: Any, **keys: Any) -> Any:
        seen.append(logits)
        return csrc.sample(logits, *columns, **keys)

    monkeypatch.setattr(step_module, "sample", spy)
    engine = Engine(own_model("llama").bfloat16(), frozenset(), RolloutOptions(), 40 + RESPONSE)
    draw(engine, requests(1))
    assert {logits.dtype for logits in seen} == {torch.float32}
    assert not torch.equal(seen[0], seen[0].bfloat16().float())


@pytest.mark.parametrize(
    "sampling",
    [Sampling(top_k=1), Sampling(top_p=1e-4), Sampling(min_p=1.0), Sampling(temperature=1e-4)],
    ids=["top_k", "top_p", "min_p", "temperature"],
)
def test_each_option_reaches_the_sampler(sampling: Sampling) -> None:
    engine = make()
    greedy = tokens(draw(engine, requests(1, Sampling(temperature=0.0))))
    assert tokens(draw(engine, requests(1, sampling))) == greedy
    assert tokens(draw(engine, requests(1, Sampling()))) != greedy


@pytest.mark.parametrize("decoder", DECODERS)
def test_each_draw_is_keyed_by_seed_sample_and_position(decoder: str) -> None:
    """Token by token what the sampler's reference draws from transformers' logits."""
    model = random_model("qwen3", "sdpa")
    n = RESPONSE
    for number, rollout in draw(make(decoder=decoder), requests(3), seed=17).items():
        options = (torch.ones(n), torch.zeros(n, dtype=torch.int32), torch.ones(n), torch.zeros(n))
        keys = (17, torch.full((n,), number), torch.arange(n))
        tokens, *_ = reference.sample(response_logits(model, rollout), *options, *keys)
        assert rollout.response == tokens.tolist()


def test_top_k_takes_the_likeliest_and_more_than_one() -> None:
    model = random_model("qwen3", "sdpa")
    got = draw(make(), requests(4, Sampling(top_k=3)))
    seen = {rank for rollout in got.values() for rank in ranks(response_logits(model, rollout), rollout.response)}
    assert seen == {0, 1, 2}


def test_one_batch_may_hold_different_options() -> None:
    engine = make()
    kinds = [Sampling(temperature=0.0), Sampling(top_k=3), Sampling(temperature=1.5, max_tokens=9), Sampling(min_p=0.1)]
    mixed = [Request(r.group, r.prompt, r.sample_ids, kind) for r, kind in zip(requests(2), kinds, strict=True)]
    together = tokens(draw(engine, mixed))
    alone = [tokens(draw(engine, [request])) for request in mixed]
    assert together == {number: response for part in alone for number, response in part.items()}


def test_samples_of_a_group_differ_and_seeds_too() -> None:
    engine = make()
    got = draw(engine, requests(6))
    for group in range(len(PROMPT_LENGTHS)):
        responses = [tuple(rollout.response) for rollout in got.values() if rollout.group == group]
        assert len(set(responses)) == 6
        assert len({response[0] for response in responses}) > 1
    assert tokens(draw(engine, requests(6), seed=1)) != tokens(got)
    assert tokens(draw(engine, requests(6))) == tokens(got)


@pytest.mark.parametrize(("family", "decoder"), [("qwen3", "auto"), ("olmo3", "auto"), ("olmo3", "modules")])
@pytest.mark.parametrize(
    ("options", "preempts"),
    [
        ({"max_sequences": 1}, False),
        ({"max_sequences": 5}, False),
        ({"max_batch_tokens": 7}, False),
        ({"max_batch_tokens": 7, "max_sequences": 3}, False),
        ({"cache_tokens": 96}, True),
        ({"cache_tokens": 160, "max_batch_tokens": 13}, True),
    ],
    ids=lambda value: " ".join(f"{k}={v}" for k, v in value.items()) if isinstance(value, dict) else None,
)
def test_a_sample_depends_on_its_id_and_not_on_the_batch(
    family: str, decoder: str, options: dict[str, Any], preempts: bool
) -> None:
    expected = draw(make(family, decoder=decoder), requests(4))
    engine = make(family, decoder=decoder, **options)
    got = draw(engine, requests(4))
    assert tokens(got) == tokens(expected)
    for number, rollout in got.items():
        assert rollout.logps == pytest.approx(expected[number].logps, abs=1e-4)
    assert (engine.counts.preemptions > 0) == preempts


def test_a_sample_depends_on_its_id_and_not_on_its_neighbours() -> None:
    engine = make()
    together = draw(engine, requests(4))
    second = requests(4)[1]
    alone = draw(engine, [Request(0, second.prompt, (12,), second.sampling)])
    assert alone[12].response == together[12].response
    backwards = [Request(r.group, r.prompt, r.sample_ids[::-1], r.sampling) for r in requests(4)[::-1]]
    assert tokens(draw(engine, backwards)) == tokens(together)


@pytest.mark.parametrize("decoder", DECODERS)
def test_a_response_ends_with_the_first_stop_token_or_at_its_limit(decoder: str) -> None:
    free = draw(make(decoder=decoder), requests(4))
    stop = {free[0].response[5], free[21].response[20]}
    stopped = draw(make(stop_ids=stop, decoder=decoder), requests(4))
    for number, rollout in stopped.items():
        response = free[number].response
        ends = [place for place, token in enumerate(response) if token in stop]
        assert rollout.finished == bool(ends)
        assert rollout.response == response[: ends[0] + 1 if ends else RESPONSE]
        assert len(rollout.response) == len(rollout.logps) == len(rollout.entropies)
    assert {rollout.finished for rollout in stopped.values()} == {True, False}
    assert not any(rollout.finished for rollout in free.values())


def test_a_stop_token_at_the_limit_counts_as_finished() -> None:
    free = draw(make(), requests(1, Sampling(max_tokens=4)))
    last = free[0].response[3]
    assert last not in free[0].response[:3]
    stopped = draw(make(stop_ids=[last]), requests(1, Sampling(max_tokens=4)))
    assert stopped[0].finished and stopped[0].response == free[0].response


def test_one_token_responses() -> None:
    engine = make(cache_tokens=64)
    one = draw(engine, requests(3, Sampling(max_tokens=1)))
    full = draw(engine, requests(3, Sampling(max_tokens=20)))
    assert tokens(one) == {number: rollout.response[:1] for number, rollout in full.items()}


def test_rollouts_come_as_they_end() -> None:
    engine = make()
    short = Request(0, prompts()[0], (0,), Sampling(max_tokens=2))
    long = Request(1, prompts()[1], (1,), Sampling(max_tokens=30))
    free = []

    def ended(rollout: Rollout) -> list[Request]:
        free.append(engine.cache.free_blocks)
        return []

    assert [rollout.group for rollout in engine.run([long, short], ended, seed=0)] == [0, 1]
    assert free[0] < free[1] == engine.cache.num_blocks


def test_a_stream_closed_early_frees_the_cache() -> None:
    engine = make(cache_tokens=320, max_batch_tokens=30)
    stops = requests(5, Sampling(max_tokens=5)) + requests(5)
    grown = engine.stream(stops, seed=0)
    next(rollout for rollout in grown if rollout.ended)
    assert engine.cache.free_blocks < engine.cache.num_blocks
    grown.close()
    assert engine.cache.free_blocks == engine.cache.num_blocks
    assert tokens(draw(engine, requests(1))) == tokens(draw(make(), requests(1)))


def test_a_sequence_larger_than_the_cache_is_refused_before_any_work() -> None:
    engine = make(cache_tokens=64)
    with pytest.raises(UserError, match=r"a sequence of up to 80 tokens .* cache of 64: raise --rollout\.cache_tokens"):
        engine.run(requests(1), seed=0)
    assert engine.cache.free_blocks == engine.cache.num_blocks == 4
    draw(engine, requests(1)[:2])


def test_the_cache_is_as_large_as_the_options_say() -> None:
    assert make(cache_tokens=33).cache.num_blocks == 3
    assert make(max_sequences=7).cache.num_blocks == 7 * LONGEST // 16
    assert make("llama").cache.k_cache.shape[0::2] == (3, 2, 16)
    assert make("qwen3").cache.k_cache.shape[-1] == 32


def test_the_cache_is_as_large_as_what_is_needed() -> None:
    model = own_model("qwen3")

    def blocks(needed: int, **options: Any) -> int:
        return Engine(model, frozenset(), RolloutOptions(**options), LONGEST, needed).cache.num_blocks

    assert blocks(100) == 100
    assert blocks(3) == LONGEST // 16  # one sequence fits in any case
    assert blocks(100, cache_tokens=LONGEST + 1) == LONGEST // 16 + 1


def test_a_cache_whose_memory_is_lent_between_runs_draws_the_same() -> None:
    made: list[Lent] = []

    def memory(size: int) -> Lent:
        made.append(Lent(size))
        return made[-1]

    keeping = [replace(request, keep=True) for request in requests(2)]
    expected = tokens(draw(make(), requests(2)))
    engine = Engine(own_model("qwen3"), frozenset(), RolloutOptions(), LONGEST, memory=memory)
    (lent,) = made
    assert lent.calls == ["map", "unmap"]
    for _ in range(2):
        assert tokens(draw(engine, requests(2))) == expected
        assert tokens({r.sample_id: r for r in engine.run(keeping, seed=0)}) == expected
        assert engine.cache.free_blocks < engine.cache.num_blocks
        engine.lend_memory()
        engine.lend_memory()
    assert lent.calls == ["map", "unmap"] * 3
    engine.cache.close()
    assert lent.calls[-1] == "close"


BLOCK_BYTES = 16_000  # of the cache, in the tests below


def gpu_blocks(
    monkeypatch: pytest.MonkeyPatch, free: int, reserve: int = 0, needed: int | None = None, **options: Any
) -> int:
    """Blocks of a cache on a GPU with ``free`` bytes once the allocator's own are given back; sequences take 5.

    One block more is there for nobody.
    """
    returned: list[bool] = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: returned.append(True))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free if returned else 0, 10 * free))
    gpu = torch.device("cuda", 0)
    return engine_module._blocks(RolloutOptions(**options), 40 + RESPONSE, needed, BLOCK_BYTES, gpu, reserve)


def test_on_a_gpu_the_cache_takes_what_it_needs_of_what_others_leave(monkeypatch: pytest.MonkeyPatch) -> None:
    assert gpu_blocks(monkeypatch, 10_000_000) == 9_984_000 // BLOCK_BYTES
    assert gpu_blocks(monkeypatch, 10_000_000, reserve=4_000_000) == 5_984_000 // BLOCK_BYTES
    assert gpu_blocks(monkeypatch, 10_000_000, max_sequences=7) == 7 * 5
    assert gpu_blocks(monkeypatch, 10_000_000, needed=99, max_sequences=7) == 99
    assert gpu_blocks(monkeypatch, 10_000_000, needed=4) == 5
    assert gpu_blocks(monkeypatch, 10_000, reserve=20_000, cache_tokens=33) == 3
    assert gpu_blocks(monkeypatch, 6 * BLOCK_BYTES) == 5


@pytest.mark.parametrize(("free", "reserve"), [(2 << 30, 3 << 30), (95_999, 0)])
def test_a_gpu_without_room_for_one_sequence_is_an_error(
    monkeypatch: pytest.MonkeyPatch, free: int, reserve: int
) -> None:
    with pytest.raises(UserError) as caught:
        gpu_blocks(monkeypatch, free, reserve)
    missing, rest = str(caught.value).split(
        " GiB of GPU memory are missing for a KV cache of one sequence of 80 tokens "
    )
    assert float(missing) == pytest.approx((6 * BLOCK_BYTES - (free - reserve)) / 2**30, abs=0.006)
    assert f"(the rest of the run will take {reserve / 2**30:.2f} GiB more): lower --rollout.max_resp" in rest


def test_preemptions_are_counted_over_calls_also_those_closed_early() -> None:
    engine = make(cache_tokens=96)
    assert engine.counts.preemptions == 0
    draw(engine, requests(4))
    first = engine.counts.preemptions
    assert first > 0
    grown = engine.stream(requests(4), seed=1)
    next(rollout for rollout in grown if rollout.ended)
    grown.close()
    assert engine.counts.preemptions > first


@pytest.mark.parametrize("decoder", DECODERS)
def test_changed_weights_are_sampled_from_at_once(decoder: str) -> None:
    engine = make(decoder=decoder)
    before = tokens({r.sample_id: r for r in engine.run(requests(2), seed=0, version=0)})
    other = random_model("qwen3", "sdpa", seed=9)
    with torch.no_grad():
        for mine, new in zip(engine.model.parameters(), own(other).parameters(), strict=True):
            mine.copy_(new)
    after = tokens({r.sample_id: r for r in engine.run(requests(2), seed=0, version=1)})
    fresh = Engine(own_model("qwen3", seed=9), frozenset(), RolloutOptions(), 40 + RESPONSE)
    assert after != before
    assert after == tokens(draw(fresh, requests(2)))


@pytest.mark.parametrize("decoder", DECODERS)
def test_logits_that_are_no_numbers_leave_the_cache_free(decoder: str) -> None:
    engine = make(decoder=decoder)
    with torch.no_grad():
        next(engine.model.parameters()).fill_(float("nan"))
    with pytest.raises(UserError, match=r"logits are not finite: lower --update\.learning_rate"):
        engine.run(requests(2), seed=0)
    assert engine.cache.free_blocks == engine.cache.num_blocks


@pytest.mark.parametrize("decoder", DECODERS)
def test_continuations_come_as_often_as_a_full_forward_pass_says(decoder: str) -> None:
    """Chi-square over two tokens of three each; beyond 31.8 (8 degrees of freedom) chance comes once in 10,000."""
    draws, prompt = 4000, prompts()[1]
    sampling = Sampling(temperature=0.8, top_k=3, max_tokens=2)
    got = draw(make(decoder=decoder), [Request(0, prompt, tuple(range(draws)), sampling)])
    seen = Counter(tuple(rollout.response) for rollout in got.values())
    model = random_model("qwen3", "sdpa")
    expected = {}
    for first, chance in likeliest(model, prompt, sampling).items():
        for second, then in likeliest(model, (*prompt, first), sampling).items():
            expected[first, second] = draws * chance * then
    assert set(seen) <= set(expected) and len(expected) == 9 and min(expected.values()) > 5
    assert sum((seen[pair] - count) ** 2 / count for pair, count in expected.items()) < 31.8


def likeliest(model: Any, ids: tuple[int, ...], sampling: Sampling) -> dict[int, float]:
    """The top-k next tokens with their chances under the temperature."""
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1]
    top = logits.topk(sampling.top_k)
    return dict(zip(top.indices.tolist(), (top.values / sampling.temperature).softmax(0).tolist(), strict=True))

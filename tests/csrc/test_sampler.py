"""The sampler: its random numbers, its distribution, its truncations, and what a draw may depend on."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.csrc.advancing import decoding_rows
from tests.csrc.watch import Watch
from thinktwice_fast.model import csrc, reference


def arguments(logits: Tensor, **options: Any) -> dict[str, Any]:
    """Arguments of ``sample`` with one value for all rows, or one tensor, per option."""
    n = len(logits)
    defaults = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "sample_ids": range(n), "positions": 0}
    types = {"top_k": torch.int32, "sample_ids": torch.int64, "positions": torch.int64}
    result: dict[str, Any] = {"logits": logits, "seed": options.pop("seed", 0)}
    for name, default in defaults.items():
        value = options.pop(name, default)
        values = list(value) if isinstance(value, range | list) else [value] * n
        result[name] = torch.tensor(values, dtype=types.get(name, torch.float32))
    assert not options
    return result


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((2**32 - 1,) * 4, (2**32 - 1,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_known_answers(counter: tuple[int, ...], key: tuple[int, int], words: tuple[int, ...]) -> None:
    """Random123's kat_vectors for philox4x32-10."""
    got = reference.philox4x32_10(tuple(torch.tensor([word]) for word in counter), key)
    assert tuple(int(word) for word in got) == words


def test_uniforms_are_open_and_even() -> None:
    u = reference.uniforms(5, torch.arange(100), torch.arange(100), 10_000)
    assert u.min() > 0 and u.max() < 1
    # A million uniforms: the mean's standard error is 0.29 / 1000, a tenth's share has 0.3 / 1000.
    assert abs(u.mean().item() - 0.5) < 5 * 0.29e-3
    assert ((torch.histc(u, 10, 0, 1) / u.numel() - 0.1).abs() < 5 * 0.3e-3).all()


def check_against_reference(given: dict[str, Any]) -> None:
    got, expected = csrc.sample(**given), csrc.Sampled(*reference.sample(**given)[:4])
    scores = _scores(given)
    # Both round their scores; only where two come within a few ulp of each other may they pick differently.
    ours, theirs = (scores.gather(1, tokens[:, None]) for tokens in (got.tokens, expected.tokens))
    torch.testing.assert_close(ours, theirs, rtol=4e-6, atol=0)
    same = got.tokens == expected.tokens
    torch.testing.assert_close(got.logps[same], expected.logps[same], atol=2e-5, rtol=2e-6)
    torch.testing.assert_close(got.raw_logps[same], expected.raw_logps[same], atol=2e-5, rtol=2e-6)
    torch.testing.assert_close(got.entropies, expected.entropies, atol=2e-5, rtol=2e-6)


def _scores(given: dict[str, Any]) -> Tensor:
    greedy = given["temperature"] == 0
    scaled = given["logits"].float() / torch.where(greedy, 1.0, given["temperature"])[:, None]
    weights = (scaled - scaled.amax(1, keepdim=True)).exp()
    weights *= reference._may_be_drawn(weights, given["top_k"], given["top_p"], given["min_p"])
    shape = (given["seed"], given["sample_ids"], given["positions"], weights.shape[1])
    return torch.where(greedy[:, None], weights, weights / -torch.log1p(-reference.uniforms(*shape)))


@settings(max_examples=80)
@given(st.data())
def test_equals_the_reference(data: st.DataObject) -> None:
    n, vocabulary = data.draw(st.integers(1, 6)), data.draw(st.integers(1, 400))
    random = torch.Generator().manual_seed(data.draw(st.integers(0, 10**6)))
    logits = torch.randn(n, vocabulary, generator=random) * data.draw(st.sampled_from([0.0, 0.5, 3.0, 60.0]))
    logits = logits.to(data.draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16])))
    if vocabulary > 1 and data.draw(st.booleans()):
        logits[:, :: data.draw(st.integers(2, 5))] = -math.inf
        logits[:, 1] = 0.5

    def column(strategy: st.SearchStrategy[Any]) -> list[Any]:
        return data.draw(st.lists(strategy, min_size=n, max_size=n))

    check_against_reference(
        arguments(
            logits,
            temperature=column(st.sampled_from([0.0, 0.3, 1.0, 1.7])),
            top_k=column(st.sampled_from([0, 1, 2, 20, 1000])),
            top_p=column(st.sampled_from([1e-6, 0.3, 0.8, 0.95, 1.0])),
            min_p=column(st.sampled_from([0.0, 0.05, 0.5, 1.0])),
            seed=data.draw(st.integers(-(2**63), 2**63 - 1)),
            sample_ids=column(st.integers(-(2**63), 2**63 - 1)),
            positions=column(st.integers(0, 2**32 - 1)),
        )
    )


def test_large_vocabulary_equals_the_reference() -> None:
    logits = torch.randn(6, 151_937, generator=torch.Generator().manual_seed(0)) * 2
    check_against_reference(
        arguments(logits, top_k=[0, 0, 0, 50, 0, 7], top_p=[1.0, 0.9, 1.0, 0.9, 1.0, 1.0], min_p=[0, 0, 0.01, 0, 0, 0])
    )


def test_the_reference_takes_rows_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    logits = torch.randn(40, 3000, generator=torch.Generator().manual_seed(0))
    given = arguments(logits, top_p=[0.9, 1.0] * 20, temperature=[0.0, 1.0, 0.5, 1.0] * 10, positions=range(40))
    whole = reference.sample(**given)
    budget = 7 * 3000 * reference._ENTRY_BYTES
    monkeypatch.setattr(reference, "SAMPLE_BYTES", budget)
    with Watch() as watch:
        parts = reference.sample(**given)
    assert watch.largest <= budget / 8
    assert all(torch.equal(part, expected) for part, expected in zip(parts, whole, strict=True))
    logits[30, 7] = math.nan
    assert reference.sample(**given)[-1].nonzero().tolist() == [[30]]


CHI_SQUARE_1E6 = {3: 30.7, 9: 45.1}  # degrees of freedom: value exceeded with probability 1e-6


@pytest.mark.parametrize(("options", "degrees"), [({}, 9), ({"temperature": 0.6, "top_k": 4}, 3)])
def test_distribution(options: dict[str, Any], degrees: int) -> None:
    draws = 200_000
    logits = torch.linspace(-1, 1.5, 10)
    drawn = csrc.sample(**arguments(logits.expand(draws, -1), seed=11, **options)).tokens
    p = (logits / options.get("temperature", 1.0)).double()
    p[: 10 - options.get("top_k", 10)] = -math.inf
    expected = p.softmax(0) * draws
    counts = torch.bincount(drawn, minlength=10).double()
    assert not counts[expected == 0].any()
    kept = expected > 0
    assert int(kept.sum()) == degrees + 1
    assert ((counts - expected)[kept] ** 2 / expected[kept]).sum().item() < CHI_SQUARE_1E6[degrees]


def test_successive_positions_and_samples_are_independent() -> None:
    logits = torch.zeros(40_000, 4)
    for options in ({"sample_ids": 0, "positions": range(40_000)}, {"sample_ids": range(40_000)}):
        tokens = csrc.sample(**arguments(logits, **options)).tokens
        pairs = torch.bincount(tokens[:-1] * 4 + tokens[1:], minlength=16).double()
        expected = (len(tokens) - 1) / 16
        # 15 degrees of freedom (fewer, as pairs overlap): exceeded with probability 1e-6.
        assert ((pairs - expected) ** 2 / expected).sum() < 56.5


def test_a_draw_depends_on_its_key_alone() -> None:
    random = torch.Generator().manual_seed(3)
    logits = torch.randn(50, 333, generator=random)
    base = arguments(logits, top_p=0.9, sample_ids=range(50), positions=range(100, 150))
    whole = csrc.sample(**base)
    order = torch.randperm(50, generator=random)[:17]
    part = {name: value if name == "seed" else value[order] for name, value in base.items()}
    for ours, theirs in zip(csrc.sample(**part), whole, strict=True):
        assert torch.equal(ours, theirs[order])
    padded = torch.full((50, 400), math.nan)
    padded[:, :333] = logits
    strided = csrc.sample(**{**base, "logits": padded[:, :333]})
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(strided, whole, strict=True))
    for change in ({"seed": 1}, {"sample_ids": range(50, 100)}, {"positions": range(200, 250)}):
        options = {"top_p": 0.9, "sample_ids": range(50), "positions": range(100, 150), **change}
        assert not torch.equal(csrc.sample(**arguments(logits, **options)).tokens, whole.tokens)


def drawable(logits: Tensor, **options: Any) -> set[int]:
    """Every token that 3000 draws from one row of few tokens turn up."""
    return set(csrc.sample(**arguments(logits.expand(3000, -1), **options)).tokens.tolist())


def test_truncations_keep_exactly_what_they_say() -> None:
    p = torch.tensor([0.125, 0.25, 0.25, 0.0625, 0.25, 0.0625])
    logits = p.log()
    assert drawable(logits) == {0, 1, 2, 3, 4, 5}
    # Equal tokens rank by their ids.
    assert drawable(logits, top_k=1) == {1}
    assert drawable(logits, top_k=2) == {1, 2}
    assert drawable(logits, top_k=5) == {0, 1, 2, 3, 4}
    assert drawable(logits, min_p=0.5) == {0, 1, 2, 4}
    assert drawable(logits, min_p=1.0) == {1, 2, 4}
    # Sums of powers of two are exact: .25 + .25 reaches .5, and .51 takes one token more.
    even = torch.zeros(8)
    assert drawable(even, top_p=0.5) == {0, 1, 2, 3}
    assert drawable(even, top_p=0.501) == {0, 1, 2, 3, 4}
    assert drawable(even, top_p=1e-9) == {0}
    # Top-p takes its share of what top-k left.
    assert drawable(even, top_k=4, top_p=0.5) == {0, 1}
    masked = torch.tensor([-math.inf, 0.0, -math.inf, 0.0])
    assert drawable(masked) == {1, 3}
    assert drawable(masked, top_k=3) == {1, 3}


def test_log_probabilities_and_entropy() -> None:
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0]]).expand(64, -1)
    got = csrc.sample(**arguments(logits, temperature=0.5, top_k=2))
    raw = (logits.double() / 0.5).log_softmax(1)
    truncated = raw[:, :2].log_softmax(1)
    entropy = -(raw.exp() * raw).sum(1)
    torch.testing.assert_close(got.raw_logps.double(), raw.gather(1, got.tokens[:, None])[:, 0], atol=2e-6, rtol=0)
    torch.testing.assert_close(got.logps.double(), truncated.gather(1, got.tokens[:, None])[:, 0], atol=2e-6, rtol=0)
    torch.testing.assert_close(got.entropies.double(), entropy, atol=2e-6, rtol=0)


def test_greedy_is_the_first_of_the_likeliest_at_temperature_one() -> None:
    logits = torch.tensor([[0.0, 3.0, 1.0, 3.0]])
    got = csrc.sample(**arguments(logits, temperature=0.0, top_k=1))
    assert got.tokens.tolist() == [1]
    raw = logits.double().log_softmax(1)
    assert got.logps.item() == got.raw_logps.item() == pytest.approx(raw[0, 1].item(), abs=1e-6)
    assert got.entropies.item() == pytest.approx(-(raw.exp() * raw).sum().item(), abs=1e-6)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_broken_logits_name_the_row(value: float) -> None:
    logits = torch.zeros(3, 70)
    logits[1, 65 if value != -math.inf else slice(None)] = value
    with pytest.raises(RuntimeError, match=r"logits of row 1 \(sample 41, position 7\) hold NaN or \+inf, or nothing"):
        csrc.sample(**arguments(logits, sample_ids=range(40, 43), positions=7))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -1.0}, "temperature of row 0 is -1"),
        ({"temperature": math.nan}, "temperature of row 0 is nan"),
        ({"top_k": -1}, "top_k of row 0 is -1"),
        ({"top_p": 0.0}, "top_p of row 0 is 0, must be above 0"),
        ({"min_p": 1.5}, "min_p of row 0 is 1.5"),
        ({"positions": 2**32}, "position of row 0 is 4294967296"),
    ],
)
def test_options_out_of_range(options: dict[str, Any], message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        csrc.sample(**arguments(torch.zeros(1, 4), **options))


@pytest.mark.parametrize("sample", [csrc.ops.sample.default, reference.sample])
def test_refused_rows_leave_nothing_unwritten(sample: Callable[..., tuple[torch.Tensor, ...]]) -> None:
    """Not even numbers that a replayed graph would hand on; the first option that is wrong gives the status."""
    logits = torch.zeros(8, 70)
    logits[6, 65] = math.nan
    given = arguments(
        logits,
        temperature=[1.0, -1.0, math.inf, 0.7, 1.0, 1.0, 1.0, 1.0],
        top_k=[0, -1, 0, -1, 0, 0, 0, 0],
        top_p=[1.0, 1.0, 1.0, 1.0, math.nan, 1.0, 1.0, 1.0],
        min_p=[0.0, 0.0, 0.0, 0.0, 0.0, 1.5, 0.0, 0.0],
        positions=[0, 0, 0, 0, 0, 0, 0, 2**32],
    )
    tokens, *numbers, statuses = sample(**given | {"seed": torch.tensor([0])})
    assert statuses.tolist() == [0, 1, 1, 2, 3, 4, 6, 5]
    refused = statuses != 0
    assert torch.equal(tokens == -1, refused)
    assert all(torch.equal(column.isnan(), refused) for column in numbers)


def test_fake_versions_have_the_shapes_of_the_real_ones() -> None:
    logits = torch.randn(3, 50)
    given = arguments(logits)
    options = tuple(given[name] for name in ("temperature", "top_k", "top_p", "min_p"))
    keys = (torch.tensor([0]), given["sample_ids"], given["positions"])
    torch.library.opcheck(csrc.ops.sample.default, (logits, *options, *keys))
    torch.library.opcheck(csrc.ops.advance.default, (None, None, None, *decoding_rows(3)))
    cache = torch.randn(3, 2, 16, 16)
    table, lens, starts = (torch.tensor(x, dtype=torch.int32) for x in ([[0, 1]], [20], [0, 2]))
    torch.library.opcheck(
        csrc.ops.paged_attention.default, (torch.randn(2, 4, 16), cache, cache.clone(), table, lens, starts, 1.0)
    )
    rows = torch.randn(2, 2, 16)
    torch.library.opcheck(csrc.ops.write_kv.default, (rows, rows.clone(), cache, cache.clone(), torch.tensor([3, 9])))

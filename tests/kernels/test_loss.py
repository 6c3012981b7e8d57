"""grpo_loss against its definition, token by token in float64, with gradients and metrics."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.kernels.accuracy import with_leaves
from tests.kernels.batches import LAYOUTS, gradients, make_batch
from tests.kernels.cases import AGGREGATIONS, CASES, PUBLIC_CASES
from tests.kernels.formulas import slow_loss
from tests.kernels.shaping import Gradient, Options, check_released_code, check_tables, check_unguided
from thinktwice_kernels import grpo_loss, linear_grpo_loss, loss_count, reference


def assert_equals_definition(batch: dict[str, Any], options: dict[str, Any]) -> None:
    want, want_metrics = slow_loss(batch, options)
    for implementation in (grpo_loss, reference.grpo_loss):
        loss, metrics = implementation(**batch, **options)
        assert_same(batch, loss, metrics, want, want_metrics)


def assert_same(
    batch: dict[str, Any], loss: Tensor, metrics: dict[str, Tensor], want: Tensor, want_metrics: dict[str, float]
) -> None:
    torch.testing.assert_close(loss, want, rtol=1e-9, atol=1e-11)
    for got_gradient, want_gradient in zip(gradients(loss, batch), gradients(want, batch), strict=True):
        torch.testing.assert_close(got_gradient, want_gradient, rtol=1e-9, atol=1e-11)
    assert {name: float(value) for name, value in metrics.items()} == pytest.approx(want_metrics, rel=1e-9, abs=1e-12)
    assert not any(value.requires_grad or value.dim() for value in metrics.values())


@pytest.mark.parametrize("case", PUBLIC_CASES)
@settings(max_examples=40)
@given(
    lengths=LAYOUTS,
    seed=st.integers(0, 10**6),
    loss_mask=st.booleans(),
    token_advantages=st.booleans(),
    zero_advantages=st.booleans(),
    aggregation=st.sampled_from(AGGREGATIONS),
)
def test_equals_the_definition(
    case: str,
    lengths: list[int],
    seed: int,
    loss_mask: bool,
    token_advantages: bool,
    zero_advantages: bool,
    aggregation: dict[str, Any],
) -> None:
    options, tensors = PUBLIC_CASES[case]
    batch = make_batch(
        lengths,
        seed,
        loss_mask=loss_mask,
        token_advantages=token_advantages,
        zero_advantages=zero_advantages,
        **dict.fromkeys(tensors, True),
    )
    assert_equals_definition(batch, {**options, **aggregation})


# Without constants for old_logps, w and sg() the loss is no antiderivative of its gradient.
SMOOTH_CASES = [
    case
    for case, (options, tensors) in CASES.items()
    if options.get("policy_loss") != "cispo" and "guide_mask" not in tensors and "old_logps" in tensors
]


@pytest.mark.parametrize("case", SMOOTH_CASES)
def test_gradcheck(case: str) -> None:
    options, tensors = CASES[case]
    batch = make_batch([3, 0, 4, 1], 5, loss_mask=True, **dict.fromkeys(tensors, True))
    names = [name for name in ("logps", "entropy") if name in batch]

    def loss_of(*leaves: Tensor) -> Tensor:
        moved: dict[str, Any] = dict(zip(names, leaves, strict=True))
        return grpo_loss(**{**batch, **moved}, **options)[0]

    assert torch.autograd.gradcheck(loss_of, tuple(batch[name] for name in names))


def gradient_by(op: Any) -> Gradient:
    """Of an op on log-probabilities."""

    def gradient(batch: dict[str, Any], options: Options) -> Tensor:
        leaf = batch["logps"].clone().requires_grad_()
        return torch.autograd.grad(op(**{**batch, "logps": leaf}, **options)[0], [leaf])[0]

    return gradient


def gradient_by_fused(batch: dict[str, Any], options: Options) -> Tensor:
    """Two tokens, of which the target has the logit z and the other 0: d loss / d z = (1 - p) d loss / d logp."""
    logps = batch["logps"]
    z = logps - torch.log(-torch.expm1(logps))
    hidden = torch.stack([z, torch.zeros_like(z)], 1).requires_grad_()
    given = {name: value for name, value in batch.items() if name != "logps"}
    targets = torch.zeros(len(z), dtype=torch.int64)
    loss, _ = linear_grpo_loss(hidden, torch.eye(2, dtype=torch.float64), targets, **given, **options)
    found = torch.autograd.grad(loss, [hidden])[0][:, 0]
    return found / -torch.expm1(logps)


IMPLEMENTATIONS = {
    "torch": gradient_by(grpo_loss),
    "reference": gradient_by(reference.grpo_loss),
    "fused": gradient_by_fused,
}


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_shaping_weights(name: str) -> None:
    check_tables(IMPLEMENTATIONS[name], highest=0.9 if name == "fused" else math.inf)


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_released_code_compat_is_the_released_formula(name: str) -> None:
    check_released_code(IMPLEMENTATIONS[name], fused=name == "fused")


@pytest.mark.parametrize("op", [grpo_loss, reference.grpo_loss, linear_grpo_loss])
def test_a_guide_mask_without_guided_tokens_changes_nothing(op: Any) -> None:
    batch = make_batch([4, 0, 9, 6], 8, old_logps=True, rollout_logps=True, loss_mask=True)
    leaves: tuple[str, ...] = ("logps",)
    if op is linear_grpo_loss:
        rng, leaves = torch.Generator().manual_seed(1), ("hidden", "weight")
        tokens = batch.pop("logps").numel()
        batch |= {"hidden": torch.randn(tokens, 4, generator=rng), "weight": torch.randn(9, 4, generator=rng)}
        batch["targets"] = torch.randint(0, 9, (tokens,), generator=rng)
    batch = {name: value.detach().float() if value.is_floating_point() else value for name, value in batch.items()}

    def loss_of(given: dict[str, Any], options: Options) -> list[Tensor]:
        own = with_leaves(given, leaves)
        loss, _ = op(**own, **options)
        return [loss, *torch.autograd.grad(loss, [own[name] for name in leaves])]

    check_unguided(loss_of, batch)


def test_a_guided_token_at_the_pole_of_its_weight_is_masked_cleanly() -> None:
    logps = torch.linspace(-12, -7, 64, dtype=torch.float64)
    advantages = -logps.exp() / 2.5e-4
    at_pole = logps.exp() + advantages * 2.5e-4 == 0
    assert at_pole.sum() > 10
    logps, advantages = logps[at_pole].requires_grad_(), advantages[at_pole]
    loss, _ = grpo_loss(
        logps, advantages, torch.tensor([0, len(logps)]), guide_mask=torch.ones(len(logps), dtype=torch.bool)
    )
    assert loss.item() == 0 and not torch.autograd.grad(loss, [logps])[0].any()


@pytest.mark.parametrize("aggregation", AGGREGATIONS, ids=lambda a: a["loss_agg_mode"])
@settings(max_examples=30)
@given(lengths=LAYOUTS, cut=st.integers(0, 5), seed=st.integers(0, 10**6), as_tensor=st.booleans())
def test_micro_batches_with_a_normalizer_add_up_to_the_whole_batch(
    aggregation: dict[str, Any], lengths: list[int], cut: int, seed: int, as_tensor: bool
) -> None:
    wanted = dict.fromkeys(("old_logps", "ref_logps", "rollout_logps", "loss_mask", "guide_mask"), True)
    batch = make_batch(lengths, seed, **wanted)
    options = {**aggregation, "beta": 0.1, "rollout_is": "sequence-truncate"}
    whole, _ = grpo_loss(**batch, **options)
    count = float(batch["loss_mask"].sum()) if aggregation["loss_agg_mode"] == "token-mean" else float(len(lengths))
    count = max(count, 1.0)
    parts = [
        grpo_loss(**part, **options, normalizer=torch.tensor(count) if as_tensor else count)[0]
        for part in split(batch, lengths, min(cut, len(lengths)))
    ]
    total = torch.stack(parts).sum()
    torch.testing.assert_close(total, whole, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(gradients(total, batch), gradients(whole, batch), rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("aggregation", AGGREGATIONS, ids=lambda a: a["loss_agg_mode"])
@pytest.mark.parametrize("kind", ["token-mask", "sequence-mask"])
@settings(max_examples=20)
@given(lengths=LAYOUTS, cut=st.integers(0, 5), seed=st.integers(0, 10**6), cap=st.sampled_from([0.2, 1.3, 1e9]))
def test_counts_of_micro_batches_add_up_to_what_the_whole_batch_divides_by(
    aggregation: dict[str, Any], kind: str, lengths: list[int], cut: int, seed: int, cap: float
) -> None:
    wanted = dict.fromkeys(("old_logps", "rollout_logps", "loss_mask", "guide_mask"), True)
    batch = make_batch(lengths, seed, **wanted)
    options = {**aggregation, "rollout_is": kind, "rollout_is_cap": cap, "rollout_is_denominator": "kept"}
    parts = split(batch, lengths, min(cut, len(lengths)))
    names = ("cu_seqlens", *wanted)
    counts = [loss_count(**{name: part[name] for name in names}, **options) for part in parts]
    whole, metrics = grpo_loss(**batch, **options)
    count = torch.stack(counts).sum().clamp(min=1)
    found = [grpo_loss(**part, **options, normalizer=count)[0] for part in parts]
    torch.testing.assert_close(torch.stack(found).sum(), whole, rtol=1e-12, atol=1e-13)
    plain, before = grpo_loss(**batch, **{**options, "rollout_is_denominator": "all"})
    assert metrics["tokens"] + metrics["tokens_dropped"] == before["tokens"]
    assert metrics["tokens_dropped"] == before["tokens_dropped"]
    if not metrics["tokens_dropped"]:
        assert torch.equal(whole, plain)


def split(batch: dict[str, Any], lengths: list[int], cut: int) -> list[dict[str, Any]]:
    at = sum(lengths[:cut])
    first = {name: tensor[:at] for name, tensor in batch.items()}
    second = {name: tensor[at:] for name, tensor in batch.items()}
    first |= {"advantages": batch["advantages"][:cut], "cu_seqlens": batch["cu_seqlens"][: cut + 1]}
    second |= {"advantages": batch["advantages"][cut:], "cu_seqlens": batch["cu_seqlens"][cut:] - at}
    return [first, second]


@pytest.mark.parametrize("case", PUBLIC_CASES)
def test_values_of_unread_tokens_do_not_matter(case: str) -> None:
    options, tensors = PUBLIC_CASES[case]
    clean, dirty = (make_batch([4, 3, 5], 3, **dict.fromkeys(tensors, True)) for _ in range(2))
    unread = torch.arange(12) % 3 == 1
    clean["loss_mask"] = dirty["loss_mask"] = ~unread
    with torch.no_grad():
        for i, name in enumerate(sorted({"logps", *tensors} - {"guide_mask"})):
            dirty[name][unread] = [math.nan, math.inf, -math.inf][i % 3]
    (a, a_metrics), (b, b_metrics) = (grpo_loss(**batch, **options) for batch in (clean, dirty))
    assert torch.equal(a, b) and a_metrics == b_metrics
    for x, y in zip(gradients(a, clean), gradients(b, dirty), strict=True):
        assert torch.equal(x, y)


def test_skipped_tokens_are_not_read_but_counted() -> None:
    logps = torch.tensor([-1.0, math.nan, math.nan, -2.0], requires_grad=True)
    advantages, cu_seqlens = torch.tensor([1.0, 0.0, -1.0]), torch.tensor([0, 1, 3, 4])
    loss, metrics = grpo_loss(logps, advantages, cu_seqlens)
    (gradient,) = torch.autograd.grad(loss, [logps])
    assert gradient.tolist() == [-0.25, 0.0, 0.0, 0.25]
    assert (metrics["tokens"], metrics["tokens_skipped"], metrics["tokens_with_gradient"]) == (4, 2, 2)
    with_kl, _ = grpo_loss(logps, advantages, cu_seqlens, beta=0.1, ref_logps=torch.zeros(4))
    assert with_kl.isnan()


@pytest.mark.parametrize("case", CASES)
def test_nan_in_gives_nan_out(case: str) -> None:
    options, tensors = CASES[case]
    if options.get("rollout_is", "none").endswith("mask"):
        options = {**options, "rollout_is_cap": 1e9, "rollout_is_floor": None}  # a dropped token would not be read
    used = {
        "logps": True,
        "advantages": True,
        "old_logps": "old_logps" in tensors and "released_code_compat" not in options,
        "ref_logps": "beta" in options,
        "rollout_logps": "rollout_is" in options,
        "entropy": "entropy_coef" in options,
    }
    for name in (name for name, matters in used.items() if matters):
        batch = make_batch([4, 3], 3, **dict.fromkeys(tensors, True))
        if "guide_mask" in tensors:
            batch["guide_mask"][:] = torch.tensor([False, True, False, True, False, False, False])
        with torch.no_grad():
            batch[name][-1] = math.nan
        assert grpo_loss(**batch, **options)[0].isnan(), name


@pytest.mark.parametrize("policy_loss", ["clip", "cispo", "sapo"])
@pytest.mark.parametrize("gap", [100.0, 1000.0, -1000.0])
def test_huge_ratios_are_clipped_without_nan(policy_loss: Any, gap: float) -> None:
    logps = torch.tensor([-1.0, -1.0], requires_grad=True)
    loss, metrics = grpo_loss(
        logps,
        torch.tensor([1.0, -1.0]),
        torch.tensor([0, 1, 2]),
        old_logps=logps.detach() - gap,
        policy_loss=policy_loss,
        dual_clip=3.0 if policy_loss == "clip" else None,
    )
    (gradient,) = torch.autograd.grad(loss, [logps])
    assert loss.isfinite() and gradient.isfinite().all()
    if policy_loss == "clip":
        assert loss.item() == pytest.approx((-1.2 + 3) / 2 if gap > 0 else 0.8 / 2)
        assert gradient.tolist() == [0.0, 0.0]
        assert metrics["tokens_with_gradient"] == (0 if gap > 0 else 1)


def test_masked_rollout_weights_silence_infinite_objectives() -> None:
    logps = torch.tensor([-1.0], requires_grad=True)
    loss, _ = grpo_loss(
        logps,
        torch.tensor([-1.0]),
        torch.tensor([0, 1]),
        old_logps=torch.tensor([-1000.0]),
        rollout_logps=torch.tensor([-2000.0]),
        rollout_is="token-mask",
    )
    assert loss.item() == 0 and torch.autograd.grad(loss, [logps])[0].item() == 0


@pytest.mark.parametrize("aggregation", AGGREGATIONS, ids=lambda a: a["loss_agg_mode"])
@pytest.mark.parametrize("lengths", [[], [0], [0, 0]])
@pytest.mark.parametrize("level", ["token", "sequence"])
def test_no_tokens(aggregation: dict[str, Any], lengths: list[int], level: Any) -> None:
    batch = make_batch(lengths, 0)
    loss, metrics = grpo_loss(**batch, **aggregation, importance_sampling_level=level)
    loss.backward()
    assert loss.item() == 0 and batch["logps"].grad.shape == (0,)
    assert all(value == 0 for value in metrics.values())


def test_everything_masked() -> None:
    batch = make_batch([2, 3], 0)
    for aggregation in AGGREGATIONS:
        loss, _ = grpo_loss(**batch, **aggregation, loss_mask=torch.zeros(5))
        assert loss.item() == 0 and gradients(loss, batch)[0].tolist() == [0.0] * 5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_low_precision_inputs_are_computed_in_float32(dtype: torch.dtype) -> None:
    exact = make_batch([4, 3], 2, old_logps=True, ref_logps=True)
    rounded = {name: tensor if name == "cu_seqlens" else tensor.detach().to(dtype) for name, tensor in exact.items()}
    wide = {name: tensor if name == "cu_seqlens" else tensor.double() for name, tensor in rounded.items()}
    loss, metrics = grpo_loss(**rounded, beta=0.1)
    want, want_metrics = grpo_loss(**wide, beta=0.1)
    assert loss.dtype == metrics["ratio_mean"].dtype == torch.float32
    assert loss.item() == pytest.approx(want.item(), rel=1e-5)
    assert metrics["approx_kl"].item() == pytest.approx(want_metrics["approx_kl"].item(), rel=1e-5)


def test_advantages_per_token_equal_those_per_sequence() -> None:
    batch = make_batch([2, 0, 3], 4, old_logps=True)
    spread = {**batch, "advantages": batch["advantages"].repeat_interleave(torch.tensor([2, 0, 3]))}
    assert torch.equal(grpo_loss(**batch)[0], grpo_loss(**spread)[0])


@pytest.mark.parametrize("aggregation", AGGREGATIONS, ids=lambda a: a["loss_agg_mode"])
def test_the_sequence_ratio_has_the_gradient_of_its_per_token_form(aggregation: dict[str, Any]) -> None:
    batch = make_batch([3, 2], 1, old_logps=True)
    logps, old = batch["logps"], batch["old_logps"]
    ratio = torch.stack([(logps - old)[:3].mean(), (logps - old)[3:].mean()]).exp().detach()
    per_token = ratio.repeat_interleave(torch.tensor([3, 2])) * (logps - logps.detach()).exp()
    # A ratio per token whose value is the sequence's: what policy_loss "clip" with wide bounds makes of it.
    wide: dict[str, Any] = {"epsilon_low": 1.0, "epsilon_high": 1e9, **aggregation}
    stand_in = {**batch, "logps": per_token.log(), "old_logps": torch.zeros(5, dtype=torch.float64)}
    a = torch.autograd.grad(grpo_loss(**batch, importance_sampling_level="sequence", **wide)[0], [logps])[0]
    b = torch.autograd.grad(grpo_loss(**stand_in, **wide)[0], [logps])[0]
    assert a.abs().min() > 1e-4
    torch.testing.assert_close(a, b)


def test_cu_seqlens_may_be_int64() -> None:
    batch = make_batch([2, 0, 3], 4)
    other = {**batch, "cu_seqlens": batch["cu_seqlens"].long()}
    assert torch.equal(grpo_loss(**batch)[0], grpo_loss(**other)[0])

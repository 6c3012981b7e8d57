"""The drop-in against Liger's own loss, and against formulas where the two differ on purpose."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss as Peer
from torch import Tensor

from thinktwice_kernels.integrations.liger import LigerFusedLinearGRPOLoss

LOSS_TYPES = ("grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "luspo", "vespo")
B, L, H, V = 5, 7, 16, 33
LENGTHS = torch.tensor([7, 3, 1, 6, 0])


def make_inputs(padded: bool = True, seed: int = 0) -> dict[str, Any]:
    """Float32; log-probabilities around log 1/33, ratios within about e^+-1, rewards of either sign and one of 0."""
    rng = torch.Generator().manual_seed(seed)

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return torch.randn(*shape, generator=rng) * scale

    hidden, weight, bias = normal(B, L, H), normal(V, H, scale=0.3), normal(V, scale=0.3)
    ids = torch.randint(0, V, (B, L), generator=rng)
    logps = torch.log_softmax((hidden @ weight.T + bias) / 0.9, -1).gather(-1, ids[..., None]).squeeze(-1)
    mask = torch.arange(L) < LENGTHS[:, None] if padded else torch.ones(B, L, dtype=torch.bool)
    return {
        "_input": hidden.requires_grad_(),
        "lin_weight": weight.requires_grad_(),
        "bias": bias.requires_grad_(),
        "selected_token_ids": ids,
        "attention_mask": mask.float(),
        "advantages": torch.tensor([1.2, -0.7, 0.4, 0.0, -1.0]),
        "old_per_token_logps": logps.detach() + normal(B, L, scale=0.5),
        "ref_per_token_logps": logps.detach() + normal(B, L, scale=0.5),
    }


def run(loss: torch.nn.Module, inputs: dict[str, Any]) -> tuple[Tensor, tuple[Tensor, ...], list[Tensor]]:
    value, metrics = loss(**inputs)
    leaves = [tensor for tensor in inputs.values() if isinstance(tensor, Tensor) and tensor.requires_grad]
    # Not 1: a loss that forgets its incoming gradient shows.
    return value.detach(), metrics, list(torch.autograd.grad(value * 0.37, leaves))


def options(loss_type: str, **wanted: Any) -> dict[str, Any]:
    # cispo's bound is on the ratio itself.
    chosen = {"loss_type": loss_type, "temperature": 0.9, "epsilon_high": 1.3 if loss_type == "cispo" else 0.3}
    if loss_type == "dr_grpo":
        chosen["max_completion_length"] = 11
    return chosen | wanted


def assert_same(chosen: dict[str, Any], inputs: dict[str, Any]) -> None:
    ours = run(LigerFusedLinearGRPOLoss(**chosen), inputs)
    theirs = run(Peer(**chosen, compiled=False), inputs)
    torch.testing.assert_close(ours[0], theirs[0], rtol=1e-5, atol=1e-6)
    assert len(ours[1]) == len(theirs[1])
    for mine, other in zip(ours[1], theirs[1], strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-6)
    for mine, other in zip(ours[2], theirs[2], strict=True):
        assert other.abs().max() > 0
        assert (mine - other).norm() <= 1e-5 * other.norm()


@pytest.mark.parametrize("beta", [0.0, 0.04])
@pytest.mark.parametrize(
    ("loss_type", "level"),
    [
        *((name, "token") for name in LOSS_TYPES if name != "luspo"),
        *((name, "sequence") for name in ("grpo", "bnpo", "dr_grpo", "dapo")),
    ],
)
def test_as_liger(loss_type: str, level: str, beta: float) -> None:
    assert_same(options(loss_type, importance_sampling_level=level, beta=beta), make_inputs())


@pytest.mark.parametrize("beta", [0.0, 0.04])
@pytest.mark.parametrize("level", ["token", "sequence"])
def test_luspo_as_liger_without_padding(level: str, beta: float) -> None:
    assert_same(options("luspo", importance_sampling_level=level, beta=beta), make_inputs(padded=False))


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_on_policy_and_without_bias(loss_type: str) -> None:
    inputs = make_inputs(padded=loss_type != "luspo")
    inputs["old_per_token_logps"] = inputs["bias"] = None
    assert_same(options(loss_type, beta=0.04), inputs)


@pytest.mark.parametrize("shape", [(B,), (B, 1), (B, L)])
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_rollout_ratio(loss_type: str, shape: tuple[int, ...]) -> None:
    inputs = make_inputs(padded=loss_type != "luspo")
    ratio = torch.rand(shape, generator=torch.Generator().manual_seed(1)) + 0.5
    # Of masked tokens too, Liger's vespo takes the ratio into the sequence's weight.
    inputs["vllm_is_ratio"] = (
        ratio if len(shape) == 1 else torch.where(inputs["attention_mask"][:, : shape[1]] != 0, ratio, 1)
    )
    assert_same(options(loss_type, beta=0.04), inputs)


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("loss_type", ["grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "vespo", "luspo"])
def test_bias_corrected_kl(loss_type: str, level: str) -> None:
    if level == "sequence" and loss_type in ("cispo", "sapo", "vespo"):
        return
    inputs = make_inputs(padded=loss_type != "luspo")
    assert_same(options(loss_type, importance_sampling_level=level, beta=0.3, use_bias_correction_kl=True), inputs)


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("loss_type", ["grpo", "bnpo", "dr_grpo", "dapo"])
def test_delta(loss_type: str, level: str) -> None:
    inputs = make_inputs()
    inputs["old_per_token_logps"] = inputs["old_per_token_logps"] - 0.6
    assert_same(options(loss_type, importance_sampling_level=level, beta=0.0, delta=1.5), inputs)


@pytest.mark.parametrize("bound", [0.2, 0.999, 1.0, 5.0])
def test_bounds_of_cispo(bound: float) -> None:
    assert_same(options("cispo", epsilon_high=bound, beta=0.0), make_inputs())


@pytest.mark.parametrize("items", [3.0, torch.tensor(40), 0])
@pytest.mark.parametrize("loss_type", ["dapo", "cispo", "vespo", "grpo"])
def test_num_items_in_batch(loss_type: str, items: Any) -> None:
    assert_same(options(loss_type, beta=0.04), make_inputs() | {"num_items_in_batch": items})


@pytest.mark.parametrize("items", [None, 90.0])
@pytest.mark.parametrize("loss_type", ["dapo", "vespo", "grpo"])
def test_several_processes(loss_type: str, items: float | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three other processes hold 10 tokens each."""
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda: 4)
    monkeypatch.setattr(dist, "all_reduce", lambda tensor, **_: tensor.add_(30))
    assert_same(options(loss_type, beta=0.04), make_inputs() | {"num_items_in_batch": items})


@pytest.mark.parametrize("loss_type", ["dapo", "cispo"])
def test_reference_from_hidden_states(loss_type: str) -> None:
    inputs = make_inputs()
    del inputs["ref_per_token_logps"]
    inputs["ref_input"] = inputs["_input"].detach() + 0.1
    inputs["ref_weight"], inputs["ref_bias"] = inputs["lin_weight"].detach() * 1.1, inputs["bias"].detach() + 0.1
    assert_same(options(loss_type, beta=0.3), inputs)


def test_without_reference_the_kl_is_zero() -> None:
    inputs = make_inputs()
    del inputs["ref_per_token_logps"]
    assert_same(options("dapo", beta=0.04, use_ref_model=False), inputs)


def test_a_frozen_weight_gets_no_gradient() -> None:
    inputs = make_inputs()
    inputs["lin_weight"] = inputs["lin_weight"].detach()
    assert_same(options("dapo", beta=0.0), inputs)


def test_long_sequences_of_bfloat16() -> None:
    """Liger rounds the weight's gradient after every sequence, the drop-in once: it has to be nearer the truth."""
    rng = torch.Generator().manual_seed(0)
    sequences, length = 24, 20
    hidden, weight = torch.randn(sequences, length, H, generator=rng), torch.randn(V, H, generator=rng)
    inputs: dict[str, Any] = {
        "_input": hidden.bfloat16(),
        "lin_weight": weight.bfloat16().requires_grad_(),
        "selected_token_ids": torch.randint(0, V, (sequences, length), generator=rng),
        "attention_mask": torch.ones(sequences, length),
        "advantages": torch.ones(sequences),
    }
    exact = inputs | {"_input": inputs["_input"].float(), "lin_weight": weight.bfloat16().float().requires_grad_()}
    truth = run(LigerFusedLinearGRPOLoss(beta=0.0), exact)[2][0]
    errors = [
        (run(loss, inputs)[2][0].float() - truth).norm() / truth.norm()
        for loss in (LigerFusedLinearGRPOLoss(beta=0.0), Peer(beta=0.0, compiled=False, use_ref_model=False))
    ]
    assert errors[0] < 4e-3  # one rounding to bfloat16 is 2^-9
    assert errors[0] < errors[1]


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_masked_tokens_may_hold_anything(loss_type: str) -> None:
    """Neither value nor gradient depends on padding, though Liger's luspo and vespo do."""
    chosen = options(loss_type, beta=0.3, use_bias_correction_kl=loss_type in ("luspo", "sapo"))
    clean = make_inputs() | {"vllm_is_ratio": torch.full((B, L), 1.2)}
    dirty = dict(clean)
    masked = clean["attention_mask"] == 0
    for name in ("old_per_token_logps", "ref_per_token_logps", "vllm_is_ratio"):
        dirty[name] = clean[name].masked_fill(masked, torch.nan)
    dirty["selected_token_ids"] = clean["selected_token_ids"].masked_fill(masked, -100)
    hidden = clean["_input"].detach().clone()
    hidden[masked] = torch.inf
    dirty["_input"] = hidden.requires_grad_()
    expected, found = run(LigerFusedLinearGRPOLoss(**chosen), clean), run(LigerFusedLinearGRPOLoss(**chosen), dirty)
    assert torch.equal(expected[0], found[0])
    for mine, other in zip(expected[2], found[2], strict=True):
        assert torch.equal(mine, other)
    for mine, other in zip(expected[1], found[1], strict=True):
        assert torch.equal(mine, other)


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_luspo_sums_each_sequences_own_tokens(level: str) -> None:
    inputs = make_inputs() | {"bias": None}
    logits = inputs["_input"] @ inputs["lin_weight"].T / 0.9
    logps = torch.log_softmax(logits, -1).gather(-1, inputs["selected_token_ids"][..., None]).squeeze(-1)
    expected = torch.zeros(())
    for row, length in enumerate(LENGTHS.tolist()):
        log_ratio = (logps - inputs["old_per_token_logps"])[row, :length]
        ratio = (log_ratio.mean() if level == "sequence" and length else log_ratio).exp()
        advantage = inputs["advantages"][row]
        term = -torch.min(ratio * advantage, ratio.clamp(0.8, 1.3) * advantage)
        expected = expected + (term.expand(length).sum() if length else 0)
    loss, _ = LigerFusedLinearGRPOLoss(**options("luspo", importance_sampling_level=level, beta=0.0))(**inputs)
    torch.testing.assert_close(loss, expected / B, rtol=1e-5, atol=1e-6)
    leaves = [inputs["_input"], inputs["lin_weight"]]
    for mine, other in zip(torch.autograd.grad(loss, leaves), torch.autograd.grad(expected / B, leaves), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ({"loss_type": "ppo"}, "unknown loss_type 'ppo': choose one of grpo"),
        ({"loss_type": "dr_grpo"}, "pass max_completion_length"),
        ({"importance_sampling_level": "word"}, "choose one of token, sequence"),
        ({"loss_type": "cispo", "importance_sampling_level": "word"}, "choose one of token, sequence"),
        ({"delta": 1.1}, "choose a number above 1"),
        ({"delta": 2.0, "loss_type": "sapo"}, "leave it at None"),
        ({"sapo_temperature_pos": 0.0, "loss_type": "sapo"}, "choose a positive number"),
    ],
)
def test_options_that_make_no_sense(wanted: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LigerFusedLinearGRPOLoss(**wanted)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"_input": torch.zeros(B * L, H)}, "_input has shape"),
        ({"advantages": torch.zeros(B, L)}, r"pass one per sequence, \[5\]"),
        ({"old_per_token_logps": torch.zeros(B)}, "old_per_token_logps has shape"),
        ({"ref_per_token_logps": torch.zeros(B)}, "ref_per_token_logps has shape"),
        ({"ref_per_token_logps": None}, "pass ref_per_token_logps, or ref_input"),
        (
            {"ref_per_token_logps": None, "ref_input": torch.zeros(B, 2, H), "ref_weight": torch.zeros(V, H)},
            "ref_input has",
        ),
        ({"vllm_is_ratio": torch.zeros(B, 2)}, "vllm_is_ratio has shape"),
        ({"attention_mask": torch.full((B, L), 0.5)}, "other values than 0 and 1"),
    ],
)
def test_inputs_that_do_not_fit(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LigerFusedLinearGRPOLoss()(**make_inputs() | changes)


def test_a_reference_that_would_not_be_read() -> None:
    with pytest.raises(ValueError, match="set it to True"):
        LigerFusedLinearGRPOLoss(use_ref_model=False)(**make_inputs())


@pytest.mark.parametrize("loss_type", ["cispo", "sapo", "vespo"])
def test_sequence_level_as_liger_refuses_it(loss_type: str) -> None:
    with pytest.raises(ValueError, match="Sequence-level importance sampling is not supported"):
        LigerFusedLinearGRPOLoss(loss_type=loss_type, importance_sampling_level="sequence")(**make_inputs())

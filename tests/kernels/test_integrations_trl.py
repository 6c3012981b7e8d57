"""A patched GRPOTrainer against a stock one: losses, gradients of the parameters, and logged metrics."""

import importlib.metadata
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch import Tensor
from trl import GRPOConfig, GRPOTrainer
from trl.trainer import utils

from tests.small_models import bpe_tokenizer, write_model
from thinktwice_kernels.integrations import trl as integration
from thinktwice_kernels.integrations.trl import patch

LOSS_TYPES = ("grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "luspo", "vespo")
PROMPT, L = 4, 6
LENGTHS = torch.tensor([6, 2, 1, 5])
B = len(LENGTHS)
DATA = Dataset.from_list([{"prompt": "How many clips?"}, {"prompt": "What is 12 + 7?"}] * 4)


def count_e(completions: list[str], **_: Any) -> list[float | None]:
    return [text.count("e") + 0.1 * (len(text) % 7) for text in completions]


@pytest.fixture(scope="module", params=["qwen3", "llama"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp(request.param), request.param)


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("qwen"), "qwen3")


@pytest.fixture(autouse=True)
def no_patch_remains() -> Iterator[None]:
    integration._log_once.cache_clear()
    stock = GRPOTrainer._compute_loss, utils._ChunkedLogProbFunction, utils._use_triton
    yield
    assert stock == (GRPOTrainer._compute_loss, utils._ChunkedLogProbFunction, utils._use_triton)


def make_trainer(folder: Path, **wanted: Any) -> Any:
    """A GRPOTrainer: Any, for the tests reach into it."""
    settings: dict[str, Any] = {
        "output_dir": str(folder / "out"),
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "per_device_train_batch_size": B,
        "num_generations": 2,
        "max_completion_length": L,
        "temperature": 0.9,
        "seed": 3,
    }
    trainer = GRPOTrainer(str(folder), count_e, GRPOConfig(**settings | wanted), DATA, processing_class=bpe_tokenizer())
    trainer.current_gradient_accumulation_steps = 3
    return trainer


def make_inputs(trainer: Any, seed: int = 0) -> dict[str, Any]:
    """Prompts padded on the left, completions on the right; ratios within about e^+-1, advantages of any sign."""
    rng = torch.Generator().manual_seed(seed)
    prompt_mask = (torch.arange(PROMPT) >= torch.tensor([0, 1, 2, 0])[:, None]).long()
    completion_mask = (torch.arange(L) < LENGTHS[:, None]).long()
    inputs = {
        "prompt_ids": torch.randint(3, 500, (B, PROMPT), generator=rng),
        "prompt_mask": prompt_mask,
        "completion_ids": torch.randint(3, 500, (B, L), generator=rng),
        "completion_mask": completion_mask,
        "advantages": torch.tensor([1.1, -0.6, 0.0, -1.4]),
        "num_items_in_batch": torch.tensor(29),
    }
    with torch.no_grad():
        logps, _, _ = trainer._get_per_token_logps_and_entropies(
            trainer.model,
            torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1),
            torch.cat([prompt_mask, completion_mask], 1),
            L,
        )
    for name in ("old_per_token_logps", "ref_per_token_logps", "sampling_per_token_logps"):
        inputs[name] = (logps + 0.5 * torch.randn(B, L, generator=rng)) * completion_mask
    return inputs


def loss_of(trainer: Any, inputs: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor], dict[str, list[float]]]:
    """Loss, gradients and what was logged."""
    trainer.model.zero_grad()
    trainer._metrics["train"].clear()
    trainer.model.train()
    loss = trainer._compute_loss(trainer.model, inputs)
    (loss * 0.7).backward()
    gradients = {name: p.grad.clone() for name, p in trainer.model.named_parameters() if p.grad is not None}
    return loss.detach(), gradients, dict(trainer._metrics["train"])


def assert_same(trainer: Any, inputs: dict[str, Any]) -> None:
    loss, gradients, logged = loss_of(trainer, inputs)
    with patch():
        ours = loss_of(trainer, inputs)
    torch.testing.assert_close(ours[0], loss, rtol=1e-5, atol=1e-6)
    assert ours[1].keys() == gradients.keys()
    size = torch.stack([gradient.norm() for gradient in gradients.values()]).norm()
    assert size > 1e-4
    for name, gradient in gradients.items():
        assert (ours[1][name] - gradient).norm() <= 1e-5 * gradient.norm() + 1e-6 * size, name
    assert ours[2].keys() == logged.keys() and logged
    for name, values in logged.items():
        assert ours[2][name] == pytest.approx(values, rel=1e-5, abs=1e-6, nan_ok=True), name


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """How often each op ran, and the rows scored: a patch that falls back to TRL would pass every comparison."""
    seen: dict[str, Any] = {"linear_logprobs": 0, "grpo_loss": 0, "rows": []}

    def counted(owner: Any, name: str) -> None:
        original = getattr(owner, name)

        def op(*args: Any, **kwargs: Any) -> Any:
            seen[name] += 1
            if name == "linear_logprobs":
                seen["rows"].append((len(args[0]), args[0].dtype))
            return original(*args, **kwargs)

        monkeypatch.setattr(owner, name, op)

    from thinktwice_kernels.integrations import padded

    counted(integration, "linear_logprobs")
    counted(padded, "grpo_loss")
    return seen


# Of the completions' tokens only: neither prompt nor padding.
ONE_CALL_EACH = {"linear_logprobs": 1, "grpo_loss": 1, "rows": [(int(LENGTHS.sum()), torch.float32)]}


@pytest.mark.parametrize("beta", [0.0, 0.04])
@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_every_loss(model: Path, loss_type: str, level: str, beta: float, calls: dict[str, Any]) -> None:
    trainer = make_trainer(
        model,
        loss_type=loss_type,
        importance_sampling_level=level,
        beta=beta,
        epsilon=0.2,
        epsilon_high=1.2 if loss_type == "cispo" else 0.3,
    )
    assert_same(trainer, make_inputs(trainer))
    assert calls == ONE_CALL_EACH


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_on_policy(qwen: Path, loss_type: str, calls: dict[str, Any]) -> None:
    trainer = make_trainer(qwen, loss_type=loss_type, beta=0.04)
    inputs = make_inputs(trainer)
    del inputs["old_per_token_logps"], inputs["sampling_per_token_logps"]
    assert_same(trainer, inputs)
    assert calls["grpo_loss"] == 1


OPTION_SETS = [
    {"delta": 1.5},
    {"delta": 1.5, "importance_sampling_level": "sequence"},
    {"top_entropy_quantile": 0.4},
    {"top_entropy_quantile": 0.4, "importance_sampling_level": "sequence", "loss_type": "luspo"},
    {"use_bias_correction_kl": True},
    {"use_bias_correction_kl": True, "importance_sampling_level": "sequence", "loss_type": "grpo"},
    {"use_bias_correction_kl": True, "loss_type": "bnpo"},
    {"use_bias_correction_kl": True, "loss_type": "dr_grpo"},
    {"use_bias_correction_kl": True, "loss_type": "luspo"},
    {"loss_type": "cispo", "epsilon_high": 0.2},
    {"loss_type": "vespo", "vespo_k_pos": 1.5, "vespo_lambda_neg": 1.0, "top_entropy_quantile": 0.5},
    {"loss_type": "sapo", "sapo_temperature_pos": 2.0, "sapo_temperature_neg": 0.5},
]


@pytest.mark.parametrize("options", OPTION_SETS, ids=str)
def test_options_of_the_loss(qwen: Path, options: dict[str, Any], calls: dict[str, Any]) -> None:
    trainer = make_trainer(qwen, beta=0.3, **options)
    assert_same(trainer, make_inputs(trainer))
    assert calls == ONE_CALL_EACH


@pytest.mark.parametrize(
    ("loss_type", "of"),
    [
        ("dapo", "sampling_per_token_logps"),
        ("dapo", "old_per_token_logps"),
        ("sapo", "old_per_token_logps"),
        ("vespo", "sampling_per_token_logps"),
    ],
)
def test_off_policy_mask(qwen: Path, loss_type: str, of: str) -> None:
    """The last sequence, of a negative advantage, drops out."""
    trainer = make_trainer(qwen, loss_type=loss_type, off_policy_mask_threshold=0.8, top_entropy_quantile=0.6)
    inputs = make_inputs(trainer)
    if of == "old_per_token_logps":
        del inputs["sampling_per_token_logps"]
    inputs[of][-1] += 2.0
    assert_same(trainer, inputs)
    masked = loss_of(trainer, inputs)[0]
    trainer.off_policy_mask_threshold = 1e9
    assert (loss_of(trainer, inputs)[0] - masked).abs() > 1e-4


@pytest.mark.parametrize(
    "options",
    [
        {"entropy_coef": 0.1},
        {"use_adaptive_entropy": True, "entropy_coef": 0.1, "entropy_target": 20.0},
        {"delta": 1.1},
        {"delta": 2.0, "loss_type": "sapo"},
    ],
    ids=str,
)
def test_options_that_stay_trls(
    qwen: Path, options: dict[str, Any], calls: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    """Their loss is TRL's own, on the new log-probabilities and entropies, and the log says so once."""
    trainer = make_trainer(qwen, beta=0.04, **options)
    inputs = make_inputs(trainer)
    with caplog.at_level(logging.WARNING, logger=integration.__name__), patch():
        loss_of(trainer, inputs)
        loss_of(trainer, inputs)
    assert len([record for record in caplog.records if "TRL's own code" in record.message]) == 1
    assert calls["linear_logprobs"] == 2 and calls["grpo_loss"] == 0
    coefficient = trainer.entropy_coef
    stock = loss_of(trainer, inputs)
    trainer.entropy_coef = coefficient
    with patch():
        ours = loss_of(trainer, inputs)
    torch.testing.assert_close(ours[0], stock[0], rtol=1e-5, atol=1e-6)
    for name, gradient in stock[1].items():
        torch.testing.assert_close(ours[1][name], gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("shape", [(B, 1), (B, L)])
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_rollout_correction(qwen: Path, loss_type: str, shape: tuple[int, int], calls: dict[str, Any]) -> None:
    trainer = make_trainer(qwen, loss_type=loss_type, beta=0.04)
    inputs = make_inputs(trainer)
    ratio = torch.rand(shape, generator=torch.Generator().manual_seed(5)) * 1.5
    ratio[1] = 0  # what the mask modes make of a ratio out of bounds
    inputs["importance_sampling_ratio"] = torch.where(inputs["completion_mask"][:, : shape[1]] != 0, ratio, 1)
    trainer.use_vllm = True
    assert_same(trainer, inputs)
    assert calls["grpo_loss"] == 1
    if loss_type != "vespo":
        trainer.vllm_importance_sampling_correction = False
        assert_same(trainer, inputs)


@pytest.mark.parametrize("loss_type", ["dapo", "vespo", "grpo"])
def test_advantages_of_tokens_and_a_tool_mask(qwen: Path, loss_type: str) -> None:
    trainer = make_trainer(qwen, loss_type=loss_type, beta=0.04)
    inputs = make_inputs(trainer)
    inputs["advantages"] = torch.randn(B, L, generator=torch.Generator().manual_seed(7))
    inputs["tool_mask"] = torch.ones(B, L, dtype=torch.long)
    inputs["tool_mask"][0, 2:4] = 0
    assert_same(trainer, inputs)


@pytest.mark.parametrize("loss_type", ["cispo", "grpo"])
def test_several_processes_and_steps(qwen: Path, loss_type: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """dapo, cispo and vespo divide by the share of the tokens that falls to one process and optimiser step."""
    trainer = make_trainer(qwen, loss_type=loss_type, steps_per_generation=2)
    inputs = make_inputs(trainer)
    monkeypatch.setattr(type(trainer.accelerator), "num_processes", 2)
    assert_same(trainer, inputs)


@pytest.mark.parametrize("loss_type", ["dapo", "grpo"])
def test_evaluation(qwen: Path, loss_type: str) -> None:
    trainer = make_trainer(qwen, loss_type=loss_type)
    inputs = make_inputs(trainer)
    trainer.model.eval()
    with torch.no_grad():
        expected = trainer._compute_loss(trainer.model, inputs)
        with patch():
            found = trainer._compute_loss(trainer.model, inputs)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    assert len(trainer._metrics["eval"]["entropy"]) == 2 and not trainer._metrics["train"]


@pytest.mark.parametrize(
    "attributes", [{"final_logit_softcapping": 3.0}, {"logit_scale": 0.3, "final_logit_softcapping": 2.0}]
)
def test_logits_that_the_model_bends(qwen: Path, attributes: dict[str, float], monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import Qwen3Config

    for name, value in attributes.items():
        monkeypatch.setattr(Qwen3Config, name, value, raising=False)
    trainer = make_trainer(qwen)
    assert_same(trainer, make_inputs(trainer))


def test_a_negative_logit_scale_stays_trls(qwen: Path, monkeypatch: pytest.MonkeyPatch, calls: dict[str, Any]) -> None:
    from transformers import Qwen3Config

    monkeypatch.setattr(Qwen3Config, "logit_scale", -0.5, raising=False)
    trainer = make_trainer(qwen)
    assert_same(trainer, make_inputs(trainer))
    assert calls["linear_logprobs"] == 0


def test_bfloat16_autocast(qwen: Path, calls: dict[str, Any]) -> None:
    """Both round the output layer's inputs; only TRL rounds the logits too."""
    trainer = make_trainer(qwen, loss_type="grpo")
    inputs = make_inputs(trainer)
    truth = loss_of(trainer, inputs)
    with torch.autocast("cpu", torch.bfloat16):
        stock = loss_of(trainer, inputs)
        with patch():
            ours = loss_of(trainer, inputs)

    assert calls["rows"] == [(int(LENGTHS.sum()), torch.bfloat16)]

    def error(gradients: dict[str, Tensor]) -> Tensor:
        return torch.stack([(gradients[name] - exact).norm() for name, exact in truth[1].items()]).norm()

    assert 0 < error(ours[1]) < 1.5 * error(stock[1])


@pytest.mark.parametrize("loss_type", ["dapo", "grpo"])
def test_a_short_training(qwen: Path, loss_type: str, calls: dict[str, Any]) -> None:
    """Two steps with two iterations each on what was generated once, beta 0.04: same weights, same log."""
    logs, weights = [], []
    for patched in (False, True):
        trainer = make_trainer(
            qwen,
            loss_type=loss_type,
            beta=0.04,
            num_iterations=2,
            max_steps=2,
            logging_steps=1,
            learning_rate=1e-3,
            lr_scheduler_type="constant",
        )
        if patched:
            with patch():
                trainer.train()
        else:
            trainer.train()
        logs.append([line for line in trainer.state.log_history if "loss" in line])
        weights.append({name: p.detach().clone() for name, p in trainer.model.named_parameters()})
    assert calls["linear_logprobs"] > 0 and calls["grpo_loss"] == 2
    untrained = make_trainer(qwen).model.state_dict()
    for name, value in weights[0].items():
        step = (value - untrained[name]).norm()
        # Adam's steps are of one size however small the gradient, so that noise of 1e-7 shows where it is near 0.
        assert step > 0 and (weights[1][name] - value).norm() <= 1e-2 * step, name
    assert len(logs[0]) == len(logs[1]) == 2
    for stock, ours in zip(*logs, strict=True):
        assert stock.keys() == ours.keys()
        for name, value in stock.items():
            if "time" not in name and "runtime" not in name:
                assert ours[name] == pytest.approx(value, rel=1e-4, abs=1e-5, nan_ok=True), name


def test_other_trainers_keep_their_own(qwen: Path, calls: dict[str, Any]) -> None:
    trainer = make_trainer(qwen)
    ids = torch.randint(3, 500, (2, 5))
    with patch():
        trainer.model(input_ids=ids, labels=ids, fused_lm_head=True)
        assert not utils._use_triton(ids.device)
    assert calls["linear_logprobs"] == 0


def test_patches_nest_and_come_off_once() -> None:
    stock = GRPOTrainer._compute_loss
    outer, inner = patch(), patch()
    patched = GRPOTrainer._compute_loss
    assert patched is not stock
    inner.undo()
    inner.undo()
    assert GRPOTrainer._compute_loss is patched
    outer.undo()
    assert GRPOTrainer._compute_loss is stock


@pytest.mark.parametrize("version", ["1.15.4", "2.0.0", "1.160.0"])
def test_an_unknown_version(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.metadata, "version", lambda _: version)
    with pytest.raises(RuntimeError, match=rf"TRL {version} is not supported: install trl 1\.16"):
        patch()

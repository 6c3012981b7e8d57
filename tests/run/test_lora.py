"""LoRA in a run: it learns, and is continued where it stopped, on the weights that it was trained on."""

import re
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.checkpoints import save
from tests.command import train
from tests.small_models import own_model
from tests.update.worlds import one_process
from thinktwice_fast.config import Config, ModelOptions
from thinktwice_fast.errors import UserError
from thinktwice_fast.model.loading import model_folder
from thinktwice_fast.model.lora import add_adapters
from thinktwice_fast.model.sharding import pair_models
from thinktwice_fast.run.checkpoint import load_checkpoint
from thinktwice_fast.run.metrics import reproducible
from thinktwice_fast.run.metrics_file import read_metrics
from thinktwice_fast.update.optimizer import build_optimizer
from thinktwice_fast.update.updater import Updater

__all__ = ["one_process"]
RANK_4 = ModelOptions(lora_rank=4)
LORA = ("--model.lora_rank", "4")
SMALL = (
    *("--problems_per_step", "4", "--samples_per_problem", "4", "--update.warmup_steps", "0", "--loss.beta", "0.1"),
    *("--update.learning_rate", "1e-3", "--eval.limit", "4", "--eval.every", "0", "--run.checkpoint_every", "1"),
)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of five steps, which keeps all its checkpoints."""
    output = tmp_path_factory.mktemp("lora") / "run"
    finished = train(*SMALL, *LORA, "--run.steps", "5", "--run.keep_checkpoints", "9", "--output", output)
    assert finished.returncode == 0 and not finished.stderr, finished.stderr
    assert f"adapter      {output / 'adapter'}" in finished.stdout
    return output


@pytest.fixture
def at_three(whole: Path, tmp_path: Path) -> Path:
    """What a run that was killed after step 3 leaves: there it is in the middle of a pair."""
    output = tmp_path / "run"
    shutil.copytree(whole, output, ignore=shutil.ignore_patterns("step-000004", "step-000005", "model", "adapter"))
    for kept in ("model", "adapter"):
        shutil.copytree(whole / "checkpoints" / "step-000003" / kept, output / "checkpoints" / "step-000003" / kept)
    return output


def weights(output: Path) -> dict[str, torch.Tensor]:
    return load_file(output / "model" / "model.safetensors") | load_file(
        output / "adapter" / "adapter_model.safetensors"
    )


def test_a_resumed_run_ends_as_one_that_never_stopped(whole: Path, at_three: Path) -> None:
    finished = train(*SMALL, *LORA, "--run.steps", "5", "--resume", "auto", "--output", at_three)
    assert finished.returncode == 0, finished.stderr
    assert reproducible(read_metrics(at_three / "metrics.jsonl")) == reproducible(read_metrics(whole / "metrics.jsonl"))
    expected, found = weights(whole), weights(at_three)
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)


def test_two_processes_go_on_where_one_stopped(whole: Path, at_three: Path) -> None:
    finished = train(*SMALL, *LORA, "--run.steps", "5", "--resume", "auto", "--output", at_three, processes=2)
    assert finished.returncode == 0, finished.stderr
    start, expected, found = weights(whole / "checkpoints" / "step-000003"), weights(whole), weights(at_three)
    moved = sum(float((expected[name] - start[name]).square().sum()) for name in expected)
    apart = sum(float((expected[name] - found[name]).square().sum()) for name in expected)
    assert apart < 1e-3 * moved


def test_the_reference_is_the_model_without_adapters(whole: Path) -> None:
    records = [record for record in read_metrics(whole / "metrics.jsonl") if record["phase"] in ("solve", "refine")]
    first, *later = [record[f"{record['phase']}/kl_ref"] for record in records]
    assert abs(first) < 1e-9
    assert all(kl > 1e-5 for kl in later)


def test_only_the_layers_with_adapters_differ_from_the_model_trained_on(whole: Path) -> None:
    start, end = (load_file(Path(folder) / "model.safetensors") for folder in (model_folder("tiny"), whole / "model"))
    assert start.keys() == end.keys()
    for name, value in start.items():
        assert torch.equal(end[name], value.float()) != ("_proj." in name), name


def made(family: str = "llama", options: ModelOptions | None = RANK_4, seed: int = 0) -> Updater:
    adapt = partial(add_adapters, options=options, seed=seed) if options is not None else None
    models = pair_models(own_model(family, seed=seed), torch.float32, adapt)
    optimizer, schedule = build_optimizer(models.policy, Config().update, 5)
    return Updater(models, None, optimizer, schedule, Config())


@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize(
    ("options", "seed", "says"),
    [
        (None, 0, "a run with LoRA, and this is one without: give the same --model.lora_rank"),
        (replace(RANK_4, lora_rank=8), 0, "a run with --model.lora_rank 4, not 8: give the same"),
        (replace(RANK_4, lora_alpha=8.0), 0, "a run with --model.lora_alpha 32.0, not 8.0: give the same"),
        (replace(RANK_4, lora_targets=("q_proj",)), 0, "'v_proj'], not ['q_proj']: give the same"),
        (RANK_4, 1, "its LoRA adapters were trained on other weights"),
    ],
)
def test_other_adapters_or_other_weights_below_them_are_refused(
    options: ModelOptions | None, seed: int, says: str, tmp_path: Path
) -> None:
    folder = save(tmp_path, 1, made())
    load_checkpoint(folder, made())
    with pytest.raises(UserError, match=re.escape(says)):
        load_checkpoint(folder, made(options=options, seed=seed))


@pytest.mark.usefixtures("one_process")
def test_a_checkpoint_without_adapters_is_refused(tmp_path: Path) -> None:
    folder = save(tmp_path, 1, made(options=None))
    with pytest.raises(UserError, match=r"a run without LoRA, and this is one with: give the same"):
        load_checkpoint(folder, made())


def test_adapters_learn(tmp_path: Path) -> None:
    """The shipped model has never seen this notation: its loss falls by more than a tenth in a few steps."""
    options = ("--algorithm", "sft", "--data.source", "arithmetic:te5", "--eval.sets", "{}")
    rate = ("--update.warmup_steps", "0", "--update.learning_rate", "1e-2", "--run.steps", "12")
    finished = train(*options, *LORA, *rate, "--output", tmp_path / "run", fresh=True)
    assert finished.returncode == 0, finished.stderr
    losses = [record["sft/loss"] for record in read_metrics(tmp_path / "run" / "metrics.jsonl") if "sft/loss" in record]
    assert sum(losses[-3:]) / 3 < 0.9 * losses[0]

"""The default job learns, and its results are what users are told they get."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.command import train
from thinktwice_fast.run.metrics import Record
from thinktwice_fast.run.metrics_file import read_metrics


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The first 40 steps of the default job."""
    output = tmp_path_factory.mktemp("learning")
    options = ("--run.steps", "40", "--run.checkpoint_every", "0", "--profile", "3:4", "--output", output)
    finished = train(*options, processes=1, fresh=True)
    assert finished.returncode == 0, finished.stderr
    (output / "stdout").write_text(finished.stdout)
    return output


def evaluations(output: Path) -> list[Record]:
    return [record for record in read_metrics(output / "metrics.jsonl") if record["phase"] == "eval"]


def test_held_out_accuracies_rise(run: Path) -> None:
    first, *_, last = evaluations(run)
    assert last["eval/held_out/solve_accuracy"] > first["eval/held_out/solve_accuracy"] + 0.05
    assert last["eval/held_out/refine_accuracy"] > first["eval/held_out/refine_accuracy"] + 0.08
    assert last["eval/held_out/damage_correct"] < first["eval/held_out/damage_correct"]


def test_solve_and_refine_alternate_at_equal_generations(run: Path) -> None:
    steps = [record for record in read_metrics(run / "metrics.jsonl") if record["phase"] in ("solve", "refine")]
    assert [record["phase"] for record in steps] == ["solve", "refine"] * 20
    assert [record["generations"] for record in steps] == [256 * (n + 1) for n in range(40)]


def test_rollout_and_training_agree_on_log_probabilities(run: Path) -> None:
    for record in read_metrics(run / "metrics.jsonl"):
        if record["phase"] in ("solve", "refine"):
            assert record[f"{record['phase']}/mismatch"] < 1e-4
            assert record[f"{record['phase']}/ratio_max"] == pytest.approx(1, abs=1e-6)


def test_everything_promised_is_written(run: Path) -> None:
    names = ("config.yaml", "metrics.jsonl", "transcripts.jsonl", "curves.png", "model/model.safetensors")
    for name in (*names, "profile/top.json", "profile/step-000003.json.gz", "profile/step-000004.json.gz"):
        assert (run / name).stat().st_size > 0
        assert name.split("/")[0] in (run / "stdout").read_text() or name == "config.yaml"
    assert list((run / "tensorboard").iterdir())
    assert len(list((run / "checkpoints").iterdir())) == 1


def test_the_saved_model_solves_as_the_evaluation_says(run: Path) -> None:
    """Through transformers alone: its generate, its tokenizer, its chat template."""
    from thinktwice_fast.tasks.arithmetic import ArithmeticSource

    model: Any = AutoModelForCausalLM.from_pretrained(run / "model")
    tokenizer = AutoTokenizer.from_pretrained(run / "model")
    tokenizer.padding_side = "left"
    problems = list(ArithmeticSource("tm5", held_out=True, limit=400))
    chats = [[dict(message) for message in problem.messages] for problem in problems]
    inputs: Any = tokenizer.apply_chat_template(
        chats, add_generation_prompt=True, return_tensors="pt", return_dict=True, padding=True
    )
    with torch.inference_mode():
        answers = model.generate(**inputs, max_new_tokens=64, do_sample=False)
    texts: Any = tokenizer.batch_decode(answers[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    right = sum(f"\\boxed{{{problem.answer}}}" in text for problem, text in zip(problems, texts, strict=True))
    measured = evaluations(run)[-1]["eval/held_out/solve_accuracy"]
    assert right / len(problems) == pytest.approx(measured, abs=0.01)

"""The default job on a GPU, where there is one: what CI on CPUs cannot see."""

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.command import train
from thinktwice_fast.run.metrics_file import read_metrics

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]


@pytest.mark.parametrize("processes", [0, 1])
def test_the_default_job_trains_saves_and_resumes_on_a_gpu(tmp_path: Path, processes: int) -> None:
    command = ("--eval.limit", "16", "--run.checkpoint_every", "2", "--resume", "auto", "--output", tmp_path / "run")
    gpus = os.environ.get("CUDA_VISIBLE_DEVICES", "0")
    for steps in (3, 6):
        finished = train(*command, "--run.steps", str(steps), processes=processes, gpus=gpus)
        assert finished.returncode == 0, finished.stderr
    records = read_metrics(tmp_path / "run" / "metrics.jsonl")
    trained = [record for record in records if record["phase"] in ("solve", "refine")]
    assert [record["step"] for record in trained] == [1, 2, 3, 4, 5, 6]
    for record in trained:
        assert record[f"{record['phase']}/mismatch"] < 0.1  # nats; bfloat16 in rollout and training
        assert 0 < record[f"{record['phase']}/reward"] < 1
        assert record["peak_memory_bytes"] > 1e6
    model = load_file(tmp_path / "run" / "model" / "model.safetensors")
    assert {tensor.dtype for tensor in model.values()} == {torch.bfloat16}


def test_adapters_train_on_a_gpu(tmp_path: Path) -> None:
    """In bfloat16 FSDP2 has them, also in one process."""
    output, gpus = tmp_path / "run", os.environ.get("CUDA_VISIBLE_DEVICES", "0")
    finished = train("--run.steps", "2", "--model.lora_rank", "8", "--eval.sets", "{}", "--output", output, gpus=gpus)
    assert finished.returncode == 0, finished.stderr
    records = read_metrics(output / "metrics.jsonl")
    mismatches = [record[f"{record['phase']}/mismatch"] for record in records if record["phase"] in ("solve", "refine")]
    assert len(mismatches) == 2 and max(mismatches) < 0.1  # nats; bfloat16 in rollout and training
    assert (output / "adapter").is_dir()


def test_a_gpu_run_scores_the_shipped_model_like_a_cpu_run(tmp_path: Path) -> None:
    accuracies = []
    for device, gpus in (("cuda", os.environ.get("CUDA_VISIBLE_DEVICES", "0")), ("cpu", "")):
        output = tmp_path / device
        options = ("--run.steps", "1", "--model.device", device, "--model.compute_dtype", "float32", "--output", output)
        finished = train(*options, gpus=gpus)
        assert finished.returncode == 0, finished.stderr
        accuracies.append(read_metrics(output / "metrics.jsonl")[0]["eval/held_out/solve_accuracy"])
    assert accuracies[0] == pytest.approx(accuracies[1], abs=0.02)

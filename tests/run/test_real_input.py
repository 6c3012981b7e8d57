"""The real command on real problems, with small random models of each family.

A clean clone has the 24 problems of ``tests/data``, in GSM8K's format, alone; GSM8K itself and the five benchmarks are
read where they lie beside the project.
"""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.command import DATA, LIMIT, ROOT, TRAIN, environment, train
from tests.small_models import FAMILIES, bpe_tokenizer, write_model

BENCHMARKS = ("aime", "amc", "math500", "minerva_math", "olympiadbench")
PROBLEMS, SAMPLES = 4, 2
# A question of GSM8K takes about 250 tokens of these small vocabularies, one of a benchmark up to 600.
SIZES = (
    *("--problems_per_step", str(PROBLEMS), "--samples_per_problem", str(SAMPLES)),
    *("--rollout.max_prompt_tokens", "1500", "--rollout.max_response_tokens", "12", "--rollout.max_sequences", "16"),
    *("--data.limit", "40", "--update.warmup_steps", "0"),
)
REAL = (
    *SIZES,
    *("--data.instruction", "Put your final answer inside \\boxed{}.", "--eval.limit", "2"),
    *("--eval.every", "0", "--thinktwice.refine_instruction", "default"),
)


@dataclass(frozen=True)
class Problems:
    """What to train and to evaluate on."""

    train: Path
    evaluation: dict[str, Any]  # eval.sets
    more: tuple[str | Path, ...] = ()

    def options(self) -> tuple[str | Path, ...]:
        return "--data.source", self.train, "--eval.sets", json.dumps(self.evaluation), *self.more


OWN_FILE = Path(__file__).parent.parent / "data" / "word_problems.jsonl"
OWN = Problems(OWN_FILE, {"first": str(OWN_FILE), "again": {"source": str(OWN_FILE), "limit": 1, "reward": "exact"}})
SHARED = Problems(DATA / "gsm8k_train.jsonl", {name: name for name in BENCHMARKS}, ("--eval.data_root", DATA))
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason=f"no {DATA}: the data sets are no part of the project")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[Path, dict[str, Path]]:
    """By training file: a small random model of each family, with a tokenizer trained on the file's own text."""
    written: dict[Path, dict[str, Path]] = {}
    for source in (OWN.train, SHARED.train):
        if source.is_file():
            folder = tmp_path_factory.mktemp("models")
            tokenizer = bpe_tokenizer(text_of(source, 300))
            written[source] = {family: write_model(folder / family, family, tokenizer) for family in FAMILIES}
    return written


def text_of(source: Path, problems: int) -> str:
    with source.open(encoding="utf-8") as lines:
        rows = [json.loads(line) for line, _ in zip(lines, range(problems), strict=False)]
    return "\n".join(f"{row['question']}\n{row['answer']}" for row in rows)


def records(output: Path, phase: str) -> list[dict[str, Any]]:
    lines = (output / "metrics.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if record["phase"] == phase]


def succeeded(finished: subprocess.CompletedProcess[str]) -> None:
    assert finished.returncode == 0, finished.stderr


@pytest.mark.parametrize(
    ("family", "problems", "before", "after"),
    [
        pytest.param("qwen3", OWN, 1, 2, id="qwen3-own"),
        pytest.param("qwen3", SHARED, 1, 2, id="qwen3-shared", marks=needs_data),
        pytest.param("olmo3", SHARED, 2, 1, id="olmo3-shared", marks=needs_data),
        pytest.param("llama", SHARED, 1, 2, id="llama-shared", marks=needs_data),
    ],
)
def test_trains_evaluates_saves_and_resumes(
    family: str, problems: Problems, before: int, after: int, models: dict[Path, dict[str, Path]], tmp_path: Path
) -> None:
    """Two steps under one number of processes, two more from the checkpoint under the other."""
    model = models[problems.train][family]
    command = ("--model.path", model, "--output", tmp_path, *problems.options(), *REAL)
    succeeded(train(*command, "--run.steps", "2", processes=before))
    succeeded(train(*command, "--run.steps", "4", "--resume", "auto", processes=after))

    assert [record["step"] for record in records(tmp_path, "solve")] == [1, 3]
    assert [record["step"] for record in records(tmp_path, "refine")] == [2, 4]
    assert records(tmp_path, "refine")[-1]["generations"] == 4 * PROBLEMS * SAMPLES
    for phase in ("solve", "refine"):
        for record in records(tmp_path, phase):
            assert record[f"{phase}/reward"] is not None and 0 < record[f"{phase}/response_tokens"] <= 12
    # The refine prompt holds the question, the base and the instruction, whose four demands alone take over 100 tokens.
    solve, refine = records(tmp_path, "solve")[0], records(tmp_path, "refine")[0]
    assert refine["refine/prompt_tokens"] > solve["solve/prompt_tokens"] + 100

    evaluations = records(tmp_path, "eval")
    assert [record["step"] for record in evaluations] == [0, 2, 4]
    for record in evaluations:
        values = [record[f"eval/{name}/solve_tokens"] for name in problems.evaluation]
        assert record["eval/average/solve_tokens"] == pytest.approx(sum(values) / len(values))
        assert {f"eval/{name}/refine_accuracy" for name in (*problems.evaluation, "average")} <= record.keys()

    loaded: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "model", output_loading_info=True)
    assert not loaded[1]["missing_keys"] and not loaded[1]["unexpected_keys"]
    assert AutoTokenizer.from_pretrained(tmp_path / "model").chat_template
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["step-000002", "step-000004"]


REWARD = """
def share_of_vowels(prompts, completions, question, answer, **columns):
    assert len(prompts) == len(completions) == len(question) == len(answer)
    assert all("####" in text for text in answer), "the column as it is, not the gold answer taken from it"
    assert all(asked in prompt[0]["content"] for asked, prompt in zip(question, prompts))
    texts = [messages[0]["content"] for messages in completions]
    assert all(len(messages) == 1 and messages[0]["role"] == "assistant" for messages in completions)
    rewards = [sum(letter in "aeiou" for letter in text) / (len(text) + 1) for text in texts]
    return rewards
"""


def run_with_own_reward(folder: Path, model: Path, code: str, processes: int) -> Path:
    (folder / "mine.py").write_text(code)
    output = folder / f"run-{processes}"
    own = ("--reward", f"{folder / 'mine.py'}:share_of_vowels", "--data.source", OWN.train, "--eval.sets", "{}")
    command = ("--model.path", model, "--output", output, *SIZES, *own, "--run.steps", "2")
    succeeded(train(*command, processes=processes))
    return output


def test_two_processes_do_the_step_of_one(models: dict[Path, dict[str, Path]], tmp_path: Path) -> None:
    model = models[OWN.train]["qwen3"]
    one, two = (run_with_own_reward(tmp_path, model, REWARD, n) for n in (1, 2))
    first, second = records(one, "solve")[0], records(two, "solve")[0]
    for name in ("reward", "response_tokens", "prompt_tokens", "truncation_rate", "group_signal_rate", "entropy"):
        assert second[f"solve/{name}"] == pytest.approx(first[f"solve/{name}"], rel=1e-6)
    assert first["solve/group_signal_rate"] == 1
    assert second["solve/loss"] == pytest.approx(first["solve/loss"], abs=1e-4)
    assert first["solve/grad_norm"] > 0
    assert second["solve/grad_norm"] == pytest.approx(first["solve/grad_norm"], rel=1e-3)
    # The same bases make refine prompts of the same length.
    lengths = [records(output, "refine")[0]["refine/prompt_tokens"] for output in (one, two)]
    assert lengths[0] == lengths[1]


def test_own_reward_may_leave_samples_out(models: dict[Path, dict[str, Path]], tmp_path: Path) -> None:
    code = REWARD.replace("return rewards", "return [None, *rewards[1:]]")
    output = run_with_own_reward(tmp_path, models[OWN.train]["llama"], code, processes=0)
    for phase in ("solve", "refine"):
        assert records(output, phase)[0][f"{phase}/rewards_missing"] == PROBLEMS


def test_sigterm_finishes_the_step_and_the_run_continues(tmp_path: Path) -> None:
    sizes = ("--problems_per_step", "4", "--samples_per_problem", "4", "--eval.sets", "{}")
    command = ["--output", str(tmp_path), *sizes, "--run.checkpoint_every", "0", "--resume", "auto"]
    running = subprocess.Popen(
        [sys.executable, str(TRAIN), *command, "--run.steps", "100000"],
        env=environment(), cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    try:
        wait_for_step(tmp_path, 3)
        os.kill(running.pid, signal.SIGTERM)
        stdout, stderr = running.communicate(timeout=LIMIT)
    finally:
        running.kill()
    assert running.returncode == 0, stderr
    assert stderr.splitlines() == ["finishing this step, then saving; once more to stop at once"]
    (checkpoint,) = (tmp_path / "checkpoints").iterdir()
    last = int(checkpoint.name.removeprefix("step-"))
    assert last >= 3
    assert f"stopped by a signal after step {last}; continue with --resume auto" in stdout

    succeeded(train(*command, "--run.steps", str(last + 2)))
    trained = sorted((record["step"], phase) for phase in ("solve", "refine") for record in records(tmp_path, phase))
    assert trained == [(step, "solve" if step % 2 else "refine") for step in range(1, last + 3)]


def wait_for_step(output: Path, step: int) -> None:
    deadline = time.monotonic() + LIMIT
    log = output / "metrics.jsonl"
    while not (log.exists() and len(log.read_text().splitlines()) >= step):
        assert time.monotonic() < deadline, "no step was made"
        time.sleep(0.05)

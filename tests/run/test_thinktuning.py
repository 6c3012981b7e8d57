"""ThinkTuning through the real command: each kind of teacher that runs here, resumed and planned."""

import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.command import ROOT, train
from tests.run.refusals import SMALL
from tests.scripted_model import write_scripted_model
from thinktwice_fast.run.metrics import Record, read_metrics, reproducible

EXAMPLE = f"{ROOT / 'examples' / 'arithmetic_teacher.py'}:teach"
STEPS = 4
OPTIONS = (
    *(
        "--algorithm",
        "thinktuning",
        "--problems_per_step",
        "4",
        "--samples_per_problem",
        "4",
        "--run.steps",
        str(STEPS),
    ),
    *("--run.checkpoint_every", "1", "--run.keep_checkpoints", str(STEPS), "--run.transcripts_every", "1"),
    *("--eval.sets", "{}", "--update.minibatch_sequences", "8", "--update.warmup_steps", "0", "--resume", "auto"),
    *("--update.learning_rate", "1e-3"),
)
SHOTS = """
system: 1+1
answer_format: 2=2
shots:
- {behaviour: agreement, request: 3=3, question: 1+1+1+1+1, response: 1+1=3, opinion: correct, reason: 1+1, phrase: "2"}
"""
REWARD = "def score(completions, **columns):\n    return [len(c[0]['content']) % 7 / 7 for c in completions]\n"


@pytest.fixture(scope="module")
def scripted(tmp_path_factory: pytest.TempPathFactory) -> tuple[str | Path, ...]:
    """Options for a policy that says the tags by itself."""
    folder = tmp_path_factory.mktemp("scripted")
    model = write_scripted_model(folder / "model")
    (folder / "shots.yaml").write_text(SHOTS)
    (folder / "reward.py").write_text(REWARD)
    return (
        *("--thinktuning.shots", folder / "shots.yaml", "--reward", f"{folder / 'reward.py'}:score"),
        *("--thinktuning.teacher_answer_tokens", "40", "--model.path", model),
    )


def steps(folder: Path) -> list[Record]:
    return [record for record in read_metrics(folder / "metrics.jsonl") if record["phase"] == "solve"]


def ends_as_if_never_killed(tmp_path: Path, *options: str | Path) -> list[Record]:
    """Run to the end, then once more from the second checkpoint on, which is what a kill leaves; gives the steps."""
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    done = train(*OPTIONS, *options, "--output", whole)
    assert done.returncode == 0, done.stderr
    shutil.copytree(whole, cut)
    for folder in sorted((cut / "checkpoints").iterdir())[2:]:
        shutil.rmtree(folder)
    done = train(*OPTIONS, *options, "--output", cut)
    assert (done.returncode == 0 and "step 3" in (done.stdout + done.stderr)) or done.stdout, done.stderr
    assert reproducible(steps(cut)) == reproducible(steps(whole)) and len(steps(cut)) == STEPS
    expected, found = (load_file(folder / "model" / "model.safetensors") for folder in (whole, cut))
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    return steps(whole)


def test_the_example_teaches_the_default_task(tmp_path: Path) -> None:
    records = ends_as_if_never_killed(tmp_path, "--thinktuning.teacher", EXAMPLE)
    assert 0 < records[-1]["solve/teacher_answers"] <= 4 * STEPS and records[-1]["generations"] == 16 * STEPS
    for record in records:
        assert record["solve/teacher_acceptance"] >= 0.5 and record["solve/guided_rate"] <= 0.25
        assert record["solve/reward_guided"] == 1.0 >= record["solve/reward_unguided"]
        assert record["solve/tokens_guided"] > 0


def test_the_frozen_teacher_speaks_as_the_policy_did_at_first(tmp_path: Path, scripted: tuple[str | Path, ...]) -> None:
    """Its certainty melts in a few steps at this rate, and with it the live one's tags."""
    rate = ("--update.learning_rate", "0.3")
    frozen = ends_as_if_never_killed(tmp_path, *scripted, *rate, "--thinktuning.teacher", "frozen")
    assert {record.get("solve/teacher_acceptance", 1.0) for record in frozen} == {1.0}
    live = train(*OPTIONS, *scripted, *rate, "--thinktuning.teacher", "live", "--output", tmp_path / "live")
    assert live.returncode == 0, live.stderr
    spoken = steps(tmp_path / "live")
    assert spoken[0]["solve/teacher_acceptance"] == 1.0 and spoken[0]["solve/loss"] == frozen[0]["solve/loss"]


def test_a_checkpoint_of_another_shape_and_tokenizer_teaches_with_a_cache_of_its_own(
    tmp_path: Path, scripted: tuple[str | Path, ...]
) -> None:
    other = write_scripted_model(tmp_path / "other", num_hidden_layers=2)
    options = (*OPTIONS, *scripted[:6], "--thinktuning.teacher", f"checkpoint:{other}", "--output", tmp_path / "run")
    done = train(*options, "--thinktuning.one_behaviour", "true")
    assert done.returncode == 0, done.stderr
    for record in steps(tmp_path / "run"):
        assert record["solve/teacher_acceptance"] == 1.0
        assert record["solve/behaviour/agreement"] == 16 * record["solve/guided_rate"]
    plan = train(*options, "--dry-run", "--resume", "null")
    rows = dict(re.findall(r"^  (teacher [\w ]+?) +([\d,]+)", plan.stdout, re.M))
    assert rows.keys() >= {"teacher KV cache", "teacher weights"}, plan.stdout + plan.stderr
    assert re.search(r"teacher +checkpoint; per process up to 4 requests a step", plan.stdout)


def test_a_run_that_can_use_no_answer_says_so(tmp_path: Path) -> None:
    (tmp_path / "teacher.py").write_text("def teach(question, response):\n    return 'Well done.'\n")
    options = (*SMALL, "--algorithm", "thinktuning", "--run.steps", "3", "--output", tmp_path / "run")
    done = train(*options, "--thinktuning.teacher", f"{tmp_path / 'teacher.py'}:teach")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("until one can, this is GRPO under another name") == 2  # after steps 1 and 2
    assert "solve/refused/unparsed" in done.stdout

"""What goes wrong while a run trains: one line that names the remedy, and nothing lost."""

import json
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from tests.command import LIMIT, ROOT, TRAIN, environment, train
from tests.run.refusals import (
    SMALL,
    Case,
    Outcomes,
    logged_steps,
    named,
    refused,
    refused_by_torchrun,
    steps_on_disk,
    text,
)

# Right in a solve step, wrong in the refine step after it, whose prompts are longer by two messages.
REWARD = """
import os, time

def reward(prompts, completions, **columns):
    if len(prompts[0]) == 1:
        return [float(len(message[0]["content"]) % 2) for message in completions]
    {wrong}
"""


def bad_reward(wrong: str) -> Callable[[Path], list[str | Path]]:
    """Options of a run that meets ``wrong`` in its second step and saves only where it must."""
    return lambda folder: [
        *("--reward", f"{text(folder, 'mine.py', REWARD.replace('{wrong}', wrong))}:reward", "--reward_timeout", "2"),
        *("--run.steps", "2", "--run.checkpoint_every", "0"),
    ]


FAILING_REWARDS = [
    Case("reward raises", ("raised KeyError", "sample 0"), bad_reward("raise KeyError('solution')")),
    Case(
        "reward hangs",
        ("took longer than 2 s", "reward_timeout", "sample 0"),
        bad_reward("time.sleep(600)"),
    ),
    Case(
        "reward returns NaN",
        ("returned nan", "sample 1"),
        bad_reward("return [0.5] * (len(completions) - 1) + [float('nan')]"),
    ),
    Case(
        "reward returns too many",
        ("returned 2 rewards for 1 samples", "sample 0"),
        bad_reward("return [0.5] * (len(completions) + 1)"),
    ),
    Case(
        "reward returns text",
        ("returned a str instead of a number", "sample 0"),
        bad_reward("return ['good'] * len(completions)"),
    ),
    Case("reward ends its process", ("ended its process", "sample 0"), bad_reward("os._exit(3)")),
]


@pytest.mark.parametrize("case", FAILING_REWARDS, ids=named)
def test_a_failing_reward_names_the_sample_and_keeps_what_was_trained(case: Case, outcomes: Outcomes) -> None:
    folder, finished = outcomes[case.name]
    line = refused(finished.result(), *case.says, "step 2: ", "everything up to step 1 is kept", "--resume auto")
    assert re.search(r"problem \d+, sample", line)
    assert steps_on_disk(folder / "run") == ["step-000001"]
    assert logged_steps(folder / "run") == [1]


def test_a_mended_reward_continues_the_run(tmp_path: Path) -> None:
    output, failing = tmp_path / "run", bad_reward("raise KeyError")(tmp_path)
    refused(train("--output", output, *SMALL, *failing), "raised KeyError")
    (tmp_path / "mine.py").write_text(REWARD.replace("{wrong}", "return [1.0] * len(completions)"))
    resumed = train("--output", output, *SMALL, *failing, "--resume", "auto")
    assert resumed.returncode == 0, resumed.stderr
    assert logged_steps(output) == [1, 2]


def test_a_reward_that_fails_in_an_evaluation_keeps_what_was_trained(tmp_path: Path) -> None:
    output = tmp_path / "run"
    counting = """
calls = 0

def reward(prompts, completions, **columns):
    global calls
    calls += 1
    assert calls <= 6  # 2 before training and 2 in each step: the evaluation after step 2 is the first to fail
    return [1.0] * len(completions)
"""
    mine = text(tmp_path, "mine.py", counting)
    settings = ("--eval.sets", '{"held_out": "arithmetic:tm5"}', "--eval.limit", "1", "--run.steps", "2")
    command = ("--output", output, *SMALL, *settings, "--reward", f"{mine}:reward")
    refused(train(*command), "evaluation after step 2", "sample 0", "everything up to step 2 is kept")
    assert steps_on_disk(output) == ["step-000002"]
    mine.write_text(counting.replace("calls <= 6", "True"))
    resumed = train(*command, "--resume", "auto")
    assert resumed.returncode == 0, resumed.stderr
    records = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records if record["phase"] == "eval"] == [0, 2]


@pytest.mark.parametrize(
    ("wrong", "says"),
    [("time.sleep(600)", "took longer than 3 s"), ("os._exit(3)", "ended its process (exit status 3)")],
)
def test_a_reward_that_fails_in_one_of_two_processes_stops_both_at_once(tmp_path: Path, wrong: str, says: str) -> None:
    """Within twice the call's time, a process start and an exit, while the other has most samples yet to draw."""
    code = """
import os, time
from pathlib import Path

def reward(completions, **columns):
    rank = os.environ["RANK"]
    with Path(__file__).with_name(f"calls {rank}").open("a") as file:
        print(time.time(), file=file)
    if rank == "1":
        {wrong}
    return [1.0] * len(completions)
"""
    mine = text(tmp_path, "mine.py", code.replace("{wrong}", wrong))
    long = ("--eval.sets", '{"held_out": "arithmetic:tm5"}', "--eval.limit", "4000", "--run.steps", "1")
    settings = (*SMALL, *long, "--reward", f"{mine}:reward", "--reward_timeout", "3")
    finished = train("--output", tmp_path / "run", *settings, processes=2)
    # The other's file is there only if it came to grade anything before it was stopped.
    other, failing = (list(tmp_path.glob(f"calls {rank}")) for rank in (0, 1))
    assert time.time() - float(failing[0].read_text().split()[0]) < 2 * 3 + 16
    graded = sum(len(file.read_text().split()) for file in other)
    assert graded < 2000 + 2000, "it graded all solutions and refinements"
    refused_by_torchrun(finished, "evaluation after step 0: process 1: reward", says, "sample 0")


def test_a_loss_that_is_not_finite_saves_what_led_to_it(tmp_path: Path) -> None:
    output = tmp_path / "run"
    # The first of two mini-batches throws the weights out; the second one's gradient shows it.
    settings = ("--problems_per_step", "8", "--samples_per_problem", "8", "--update.minibatch_sequences", "32")
    huge = ("--update.learning_rate", "1e30", "--update.warmup_steps", "0", "--run.steps", "1", "--eval.sets", "{}")
    finished = train("--output", output, *settings, *huge)
    refused(finished, "step 1: ", "not finite", "lower --update.learning_rate", "not-finite-step-000001")
    evidence = json.loads((output / "not-finite-step-000001" / "batch.json").read_text())
    assert [0 < len(process["sequences"]) <= 32 for process in evidence] == [True]
    assert all(rollout["response"] and rollout["reward"] in (0.0, 1.0) for rollout in evidence[0]["sequences"])
    model = AutoModelForCausalLM.from_pretrained(output / "not-finite-step-000001" / "model")
    assert max(float(parameter.detach().abs().max()) for parameter in model.parameters()) > 1e20
    assert not steps_on_disk(output)


def test_no_space_when_saving_leaves_the_earlier_checkpoint_whole(tmp_path: Path) -> None:
    output = tmp_path / "run"
    command = ("--output", output, *SMALL, "--run.checkpoint_every", "1", "--run.keep_checkpoints", "1")
    first = train(*command, "--run.steps", "1")
    assert first.returncode == 0, first.stderr
    before = {path: path.read_bytes() for path in output.glob("checkpoints/step-000001/**/*") if path.is_file()}
    # A limit on the size of a file stands in for a full disk: the metrics still fit, the weights do not.
    resume = [str(option) for option in (*command, "--run.steps", "3", "--resume", "auto")]
    limited = ["sh", "-c", 'ulimit -f 1000; exec "$@"', "sh", sys.executable, str(TRAIN), *resume]
    full = subprocess.run(limited, env=environment(), cwd=ROOT, capture_output=True, text=True, timeout=LIMIT)
    refused(full, "can't write", "step-000002", "earlier checkpoints are whole", "free some space", "--resume auto")
    assert steps_on_disk(output) == ["step-000001"]
    assert all(path.read_bytes() == content for path, content in before.items()) and before
    again = train(*resume)
    assert again.returncode == 0, again.stderr
    assert steps_on_disk(output) == ["step-000003"]
    assert logged_steps(output) == [1, 2, 3]

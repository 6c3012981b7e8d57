"""ThinkTuning through the real command: each kind of teacher that runs here, resumed and planned."""

import copy
import re
import shutil
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.command import ROOT, train
from tests.run.refusals import SMALL
from tests.scripted_model import GUIDANCE, write_scripted_model
from thinktwice_fast.algorithms.thinktuning.feedback import parse
from thinktwice_fast.algorithms.thinktuning.guided import guided_count, guided_fraction
from thinktwice_fast.algorithms.thinktuning.teacher import FeedbackRequest, SampledModel
from thinktwice_fast.model.loading import load_model
from thinktwice_fast.rollout.engine import Engine
from thinktwice_fast.run import teacher as teacher_module
from thinktwice_fast.run.checks import check_config
from thinktwice_fast.run.metrics import Record, reproducible
from thinktwice_fast.run.metrics_file import read_metrics
from thinktwice_fast.run.options import from_yaml, parse_config
from thinktwice_fast.run.teacher import make_teacher, plan_teacher
from thinktwice_fast.tasks.prompts import ChatFormat

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
    *("--update.learning_rate", "1e-3", "--thinktuning.cutoff", "0"),
)
SHOTS = """
system: 1+1
answer_format: 2=2
shots:
- {behaviour: agreement, request: 3=3, question: 1+1+1+1+1, response: 1+1=3, opinion: correct, reason: 1+1, phrase: "2"}
"""
REWARD = "def score(completions, **columns):\n    return [len(c[0]['content']) % 7 / 7 for c in completions]\n"


def test_the_released_script_guides_one_of_five_in_eight_steps() -> None:
    config = from_yaml(ROOT / "configs" / "paper" / "thinktuning-llama3.2-3b.yaml")
    check_config(config, 2)
    guided = [number for number in range(1, 51) if guided_fraction(config.thinktuning, config.run.steps, number)]
    assert guided == [*range(1, 9)] and guided_count(config.samples_per_problem, config.thinktuning.fraction) == 1


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


def test_the_frozen_teacher_speaks_as_the_policy_did_at_first(tmp_path: Path, scripted: tuple[str | Path, ...]) -> None:
    """At this rate the policy has lost the tags after two steps, and the live one speaks as it does."""
    rate = ("--update.learning_rate", "0.03")
    frozen = ends_as_if_never_killed(tmp_path, *scripted, *rate, "--thinktuning.teacher", "frozen")
    live = train(*OPTIONS, *scripted, *rate, "--thinktuning.teacher", "live", "--output", tmp_path / "live")
    assert live.returncode == 0, live.stderr
    moved = steps(tmp_path / "live")
    assert [record["solve/teacher_acceptance"] for record in frozen[:3]] == [1.0, 1.0, 1.0]
    assert moved[0]["solve/loss"] == frozen[0]["solve/loss"] and moved[2]["solve/teacher_acceptance"] == 0.0
    assert frozen[2]["generations"] == 48 and frozen[2]["solve/teacher_answers"] == 12


def test_a_kl_terms_reference_is_the_frozen_teacher(
    scripted: tuple[str | Path, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = parse_config([*OPTIONS, *map(str, scripted), "--thinktuning.teacher", "frozen", "--loss.beta", "0.1"])
    loaded = load_model(config.model, 0, torch.device("cpu"))
    monkeypatch.setattr(teacher_module, "load_model", None)
    with ExitStack() as stack:
        plan = plan_teacher(config, loaded, ChatFormat(loaded.tokenizer), 20, 1, stack)
    assert plan.second is not None and not plan.second.copied and plan.load is not None
    moved = copy.deepcopy(loaded.model)
    for parameter in moved.parameters():
        torch.nn.init.zeros_(parameter)
    engine = Engine(moved, loaded.stop_ids, config.rollout, plan.load.tokens)
    sampled = SampledModel(engine, ChatFormat(loaded.tokenizer), loaded.stop_ids, version=1)
    teacher = make_teacher(plan, config, lambda: sampled, loaded.model, torch.float32)
    # The second response takes more tokens than any that the policy could draw.
    answers = teacher.ask([FeedbackRequest("1+1", "1"), FeedbackRequest("1+1", "1" * 999)])
    assert [parse(answer.text) for answer in answers] == [GUIDANCE] * 2


def test_a_checkpoint_of_another_shape_and_tokenizer_teaches_with_a_cache_of_its_own(
    tmp_path: Path, scripted: tuple[str | Path, ...]
) -> None:
    other = write_scripted_model(tmp_path / "other", num_hidden_layers=2)
    options = (*OPTIONS, *scripted[:6], "--thinktuning.teacher", f"checkpoint:{other}")
    done = train(*options, "--thinktuning.one_behaviour", "true", "--output", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    for record in steps(tmp_path / "run"):
        assert record["solve/teacher_acceptance"] == 1.0
        assert record["solve/behaviour/agreement"] == 16 * record["solve/guided_rate"]
    plan = train(*options, "--dry-run", "--output", tmp_path / "plan")
    rows = dict(re.findall(r"^  (teacher [\w ]+?) +([\d,]+)", plan.stdout, re.M))
    assert rows.keys() >= {"teacher KV cache", "teacher weights"}, plan.stdout + plan.stderr
    assert re.search(r"teacher +checkpoint; per process up to 4 requests a step", plan.stdout)


def test_a_run_that_can_use_no_answer_says_so(tmp_path: Path) -> None:
    (tmp_path / "teacher.py").write_text("def teach(question, response):\n    return 'Well done.'\n")
    options = (*SMALL, "--algorithm", "thinktuning", "--run.steps", "3", "--output", tmp_path / "run")
    done = train(*options, "--thinktuning.teacher", f"{tmp_path / 'teacher.py'}:teach", "--thinktuning.cutoff", "0")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("until one can, this is GRPO under another name") == 2  # after steps 1 and 2
    assert "solve/refused/unparsed" in done.stdout

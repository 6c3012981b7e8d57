"""What the name of an algorithm sets and refuses, and each of them in two real processes."""

import re
from dataclasses import asdict, fields, is_dataclass
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
import yaml

from tests.command import ROOT, train
from thinktwice_fast.algorithms.registry import METHODS
from thinktwice_fast.algorithms.star import with_hint
from thinktwice_fast.config import Config, LossOptions
from thinktwice_fast.errors import UserError
from thinktwice_fast.records import Problem
from thinktwice_fast.run.checks import check_config
from thinktwice_fast.run.metrics import reproducible
from thinktwice_fast.run.metrics_file import read_metrics
from thinktwice_fast.run.options import from_yaml, parse_config, to_yaml
from thinktwice_kernels import PRESETS
from thinktwice_kernels import LossOptions as OpsOptions

# What each published loss differs in from the options' defaults, which are ThinkTwice's.
GRPO = {"scale_rewards": "group", "epsilon_high": 0.2, "dual_clip": None, "beta": 0.04,
        "loss_agg_mode": "seq-mean-token-mean"}  # fmt: skip
PUBLISHED: dict[str, dict[str, Any]] = {
    "thinktwice": {},
    "grpo": GRPO,
    "dr_grpo": {"epsilon_high": 0.2, "dual_clip": None, "loss_agg_mode": "seq-mean-token-sum-norm"},
    "dapo": {"scale_rewards": "group", "dual_clip": None},
    "star": {},
    "thinktuning": {"scale_rewards": "group", "epsilon_high": 0.2},
    "sft": {},
}
TEACHER = f"{ROOT / 'examples' / 'arithmetic_teacher.py'}:teach"
THINKTUNING = "--algorithm thinktuning --thinktuning.teacher frozen"
NEEDED = {"thinktuning": ("--thinktuning.teacher", TEACHER)}  # options without a default


def test_every_algorithm_is_known_everywhere() -> None:
    assert set(get_args(get_type_hints(Config)["algorithm"])) == set(METHODS) == set(PUBLISHED)
    sections = {field.name for field in fields(Config) if is_dataclass(field.default_factory)}
    assert {method.section for method in METHODS.values() if method.section} <= sections


@pytest.mark.parametrize("name", METHODS)
def test_a_name_sets_the_defaults_to_what_was_published(name: str, tmp_path: Path) -> None:
    expected = asdict(LossOptions()) | PUBLISHED[name]
    config = parse_config(["--algorithm", name, *NEEDED.get(name, ())])
    assert asdict(config.loss) == expected
    assert config == Config(algorithm=config.algorithm, loss=config.loss, thinktuning=config.thinktuning)
    check_config(config, 2)
    in_file = tmp_path / "a.yaml"
    in_file.write_text(f"algorithm: {name}\n" + ("loss:\n  beta: 0.5\n" if METHODS[name].preset else ""))
    config = parse_config(["--config", str(in_file)])
    assert asdict(config.loss) == expected | ({"beta": 0.5} if METHODS[name].preset else {})
    saved = tmp_path / "config.yaml"
    saved.write_text(to_yaml(config))
    assert from_yaml(saved) == config


def test_the_options_defaults_are_thinktwices_preset() -> None:
    defaults = {option.name: option.default for option in fields(OpsOptions)}
    preset = defaults | PRESETS["thinktwice"]["grpo_loss"] | PRESETS["thinktwice"]["group_advantages"]
    assert asdict(LossOptions()) == {name: preset[name] for name in asdict(LossOptions())}


def test_the_command_line_goes_before_what_was_published() -> None:
    loss = parse_config(["--algorithm", "grpo", "--loss.beta", "0", "--loss.epsilon_high", "0.28"]).loss
    assert (loss.beta, loss.epsilon_high, loss.scale_rewards) == (0.0, 0.28, "group")


@pytest.mark.parametrize("path", sorted((ROOT / "configs" / "algorithms").glob("*.yaml")), ids=lambda path: path.stem)
def test_an_overlay_makes_a_configuration_for_thinktwice_its_own(path: Path, tmp_path: Path) -> None:
    below = tmp_path / "below.yaml"
    loss = asdict(LossOptions())
    below.write_text(yaml.safe_dump({"algorithm": "thinktwice", "loss": loss, "update": {"minibatch_sequences": 64}}))
    config = parse_config(["--config", str(below), "--config", str(path)])
    assert config.algorithm == path.stem
    assert asdict(config.loss) == loss | PUBLISHED[path.stem]
    check_config(config, 2)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ("--algorithm grpo --dapo.max_draws 5", "--dapo.max_draws would be ignored with --algorithm grpo"),
        ("--algorithm dapo --star.finetune_steps 5", "--star.finetune_steps would be ignored with --algorithm dapo"),
        ("--dapo.overlong_penalty 2", "--dapo.overlong_penalty would be ignored with --algorithm thinktwice"),
        ("--algorithm grpo --thinktwice.pairing joint", "--thinktwice.pairing would be ignored"),
        (
            "--algorithm grpo --eval.sets {} --thinktwice.refine_instruction x",
            "--thinktwice.refine_instruction would be",
        ),
        ("--algorithm star --loss.beta 0.1", "--loss.beta would be ignored with --algorithm star"),
        ("--algorithm star --update.minibatch_sequences 64", "--update.minibatch_sequences would be ignored"),
        ("--algorithm star --star.hint x", "--star.hint would be ignored without --star.rationalize true"),
        ("--algorithm star --star.rationalize true --star.hint x", "write {answer} where"),
        ("--algorithm star --star.problems_per_iteration 40", "take a multiple of --problems_per_step 32"),
        ("--algorithm star --update.lr_schedule cosine", "give --update.lr_decay_steps"),
        ("--algorithm dapo --dapo.overlong_buffer_tokens 65", "must be at most --rollout.max_response_tokens 64"),
        ("--algorithm dapo --dapo.overlong_buffer_tokens 0 --dapo.overlong_penalty 2", "--dapo.overlong_penalty would"),
        ("--algorithm dapo --dapo.max_draws 0", "--dapo.max_draws 0: must be at least 1"),
        ("--algorithm dr_grpo --samples_per_problem 1", "at least 2"),
        ("--algorithm thinktuning", "needs a teacher: give --thinktuning.teacher frozen, live, checkpoint:PATH"),
        ("--algorithm thinktuning --thinktuning.teacher wise", "--thinktuning.teacher wise: no teacher: use frozen"),
        ("--algorithm thinktuning --thinktuning.teacher endpoint", "give its address with --thinktuning.endpoint_url"),
        (f"{THINKTUNING} --thinktuning.min_fraction 0.5", "0.5 is above --thinktuning.fraction 0.1"),
        (f"{THINKTUNING} --rollout.stop_strings [x]", "a response that a stop string ends has no end token"),
        (f"{THINKTUNING} --thinktuning.endpoint_retries 1", "would be ignored with --thinktuning.teacher frozen"),
        (f"{THINKTUNING} --thinktuning.teacher a.py:f --thinktuning.shots x", "--thinktuning.shots would be ignored"),
        ("--algorithm grpo --thinktuning.teacher frozen", "--thinktuning.teacher would be ignored with --algorithm"),
        ("--algorithm grpo --update.minibatch_sequences 12", "take a multiple of 8 that divides 256"),
    ],
)
def test_options_that_do_not_fit_the_algorithm_are_refused(arguments: str, says: str) -> None:
    with pytest.raises(UserError, match=re.escape(says)):
        check_config(parse_config(arguments.split()), 1)


@pytest.mark.parametrize(
    "arguments",
    [
        "--algorithm grpo --loss.policy_loss sapo",  # bounds that it lacks stand at this algorithm's defaults
        "--algorithm dapo --dapo.max_draws off --dapo.overlong_buffer_tokens 64",
        "--algorithm star --samples_per_problem 1 --star.rationalize true",
        "--algorithm grpo --thinktwice.refine_instruction x",  # evaluations refine
    ],
)
def test_options_that_fit_are_not(arguments: str) -> None:
    check_config(parse_config(arguments.split()), 1)


def test_a_hint_comes_after_the_question() -> None:
    problem = Problem(0, ({"role": "system", "content": "s"}, {"role": "user", "content": "q?"}), r"\frac{1}{2}")
    told = {"role": "user", "content": r"q? It is \boxed{\frac{1}{2}}."}
    assert with_hint(problem, r"It is \boxed{{answer}}.") == (problem.messages[0], told)


BATCH = ("--problems_per_step", "4", "--samples_per_problem", "4", "--update.warmup_steps", "0", "--eval.sets", "{}")
RUNS = {
    "grpo": ("--run.steps", "1"),
    "dapo": ("--run.steps", "1", "--update.minibatch_sequences", "8"),
    # Two iterations: the second starts from sharded weights that have been trained.
    "star": ("--run.steps", "4", "--star.problems_per_iteration", "4", "--star.finetune_steps", "1",
             "--star.finetune_growth", "1", "--update.learning_rate", "1e-3"),
    "thinktuning": ("--run.steps", "1", *NEEDED["thinktuning"]),
}  # fmt: skip


@pytest.mark.parametrize("name", RUNS)
def test_two_processes_do_the_steps_of_one(name: str, tmp_path: Path) -> None:
    records = []
    for processes in (1, 2):
        output = tmp_path / str(processes)
        finished = train("--algorithm", name, *BATCH, *RUNS[name], "--output", output, processes=processes)
        assert finished.returncode == 0, finished.stderr
        records.append(reproducible(read_metrics(output / "metrics.jsonl")))
    assert records[0][0].get("solve/teacher_acceptance", 1.0) >= 0.5, "the example teaches the default task"
    for one, two in zip(*records, strict=True):
        assert one.keys() == two.keys()
        for key, value in one.items():
            assert two[key] == (value if key == "phase" else pytest.approx(value, rel=1e-3, abs=1e-6)), key

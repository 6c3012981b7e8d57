"""Options: what --help says, which source wins, what is written down, and the ready configurations."""

import dataclasses
import re
import subprocess
import sys
import typing
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.command import LIMIT, ROOT, TRAIN, environment
from thinktwice_fast.config import Config, LossOptions, samples_per_optimizer_step
from thinktwice_fast.errors import UserError
from thinktwice_fast.run.build import optimizer_steps, recipe_notes, refine_instruction
from thinktwice_fast.run.checks import check_config, check_output
from thinktwice_fast.run.options import from_yaml, parse_config, to_yaml
from thinktwice_fast.tasks.evaluation_sets import evaluation_sets
from thinktwice_fast.update.objective import loss_arguments
from thinktwice_kernels import PRESETS
from thinktwice_kernels import LossOptions as OpOptions

CONFIGS = sorted((ROOT / "configs").rglob("*.yaml"))


def leaves(owner: type = Config, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Full name and default of every option."""
    hints = typing.get_type_hints(owner)
    for field in fields(owner):
        if is_dataclass(hints[field.name]):
            yield from leaves(hints[field.name], f"{prefix}{field.name}.")
        else:
            factory = field.default_factory
            yield prefix + field.name, field.default if factory is dataclasses.MISSING else factory()


def written(path: Path) -> set[str]:
    """Names of the options that a YAML file states."""
    content = yaml.safe_load(path.read_text())
    sections = {field.name for field in fields(Config) if is_dataclass(field.default_factory)}
    inner = {f"{section}.{name}" for section in sections & content.keys() for name in content[section]}
    return inner | (content.keys() - sections)


@pytest.fixture(scope="module")
def help_text() -> str:
    command = [sys.executable, str(TRAIN), "--help"]
    wide = environment() | {"COLUMNS": "400"}
    done = subprocess.run(command, env=wide, capture_output=True, text=True, timeout=LIMIT)
    assert done.returncode == 0 and not done.stderr
    return " ".join(done.stdout.partition("options:")[2].split())


@pytest.mark.parametrize(("name", "default"), list(leaves()))
def test_help_explains_every_option_with_its_default(name: str, default: Any, help_text: str) -> None:
    entry = re.search(
        rf"--{re.escape(name)} (\S+|{{.*?}}) (?P<meaning>.*?) \(default: (?P<default>.*?)\)( --|$| [A-Z])", help_text
    )
    assert entry is not None
    assert len(entry["meaning"].split()) >= 3 and "--" not in entry["meaning"]
    assert entry["default"] == str(default)


def test_help_names_only_what_exists(help_text: str) -> None:
    known = {name for name, _ in leaves()} | {"config", "dry-run", "dry-run-gpu", "help", "print_config"}
    sections = {field.name for field in fields(Config) if is_dataclass(field.default_factory)}
    named = {name.rstrip(".") for name in re.findall(r"--([a-z_.-]+)", help_text)}
    assert named - sections <= known


def test_the_command_line_goes_before_files_and_later_files_before_earlier_ones(tmp_path: Path) -> None:
    first, second = tmp_path / "first.yaml", tmp_path / "second.yaml"
    first.write_text("seed: 1\nrun:\n  steps: 11\n  keep_checkpoints: 7\nupdate:\n  learning_rate: 1.0e-3\n")
    second.write_text("seed: 2\nrun:\n  steps: 22\n")
    config = parse_config(["--config", str(first), "--config", str(second), "--run.steps", "33"])
    assert (config.seed, config.run.steps, config.run.keep_checkpoints) == (2, 33, 7)
    assert config.update.learning_rate == 1e-3
    assert config.loss == Config().loss


def test_values_keep_their_types() -> None:
    values = ["--loss.dual_clip", "null", "--update.adam_betas", "[0.8, 0.95]", "--eval.sets", '{"a": "b.jsonl"}']
    config = parse_config([*values, "--data.shuffle", "false", "--update.learning_rate", "1e-6"])
    assert config.loss.dual_clip is None
    assert config.update.adam_betas == (0.8, 0.95)
    assert config.eval.sets == {"a": "b.jsonl"}
    assert config.data.shuffle is False
    assert config.update.learning_rate == 1e-6


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_the_saved_configuration_gives_the_same_run_again(path: Path, tmp_path: Path) -> None:
    config = parse_config(["--config", str(path), "--loss.dual_clip", "null", "--data.source", "mine: a file.jsonl"])
    saved = tmp_path / "config.yaml"
    saved.write_text(to_yaml(config))
    assert from_yaml(saved) == config
    assert written(saved) == {name for name, _ in leaves()}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
@pytest.mark.parametrize("processes", [1, 2])
def test_ready_configurations_are_valid(path: Path, processes: int) -> None:
    check_config(from_yaml(path), processes)


def test_the_tiny_configuration_is_the_default() -> None:
    assert from_yaml(ROOT / "configs" / "tiny.yaml") == Config()


@pytest.mark.parametrize(
    "arguments",
    [
        "--algorithm sft --loss.epsilon_low 0.1",
        "--algorithm sft --rollout.temperature 0.5",
        "--algorithm sft --thinktwice.pairing joint",
        "--thinktwice.pairing joint --thinktwice.refine_every 2",
        "--sft.refine_fraction 0.1",
        "--data.target_column solution",
        "--data.question_column text",
        "--data.instruction think",
        "--data.shuffle false",
        "--data.split test",
        "--data.source mine.jsonl --data.subset main",
        "--loss.kl_estimator k1",
        "--thinktuning.guide_fallback clip",
        "--eval.samples 4",
        "--eval.top_p 0.9",
        "--eval.sets {} --eval.temperature 0.5",
        "--update.lr_decay_steps 10",
        "--model.lora_alpha 8",
        "--model.lora_targets ['q_proj']",
        "--loss.policy_loss sapo --loss.dual_clip 2.0",
        "--loss.policy_loss sapo --loss.epsilon_high 0.2",
        "--loss.policy_loss cispo --loss.epsilon_low 0.1",
        "--update.old_logps rollout --update.minibatch_sequences 0",
        "--update.old_logps rollout --problems_per_step 12",
        "--rollout.exact true --rollout.decoder fused",
        "--rollout.exact true --loss.rollout_is token-mask",
        "--update.old_logps rollout --update.minibatch_sequences 64 --loss.rollout_is token-truncate",
        "--rollout.exact true --update.old_logps rollout --update.minibatch_sequences 64",
        "--algorithm sft --rollout.exact true",
        "--update.old_logps rollout --update.minibatch_sequences 256",
        "--update.old_logps rollout --update.minibatch_sequences 512 --thinktwice.pairing joint",
        "--algorithm sft --data.limit 100",
        "--algorithm sft --data.limit 100 --data.shuffle false",
        "--algorithm sft --eval.sets {} --reward exact",
        "--algorithm sft --eval.sets {} --rollout.cache_tokens 4096",
        "--reward exact --reward_workers 4",
        "--reward choice --reward_workers 4",
        "--reward exact --reward_timeout 3",
        "--eval.split train",
        "--eval.subset main",
        "--eval.question_column text",
        "--eval.answer_column gold",
        "--eval.instruction think",
        '--eval.sets {"a":"mine.jsonl","b":"arithmetic:tm5"} --eval.split train',
        '--eval.sets {"a":"mine.jsonl"} --eval.subset main',
        "--eval.sets [amc] --eval.split train",
        "--eval.sets [amc] --eval.question_column text",
        '--eval.sets {"a":{"source":"openai/gsm8k","split":"test"}} --eval.split train',
        "--eval.data_root data",
        "--data.wrong_columns ['a','b']",
        "--eval.sets {} --eval.limit 10",
        "--eval.sets {} --eval.every 10",
        "--run.save false --resume auto",
        "--run.save false --run.checkpoint_every 5",
        "--run.save false --run.keep_best eval/held_out/solve_accuracy",
        "--eval.sets {} --run.keep_best eval/held_out/solve_accuracy",
        "--data.source mine.jsonl --eval.limit 10",  # a file holds nothing back, so there are no sets
    ],
)
def test_an_option_without_effect_is_an_error(arguments: str) -> None:
    with pytest.raises(UserError, match=" would be ignored ") as refusal:
        check_config(parse_config(arguments.split()), 1)
    assert str(refusal.value).split()[0] in arguments.split()


@pytest.mark.parametrize(
    "arguments",
    [
        "--data.limit 100 --data.shuffle false",
        "--loss.policy_loss sapo",  # the defaults of bounds that an objective lacks count as not set
        "--loss.policy_loss sapo --loss.dual_clip null",
        "--loss.policy_loss cispo --loss.importance_sampling_level sequence",
        "--loss.policy_loss cispo --loss.epsilon_high 0.3",
        "--update.old_logps rollout",
        "--update.old_logps rollout --update.minibatch_sequences 64",
        "--update.old_logps rollout --update.minibatch_sequences 256 --thinktwice.pairing joint",
        '--eval.sets {"a":"mine.jsonl"} --eval.question_column text',
        '--eval.sets {"a":{"source":"openai/gsm8k","subset":"main"},"b":"amc"} --eval.split train',
        "--reward exact --eval.sets [amc] --reward_timeout 3 --reward_workers 4",  # for the set's own grader
        '--eval.sets {"a":"openai/gsm8k","b":"arithmetic:tm5"} --eval.split train --eval.subset main',
        "--algorithm sft --data.source mine.jsonl --data.target_column solution --sft.refine_fraction 0",
        "--update.lr_schedule linear --update.lr_decay_steps 6",
        "--rollout.stop_strings ['####','\\n\\n']",
        "--rollout.exact true --update.minibatch_sequences 64",
        "--loss.rollout_is sequence-mask --loss.rollout_is_cap 1.5 --loss.rollout_is_floor 0.5",
        "--model.lora_rank 4 --model.lora_alpha 8 --model.lora_targets ['q_proj']",
        "--rollout.cache_tokens 241",  # in blocks of 16 as many as 256 tokens take
        "--seed 2147483647",
    ],
)
def test_an_option_with_effect_is_not(arguments: str) -> None:
    check_config(parse_config(arguments.split()), 1)


def test_bounds_that_an_objective_lacks_do_not_reach_it() -> None:
    bounds = {"epsilon_low", "epsilon_high", "dual_clip"}
    for objective, kept in (("clip", bounds), ("cispo", {"epsilon_high"}), ("sapo", set())):
        config = parse_config(["--loss.policy_loss", objective])
        assert bounds & loss_arguments(config.loss, 64, config.thinktuning, guided=False).keys() == kept


def test_the_released_code_has_no_dual_clip_where_no_rollout_is_guided() -> None:
    config = parse_config(["--thinktuning.released_code_compat", "true", "--thinktuning.guide_fallback", "clip"])
    guided, other = (loss_arguments(config.loss, 64, config.thinktuning, guided=guided) for guided in (True, False))
    shaping = {"shaping_coefficient", "shaping_clamp", "shaping_min_probability", "guide_fallback"}
    assert guided.keys() - other.keys() == {"dual_clip", "released_code_compat"} | shaping
    assert guided["released_code_compat"] and guided["dual_clip"] == 3.0


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_options_of_a_run(name: str) -> None:
    """Its keywords are options of the same names (SAPO's temperatures aside, which a run leaves at their defaults)."""
    config, preset = Config(), PRESETS[name]
    wanted: dict[str, Any] = {**preset["group_advantages"], **preset["grpo_loss"]}
    others = {"dual_clip": None, "epsilon_high": 0.2}  # where a run's default is not the op's
    config.loss = LossOptions(**{key: value for key, value in (others | wanted).items() if hasattr(config.loss, key)})
    arguments = loss_arguments(config.loss, 64, config.thinktuning, guided=False)
    limit = {"max_response_length": 64} if name == "dr_grpo" else {}
    assert config.loss.scale_rewards == wanted["scale_rewards"]
    assert OpOptions(**arguments) == OpOptions(**{**preset["grpo_loss"], **limit})


def test_evaluation_sets_follow_the_training_data() -> None:
    def sets(*arguments: str) -> dict[str, str]:
        return {name: entry.data.source for name, entry in evaluation_sets(parse_config([*arguments])).items()}

    assert sets() == {"held_out": "arithmetic:tm5"}
    assert sets("--data.source", "arithmetic:te5") == {"held_out": "arithmetic:te5"}
    assert sets("--data.source", "mine.jsonl") == {}
    assert sets("--eval.sets", "{}") == {}
    assert sets("--data.source", "mine.jsonl", "--eval.sets", '{"a": "b.csv"}') == {"a": "b.csv"}
    assert sets("--eval.sets", "[amc, gsm8k]") == {"amc": "AI-MO/aimo-validation-amc", "gsm8k": "openai/gsm8k"}
    assert sets("--eval.sets.mine", "b.csv", "--eval.sets.few", "{source: amc, limit: 3}") == {
        "mine": "b.csv",
        "few": "AI-MO/aimo-validation-amc",
    }


@pytest.mark.parametrize(
    ("problems", "samples", "pairing", "given", "resolved"),
    [
        (32, 8, "sequential", None, 64),
        (32, 8, "joint", None, 128),
        (16, 5, "sequential", None, 40),
        (8, 64, "joint", None, 1024),
        (12, 8, "sequential", None, 96),  # eight problems do not divide these
        (4, 4, "joint", None, 32),
        (32, 8, "sequential", 0, 256),
        (32, 8, "joint", 0, 512),
        (32, 8, "joint", 128, 128),
    ],
)
def test_samples_of_an_optimizer_step(
    problems: int, samples: int, pairing: Any, given: int | None, resolved: int
) -> None:
    config = Config(problems_per_step=problems, samples_per_problem=samples)
    config.thinktwice.pairing, config.update.minibatch_sequences = pairing, given
    assert samples_per_optimizer_step(config) == resolved


@pytest.mark.parametrize(
    ("arguments", "steps"),
    [
        ("", 800),
        ("--thinktwice.pairing joint", 800),
        ("--update.minibatch_sequences 0", 200),
        ("--algorithm sft", 200),
    ],
)
def test_optimizer_steps_of_a_run(arguments: str, steps: int) -> None:
    """The length of a learning rate's schedule."""
    assert optimizer_steps(parse_config(arguments.split())) == steps


@pytest.mark.parametrize(
    ("arguments", "processes", "says"),
    [
        ("--problems_per_step 3", 2, "does not divide over 2 processes: take a multiple of 2"),
        ("--problems_per_step 1", 2, "start fewer processes"),
        ("--update.minibatch_sequences 12", 1, "take a multiple of 8 that divides 256"),
        ("--update.minibatch_sequences 512", 1, "take a multiple of 8 that divides 256"),
        ("--update.minibatch_sequences 8", 2, "take a multiple of 16"),
        (
            "",
            16,
            "--update.minibatch_sequences 64 (8 groups) does not divide over 16 processes: take a multiple of 128",
        ),
        (
            "--thinktwice.pairing joint --update.minibatch_sequences 8",
            1,
            "a phase of 32 x 16 samples into whole pairs of groups: take a multiple of 16 that divides 512",
        ),
        (
            "--thinktwice.pairing joint --update.minibatch_sequences 16",
            2,
            "(1 pairs of groups) does not divide over 2 processes: take a multiple of 32",
        ),
        ("--samples_per_problem 1", 1, "at least 2"),
        ("--rollout.temperature 0", 1, "above 0"),
        ("--rollout.top_p 0", 1, "above 0 and at most 1"),
        ("--rollout.min_p 2", 1, "from 0 to 1"),
        ("--run.keep_checkpoints 0", 1, "at least 1"),
        ("--run.keep_best eval/average/solve_accuracy", 1, "give one of eval/held_out/solve_accuracy, "),
        ("--run.keep_best eval/held_out/damage_correct", 1, "eval/held_out/fix_wrong"),
        ("--seed -1", 1, "--seed -1: must be at least 0"),
        ("--seed 2147483648", 1, "--seed 2147483648: must be at most 2147483647"),
        ("--rollout.top_k 5000000000", 1, "--rollout.top_k 5000000000: must be at most 2147483647"),
        ("--update.adam_betas [1.0,0.9]", 1, "--update.adam_betas [1.0, 0.9]: each must be from 0 to below 1"),
        ("--update.adam_betas [0.9,-0.1]", 1, "each must be from 0 to below 1"),
        ("--update.adam_betas [0.9,.nan]", 1, "--update.adam_betas nan: give a finite number"),
        ("--sft.draft_error_rates []", 1, "--sft.draft_error_rates []: give at least one rate"),
        ("--algorithm sft --sft.draft_error_rates [0.5,1.5]", 1, "[0.5, 1.5]: each must be from 0 to 1"),
        ("--run.distributed_timeout .inf", 1, "--run.distributed_timeout inf: give a finite number"),
        ("--run.distributed_timeout .nan", 1, "--run.distributed_timeout nan: give a finite number"),
        ("--run.distributed_timeout 1e300", 1, "must be from 1 to 1000000"),
        ("--reward_timeout 0", 1, "--reward_timeout 0.0: must be above 0 and at most 1000000"),
        ("--reward_workers 0", 1, "--reward_workers 0: must be at least 1"),
        ("--update.lr_schedule linear --update.lr_decay_steps 5", 1, "give more than --update.warmup_steps 5"),
        ("--model.lora_rank -1", 1, "--model.lora_rank -1: must be at least 0"),
        ("--model.lora_rank 4 --model.lora_alpha 0", 1, "--model.lora_alpha 0.0: must be above 0"),
        ("--model.lora_rank 4 --rollout.exact true", 1, "--rollout.exact and --model.lora_rank: rollouts read merged"),
        ("--rollout.cache_tokens 240", 1, "one sequence may take 256"),
        ("--algorithm sft --data.source mine.jsonl --sft.refine_fraction 0", 1, "set --data.target_column"),
        ("--algorithm sft --data.source a.jsonl --data.target_column b", 1, "--sft.refine_fraction 0"),
        ("--loss.dual_clip 0.9", 1, "dual_clip is 0.9: choose a number above 1"),
        ("--update.shard_processes 3", 2, "does not divide 2 processes: take a divisor of 2, or 0"),
        ('--eval.sets {"average":"a.jsonl"}', 1, "rename it"),
        ('--eval.sets {"a/b":"a.jsonl"}', 1, "can't name a set"),
        ('--eval.sets {"a":{"source":"amc","limit":-1}}', 1, "--eval.sets.a.limit -1: must be at least 0"),
    ],
)
def test_values_that_can_not_work_are_refused(arguments: str, processes: int, says: str) -> None:
    with pytest.raises(UserError, match=re.escape(says)):
        check_config(parse_config(arguments.split()), processes)


@pytest.mark.parametrize(
    ("arguments", "instruction"),
    [
        ("", "recheck"),
        ("--data.source arithmetic:te5", "recheck"),
        ("--data.source mine.jsonl", "recheck"),
        ("--data.source mine.jsonl --model.path mine", "default"),
        ("--model.path mine", "recheck"),
        ("--thinktwice.refine_instruction again", "again"),
        ("--data.source mine.jsonl --thinktwice.refine_instruction again", "again"),
    ],
)
def test_the_refine_instruction_follows_task_and_model(arguments: str, instruction: str) -> None:
    assert refine_instruction(parse_config(arguments.split())) == instruction


@pytest.mark.parametrize(
    ("arguments", "noted"),
    [
        ("", False),
        ("--data.source arithmetic:te5", False),
        ("--data.source mine.jsonl", False),
        ("--model.path Qwen/Qwen3-0.6B", True),
        ("--model.path Qwen/Qwen3-0.6B --update.learning_rate 1e-6", False),
        ("--model.path Qwen/Qwen3-0.6B --rollout.max_response_tokens 500", False),
        (f"--config {ROOT / 'configs' / 'paper' / 'math.yaml'} --model.path Qwen/Qwen3-4B", False),
        (f"--config {ROOT / 'configs' / 'tiny-warm-start.yaml'}", False),
    ],
)
def test_a_note_tells_who_took_another_model_but_not_its_recipe(arguments: str, noted: bool) -> None:
    notes = recipe_notes(parse_config(arguments.split()))
    assert len(notes) == noted
    assert all("--rollout.max_response_tokens 64, --update.learning_rate 5e-05" in note for note in notes)


@pytest.mark.parametrize("value", [".inf", "-.inf", ".nan"])
@pytest.mark.parametrize(
    "name", [name for name, default in leaves() if isinstance(default, float) or name == "loss.dual_clip"]
)
def test_no_option_takes_a_number_that_is_not_finite(name: str, value: str) -> None:
    number = float(value.replace(".", ""))
    with pytest.raises(UserError, match=re.escape(f"--{name} {number}: give a finite number")):
        check_config(parse_config([f"--{name}={value}"]), 1)


def test_only_rank_0_probes_the_output_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    probe = tmp_path / ".writable"
    probe.touch()  # rank 0's, which it is about to remove
    monkeypatch.setenv("RANK", "1")
    check_output(Config(output=str(tmp_path)))
    assert probe.exists()
    monkeypatch.setenv("RANK", "0")
    check_output(Config(output=str(tmp_path)))
    assert not probe.exists()


def test_an_output_folder_is_one_run(tmp_path: Path) -> None:
    config = Config(output=str(tmp_path / "run"))
    check_output(config)
    (tmp_path / "run" / "config.yaml").touch()  # of an attempt that failed before it logged anything
    check_output(config)
    (tmp_path / "run" / "metrics.jsonl").touch()
    with pytest.raises(UserError, match="--resume auto, or give another --output"):
        check_output(config)
    check_output(Config(output=config.output, resume="auto"))
    check_output(Config(output=config.output, resume=f"{config.output}/checkpoints/step-000001"))
    with pytest.raises(UserError, match="holds another run"):
        check_output(Config(output=config.output, resume=str(tmp_path / "other" / "checkpoints" / "step-000001")))

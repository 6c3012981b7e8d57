"""configs/paper/ against the values that the papers' authors ran with, key by key.

A value that stands in an overlay and not in its table here is an error, and the other way round.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.command import ROOT
from thinktwice_fast.run.checks import check_config
from thinktwice_fast.run.options import parse_config
from thinktwice_fast.tasks.evaluation_sets import evaluation_sets

PAPER = ROOT / "configs" / "paper"
# ThinkTwice, arXiv 2604.01591: its released scripts and training file.
VALUES: dict[str, dict[str, Any]] = {
    "math": {
        "algorithm": "thinktwice",
        "problems_per_step": 32,
        "samples_per_problem": 8,
        "reward": "math_strict",
        "data.source": "EleutherAI/hendrycks_math",
        "data.subset": ["algebra", "counting_and_probability", "geometry", "intermediate_algebra", "number_theory",
                        "prealgebra", "precalculus"],
        "data.split": "train",
        "data.instruction": "Solve the following math problem step by step. Put your final answer inside \\boxed{}, "
                            "like \\boxed{42} or \\boxed{\\frac{1}{2}}.",
        "thinktwice.pairing": "sequential",
        "thinktwice.base_selection": "uniform",
        "thinktwice.refine_instruction": "default",
        "rollout.temperature": 1.0,
        "rollout.top_p": 1.0,
        "rollout.top_k": 0,
        "rollout.max_prompt_tokens": 5120,
        "rollout.max_response_tokens": 3000,
        "loss.scale_rewards": "none",
        "loss.epsilon_low": 0.2,
        "loss.epsilon_high": 0.28,
        "loss.dual_clip": 3.0,
        "loss.beta": 0.0,
        "loss.entropy_coef": 0.0,
        "loss.loss_agg_mode": "token-mean",
        "update.learning_rate": 1e-6,
        "update.warmup_steps": 0,
        "update.lr_schedule": "constant",
        "update.adam_betas": [0.9, 0.999],
        "update.weight_decay": 0.01,
        "update.grad_clip": 1.0,
        "update.minibatch_sequences": 64,
        "eval.sets": ["aime", "amc", "math500", "minerva_math", "olympiadbench"],
        "eval.limit": 0,
        "eval.every": 10,
        "eval.temperature": 0.0,
        "run.steps": 1170,
        "run.checkpoint_every": 10,
        "run.keep_checkpoints": 1,
        "run.keep_best": "eval/average/solve_accuracy",
    },
    "qwen3-4b": {
        "model.path": "Qwen/Qwen3-4B-Instruct-2507",
        "model.chat_template_args": {"enable_thinking": False},
        "model.compute_dtype": "bfloat16",
        "model.activation_checkpointing": True,
    },
    "olmo3-7b": {
        "model.path": "allenai/Olmo-3-7B-Instruct",
        "model.strip_default_system": True,
        "model.compute_dtype": "bfloat16",
        "model.activation_checkpointing": True,
    },
    # Baselines of its tables: of these its code tells that there is no KL term, that DAPO filters groups without a
    # bound, and no overlong shaping. The rest is each method's own paper.
    "grpo": {
        "algorithm": "grpo",
        "loss.scale_rewards": "group",
        "loss.epsilon_low": 0.2,
        "loss.epsilon_high": 0.2,
        "loss.dual_clip": None,
        "loss.beta": 0.0,
        "loss.loss_agg_mode": "seq-mean-token-mean",
    },
    "dr_grpo": {
        "algorithm": "dr_grpo",
        "loss.scale_rewards": "none",
        "loss.epsilon_low": 0.2,
        "loss.epsilon_high": 0.2,
        "loss.dual_clip": None,
        "loss.beta": 0.0,
        "loss.loss_agg_mode": "seq-mean-token-sum-norm",
    },
    "dapo": {
        "algorithm": "dapo",
        "dapo.max_draws": "off",
        "dapo.overlong_buffer_tokens": 0,
        "loss.scale_rewards": "group",
        "loss.epsilon_low": 0.2,
        "loss.epsilon_high": 0.28,
        "loss.dual_clip": None,
        "loss.beta": 0.0,
        "loss.loss_agg_mode": "token-mean",
    },
    # ThinkTuning, arXiv 2508.07616: its released script; prompts and evaluation are ours.
    "thinktuning-llama3.2-3b": {
        "algorithm": "thinktuning",
        "problems_per_step": 128,
        "samples_per_problem": 5,
        "reward": "math",
        "model.path": "meta-llama/Llama-3.2-3B-Instruct",
        "model.compute_dtype": "bfloat16",
        "model.activation_checkpointing": True,
        "data.source": "openai/gsm8k",
        "data.subset": "main",
        "data.split": "train",
        "data.instruction": "Solve the following math problem step by step. Put your final answer inside \\boxed{}, "
                            "like \\boxed{42} or \\boxed{\\frac{1}{2}}.",
        "thinktuning.teacher": "frozen",
        "thinktuning.fraction": 0.1,
        "thinktuning.min_fraction": 0.01,
        "thinktuning.cutoff": 0.06,
        "thinktuning.guidance_tokens": 512,
        "thinktuning.teacher_prompt_tokens": 3072,
        "thinktuning.teacher_answer_tokens": 1024,
        "rollout.temperature": 1.0,
        "rollout.top_p": 1.0,
        "rollout.top_k": 0,
        "rollout.max_prompt_tokens": 512,
        "rollout.max_response_tokens": 1024,
        "loss.scale_rewards": "group",
        "loss.epsilon_low": 0.2,
        "loss.epsilon_high": 0.2,
        "loss.dual_clip": 3.0,
        "loss.beta": 0.0,
        "loss.entropy_coef": 0.0,
        "loss.loss_agg_mode": "token-mean",
        "update.learning_rate": 1e-6,
        "update.warmup_steps": 0,
        "update.lr_schedule": "constant",
        "update.adam_betas": [0.9, 0.999],
        "update.weight_decay": 0.01,
        "update.grad_clip": 1.0,
        "update.minibatch_sequences": 32 * 5,
        "eval.sets": ["gsm8k"],
        "eval.limit": 0,
        "eval.every": 10,
        "run.steps": 50,
        "run.checkpoint_every": 10,
    },
}  # fmt: skip
OURS = {"output", "rollout.max_sequences", "run.transcripts_every"}  # nothing that a result hangs on
MODELS = ("qwen3-4b", "olmo3-7b")
BASELINES = ("grpo", "dr_grpo", "dapo")


def stated(path: Path) -> dict[str, Any]:
    """The options that a file states, by their full name."""
    content = yaml.safe_load(path.read_text())
    values = {key: value for key, value in content.items() if not isinstance(value, dict)}
    sections = {key: value for key, value in content.items() if isinstance(value, dict)}
    return values | {f"{key}.{name}": value for key, section in sections.items() for name, value in section.items()}


def test_every_overlay_has_its_table() -> None:
    assert {path.stem for path in PAPER.iterdir()} == set(VALUES)


@pytest.mark.parametrize("name", VALUES)
def test_overlays_state_what_the_authors_ran(name: str) -> None:
    options = stated(PAPER / f"{name}.yaml")
    assert {option: value for option, value in options.items() if option not in OURS} == VALUES[name]


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("processes", [1, 2])
def test_overlays_make_a_run_together(model: str, processes: int) -> None:
    files = [part for name in ("math", model) for part in ("--config", str(PAPER / f"{name}.yaml"))]
    config = parse_config(files)
    check_config(config, processes)
    assert config.data.subset == tuple(VALUES["math"]["data.subset"])
    assert config.model.path == VALUES[model]["model.path"]
    # The prompts of the sets and of training say the same.
    assert {entry.data.instruction for entry in evaluation_sets(config).values()} == {config.data.instruction}
    # A set of one's own in place of these, as in docs/guide.md.
    own = ["--data.source", "my.jsonl", "--data.subset", "null", "--eval.sets.mine", "test.jsonl"]
    own += ["--run.keep_best", "eval/mine/solve_accuracy"]
    config = parse_config([*files, *own])
    check_config(config, processes)
    assert config.eval.sets == {"mine": "test.jsonl"}


@pytest.mark.parametrize("name", BASELINES)
def test_a_baseline_goes_on_top_of_the_run_that_it_is_compared_with(name: str) -> None:
    below = [part for other in ("math", MODELS[0]) for part in ("--config", str(PAPER / f"{other}.yaml"))]
    config = parse_config([*below, "--config", str(PAPER / f"{name}.yaml")])
    check_config(config, 2)
    compared = parse_config(below)
    assert replace(config, algorithm="thinktwice", dapo=compared.dapo, loss=compared.loss) == compared

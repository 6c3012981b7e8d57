"""Bad input through the real command: exit status 2 before training, and one line that names the remedy."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.command import LIMIT, ROOT, TRAIN, environment, train
from tests.run.refusals import (
    ROWS,
    SMALL,
    Case,
    Outcomes,
    jsonl,
    logged_steps,
    named,
    options,
    problems,
    refused,
    refused_by_torchrun,
    source,
    steps_on_disk,
    text,
)
from tests.small_models import write_model

SHIPPED = ROOT / "thinktwice_fast" / "assets" / "tiny"


def model_without(folder: Path, *names: str) -> Path:
    shutil.copytree(SHIPPED, folder / "model")
    for name in names:
        (folder / "model" / name).unlink()
    return folder / "model"


def shallower_model(folder: Path) -> Path:
    model = model_without(folder, "model.safetensors")
    config = json.loads((model / "config.json").read_text())
    config |= {"num_hidden_layers": 1, "layer_types": config["layer_types"][:1]}
    (model / "config.json").write_text(json.dumps(config))
    return model


def gelu_model(folder: Path) -> Path:
    model = model_without(folder)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"hidden_act": "gelu"}))
    return model


DATA_CASES = [
    Case("missing file", ("absent.jsonl: no such file", "check the path"), options("--data.source", "absent.jsonl")),
    Case("empty file", ("the file is empty", "give one with problems"), source()),
    Case("malformed line", ("line 2 is malformed JSON", "mend the line"), source(ROWS[0], '{"question": "1+', ROWS[1])),
    Case(
        "missing column",
        ("no column prompt or question or problem", "it has task, answer", "--data.question_column"),
        source(*({"task": row["question"], "answer": row["answer"]} for row in ROWS)),
        fresh=True,
    ),
    Case(
        "lists as answers",
        ("row 0", "column answer", "of type list, not text", "make it a string"),
        source(*({"question": row["question"], "answer": [row["answer"]]} for row in ROWS)),
    ),
    Case(
        "one answer is a number",
        ("row 2", "column answer", "of type int", "give it one type"),
        source(*ROWS[:2], {"question": "1+1+1+1+1", "answer": 5}, *ROWS[2:]),
    ),
    Case(
        "every prompt too long",
        ("problems.jsonl: no problem is left", "set --rollout.max_prompt_tokens to at least"),
        lambda folder: [*problems(folder, *ROWS), "--rollout.max_prompt_tokens", "70"],
    ),
    Case(
        "fewer problems than a step takes",
        ("5 problems are fewer than --problems_per_step 6", "give more problems or lower it"),
        lambda folder: [*problems(folder, *ROWS), "--problems_per_step", "6"],
    ),
    Case(
        "SFT without responses to learn",
        ("--algorithm sft from ", "set --data.target_column", "--sft.refine_fraction 0"),
        lambda folder: ["--data.source", jsonl(folder, *ROWS), "--algorithm", "sft", "--samples_per_problem", "8"],
    ),
    Case(
        "missing evaluation file",
        ("absent.parquet: no such file", "check the path"),
        options("--eval.sets", '{"held_out": "absent.parquet"}'),
    ),
]
MODEL_CASES = [
    Case(
        "no such model",
        ("--model.path no-such-model", "neither a model folder here nor a model the hub gives", "check the name"),
        options("--model.path", "no-such-model"),
    ),
    Case(
        "no config",
        ("no config.json in it", "give a model folder in transformers format"),
        lambda folder: ["--model.path", model_without(folder, "config.json")],
    ),
    Case(
        "no weights",
        ("no weights (*.safetensors) in it", "--model.random_init true"),
        lambda folder: ["--model.path", model_without(folder, "model.safetensors")],
    ),
    Case(
        "no tokenizer",
        ("no tokenizer that loads is in it", "put tokenizer.json"),
        lambda folder: ["--model.path", model_without(folder, "tokenizer.json", "tokenizer_config.json")],
    ),
    Case(
        "no chat template",
        ("has no chat template", "--model.chat_template"),
        lambda folder: ["--model.path", model_without(folder, "chat_template.jinja")],
    ),
    Case(
        "missing chat template file",
        ("--model.chat_template absent.jinja", "No such file"),
        options("--model.chat_template", "absent.jinja"),
    ),
    Case(
        "fused decoder for an architecture that it does not know",
        ("--rollout.decoder fused does not know qwen3 in torch.float32 on cpu", "leave the option out"),
        lambda folder: ["--rollout.decoder", "fused", "--model.path", gelu_model(folder)],
    ),
    Case(
        "LoRA on a layer that the model lacks",
        ("--model.lora_targets ['query']", "qwen3 has no linear layer 'query'", "down_proj, gate_proj"),
        options("--model.lora_rank", "4", "--model.lora_targets", "['query']"),
    ),
    Case(
        "longer than the model's context",
        ("add up to 564, more than the model's context of 512", "lower one of them"),
        options("--rollout.max_prompt_tokens", "500"),
    ),
]
OPTION_CASES = [
    Case("unknown option", ("--update.momentum", "--help"), options("--update.momentum", "0.9")),
    Case(
        "unknown key in YAML",
        ("momentum", "--help"),
        lambda folder: ["--config", text(folder, "mine.yaml", "update:\n  momentum: 0.9\n")],
    ),
    Case(
        "malformed YAML",
        ("mine.yaml: not readable as YAML", "line 2", "mend the file"),
        lambda folder: ["--config", text(folder, "mine.yaml", "update: [\n")],
    ),
    Case(
        "YAML section without options",
        ("mine.yaml: update is a section", "write its options below it"),
        lambda folder: ["--config", text(folder, "mine.yaml", "update: 3\n")],
    ),
    Case("abbreviated option", ("--run.step", "--help"), options("--run.step", "3")),
    Case("missing YAML file", ("no such file", "configs/"), options("--config", "absent.yaml")),
    Case("wrong type", ("run.steps", "many", "--help"), options("--run.steps", "many")),
    Case("wrong choice", ("loss.policy_loss", "ppo", "--help"), options("--loss.policy_loss", "ppo")),
    Case(
        "loss option out of range",
        ("loss options: dual_clip is 0.5", "choose a number above 1"),
        options("--loss.dual_clip", "0.5"),
    ),
    Case("negative seed", ("--seed -1: must be at least 0",), options("--seed", "-1")),
    Case("huge seed", ("--seed 4294967296: must be at most 2147483647",), options("--seed", "4294967296")),
    Case(
        "decay rate of one",
        ("--update.adam_betas [1.0, 0.9]: each must be from 0 to below 1",),
        options("--update.adam_betas", "[1.0,0.9]"),
    ),
    Case(
        "no error rates",
        ("--sft.draft_error_rates []: give at least one rate",),
        options("--sft.draft_error_rates", "[]"),
    ),
    Case(
        "endless timeout",
        ("--run.distributed_timeout inf: give a finite number",),
        options("--run.distributed_timeout", ".inf"),
    ),
    Case(
        "cache too small for a sequence",
        ("--rollout.cache_tokens 240: one sequence may take 256", "give at least that, or 0"),
        options("--rollout.cache_tokens", "240"),
    ),
    Case("out of range", ("--rollout.top_p 1.5", "at most 1"), options("--rollout.top_p", "1.5")),
    Case(
        "option without effect",
        ("--eval.top_k would be ignored with --eval.temperature 0", "leave it out", "or change the other"),
        options("--eval.sets", '{"held_out": "arithmetic:tm5"}', "--eval.top_k", "5"),
    ),
    Case(
        "loss options that contradict each other",
        ("--loss.dual_clip would be ignored with --loss.policy_loss sapo", "leave it out", "or change the other"),
        options("--loss.policy_loss", "sapo", "--loss.dual_clip", "2.0"),
    ),
    Case(
        "mini-batch that does not divide",
        ("--update.minibatch_sequences 3 does not divide a phase of 2 x 2", "take a multiple of 2 that divides 4"),
        options("--update.minibatch_sequences", "3"),
    ),
    Case(
        "output in the way",
        ("can't write there", "choose another folder"),
        lambda folder: ["--output", text(folder, "file", "") / "run"],
    ),
]
REWARD_CASES = [
    Case(
        "teacher's server is down",
        ("--thinktuning.endpoint_url http://127.0.0.1:9/v1", "start the server or mend the address"),
        options(
            "--algorithm",
            "thinktuning",
            "--thinktuning.teacher",
            "endpoint",
            "--thinktuning.endpoint_retries",
            "0",
            "--thinktuning.endpoint_url",
            "http://127.0.0.1:9/v1",
            "--thinktuning.endpoint_model",
            "wise",
        ),
    ),
    Case(
        "teacher beyond the context",
        (
            "prompts of up to 3072 tokens and answers of 1024 are longer than the model's context of 512",
            "lower --thinktuning.teacher_prompt_tokens",
        ),
        options("--algorithm", "thinktuning", "--thinktuning.teacher", "frozen"),
    ),
    Case(
        "choice between no letters",
        ("problems.jsonl: row 4", "the gold answer '11' is no letter A-Z", "use --reward exact"),
        lambda folder: [
            *("--reward", "choice"),
            *problems(folder, *({"question": row["question"], "answer": "B"} for row in ROWS[:-1]), ROWS[-1]),
        ],
    ),
    Case(
        "choice between no letters in the evaluation",
        ("held_out: row 0", "is no letter A-Z"),
        lambda folder: [
            *("--reward", "choice", "--eval.sets", '{"held_out": "arithmetic:tm5"}'),
            *problems(folder, *({"question": row["question"], "answer": "B"} for row in ROWS)),
        ],
    ),
    Case(
        "unknown reward",
        ("unknown reward 'maths'", "use math, math_strict, choice, yes_no,"),
        options("--reward", "maths"),
    ),
    Case(
        "missing reward file",
        ("no file absent.py", "give its path"),
        options("--reward", "absent.py:reward"),
    ),
    Case(
        "missing reward function",
        ("there is no such function in the file", "define `def reward("),
        lambda folder: ["--reward", f"{text(folder, 'mine.py', 'def score(): ...')}:reward"],
    ),
    Case(
        "reward file that fails to import",
        ("cannot be imported", "ZeroDivisionError"),
        lambda folder: ["--reward", f"{text(folder, 'mine.py', '1 / 0')}:reward"],
    ),
]
TORCHRUN_CASES = [
    Case(
        "problems do not divide over processes",
        ("--problems_per_step 3 does not divide over 2 processes", "take a multiple of 2"),
        options("--problems_per_step", "3"),
        processes=2,
    ),
    Case(
        "mini-batch does not divide over processes",
        ("--update.minibatch_sequences 2 (1 groups) does not divide over 2 processes", "take a multiple of 4"),
        options("--update.minibatch_sequences", "2"),
        processes=2,
    ),
    Case(
        "more processes than problems",
        ("3 processes but only 2 problems", "start fewer processes, or raise --problems_per_step"),
        options(),
        processes=3,
    ),
    Case(
        "an error that only shows once the processes are up",
        ("5 problems are fewer than --problems_per_step 6", "give more problems or lower it"),
        lambda folder: [*problems(folder, *ROWS), "--problems_per_step", "6"],
        processes=2,
    ),
]
RESUME_CASES = [
    Case(
        "output of another run",
        ("holds another run", "--resume auto", "another --output"),
        options(),
        after_a_run=True,
    ),
    Case(
        "no checkpoint there",
        ("not a checkpoint", "give a folder under checkpoints/, or auto"),
        lambda folder: ["--resume", folder / "run" / "checkpoints"],
        after_a_run=True,
    ),
    Case(
        "checkpoint of another architecture",
        ("a checkpoint of another model", "--model.path that the run was started with"),
        lambda folder: ["--resume", "auto", "--model.path", write_model(folder / "model", "llama")],
        after_a_run=True,
    ),
    Case(
        "checkpoint of a deeper model",
        ("a checkpoint of another model", "missing here", "--model.path that the run was started with"),
        lambda folder: [
            *("--resume", "auto", "--model.random_init", "true"),
            *("--model.path", shallower_model(folder)),
        ],
        after_a_run=True,
    ),
    Case(
        "checkpoint of another batch",
        ("a checkpoint of a run with --problems_per_step 2", "give the same, or another --output"),
        options("--resume", "auto", "--problems_per_step", "4"),
        after_a_run=True,
    ),
    Case(
        "checkpoint of another algorithm",
        ("a checkpoint of a run with --algorithm thinktwice", "give the same, or another --output"),
        options("--resume", "auto", "--algorithm", "sft", "--samples_per_problem", "8"),
        after_a_run=True,
    ),
    Case(
        "checkpoint of a world size that does not divide",
        ("2 problems", "start fewer processes, or raise --problems_per_step"),
        options("--resume", "auto"),
        processes=3,
        after_a_run=True,
    ),
]
CASES = [*DATA_CASES, *MODEL_CASES, *OPTION_CASES, *REWARD_CASES, *TORCHRUN_CASES]


@pytest.mark.parametrize("case", CASES, ids=named)
def test_is_refused_before_training(case: Case, outcomes: Outcomes) -> None:
    folder, finished = outcomes[case.name]
    (refused_by_torchrun if case.processes else refused)(finished.result(), *case.says)
    assert not (folder / "run" / "checkpoints").exists()
    assert not (folder / "run" / "metrics.jsonl").exists()


@pytest.mark.parametrize("case", RESUME_CASES, ids=named)
def test_is_refused_and_leaves_the_earlier_run_alone(case: Case, outcomes: Outcomes) -> None:
    folder, finished = outcomes[case.name]
    (refused_by_torchrun if case.processes else refused)(finished.result(), *case.says)
    assert steps_on_disk(folder / "run") == ["step-000001"]
    assert logged_steps(folder / "run") == [1]
    assert "algorithm: thinktwice" in (folder / "run" / "config.yaml").read_text()


@pytest.mark.parametrize("wrong", [("--nope", "1"), ("--data.source", "absent.jsonl")], ids=" ".join)
def test_is_refused_without_loading_what_training_needs(wrong: tuple[str, str], tmp_path: Path) -> None:
    command = [sys.executable, "-X", "importtime", str(TRAIN), "--output", str(tmp_path / "run"), *wrong]
    finished = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=LIMIT)
    imported = {line.rpartition("|")[2].strip() for line in finished.stderr.splitlines() if "|" in line}
    assert finished.returncode == 2 and "jsonargparse" in imported
    assert not imported & {"torch", "transformers", "datasets", "matplotlib"}


def test_prompts_over_the_limit_are_dropped_with_a_count(tmp_path: Path) -> None:
    file = problems(tmp_path, *ROWS, {"question": "+".join("1" * 40), "answer": "40"})
    limit = (
        "90"  # a question of 9 characters fits beside a response of 64 and the chat's own tokens, one of 79 does not
    )
    settings = ("--rollout.max_prompt_tokens", limit, "--run.steps", "1")
    finished = train("--output", tmp_path / "run", *SMALL, *file, *settings)
    assert finished.returncode == 0, finished.stderr
    assert "dropped 1 of 6 problems" in finished.stdout and "--rollout.max_prompt_tokens" in finished.stdout
    assert "the small recipe's values apply" not in finished.stdout  # the shipped model is at home in it
    assert steps_on_disk(tmp_path / "run") == ["step-000001"]


def test_what_sft_learns_from_needs_no_room_for_a_refine_prompt(tmp_path: Path) -> None:
    """Here whole chats, drafts and their rechecks among them."""
    draft = [{"role": "assistant", "content": "1"}, {"role": "user", "content": "recheck"}]
    asked = [[{"role": "user", "content": text}] for text in (*(row["question"] for row in ROWS), "1+" * 20)]
    asked[0] += draft
    file = jsonl(tmp_path, *({"messages": [*chat, {"role": "assistant", "content": "7"}]} for chat in asked))
    columns = ("--data.source", file, "--data.target_column", "messages", "--sft.refine_fraction", "0")
    settings = ("--algorithm", "sft", "--problems_per_step", "5", "--rollout.max_prompt_tokens", "20")
    command = ("--output", tmp_path / "run", *columns, *settings, "--run.steps", "1", "--update.warmup_steps", "0")
    finished = train(*command)
    assert finished.returncode == 0, finished.stderr
    assert "dropped 1 of 6 problems whose prompt is longer than 20 tokens" in finished.stdout
    refused(train(*command[:-4], "--run.steps", "2", "--rollout.max_prompt_tokens", "2", "--output", tmp_path / "no"),
            "no problem is left: the shortest prompt takes", "set --rollout.max_prompt_tokens to at least")  # fmt: skip

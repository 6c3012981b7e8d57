"""``--dry-run``: the plan and the memory it predicts, held against runs; what it refuses; that it leaves no trace."""

import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, Qwen3Config

from tests.command import ROOT, train
from tests.run.refusals import SMALL, jsonl, refused
from tests.small_models import FAMILIES, bpe_tokenizer, family_config, own, own_model
from thinktwice_fast import train as entry
from thinktwice_fast.config import Config, ModelOptions
from thinktwice_fast.errors import UserError
from thinktwice_fast.model.attention import NAME, PrefixAttention
from thinktwice_fast.model.flops import Flops
from thinktwice_fast.model.lora import add_adapters
from thinktwice_fast.model.policy import Policy
from thinktwice_fast.run.device_memory import held_bytes
from thinktwice_fast.run.memory import Load, Shape, layer_bytes, predict
from thinktwice_fast.run.metrics_file import read_metrics
from thinktwice_fast.run.options import parse_command
from thinktwice_fast.run.workload import phases

MIB = 1 << 20
STEP = (
    *("--problems_per_step", "4", "--samples_per_problem", "4", "--rollout.max_prompt_tokens", "300"),
    *("--rollout.max_response_tokens", "48", "--eval.sets", "{}", "--reward", "exact", "--run.steps", "2"),
    *("--model.random_init", "true", "--thinktwice.refine_instruction", "recheck", "--loss.entropy_coef", "0.001"),
)


def write_shape(folder: Path, **shape: Any) -> Path:
    """Config and tokenizer of a Qwen3 model, without weights."""
    tokenizer = bpe_tokenizer()
    tokenizer.save_pretrained(folder)
    Qwen3Config(
        **{"head_dim": 64, "max_position_embeddings": 2048} | shape, tie_word_embeddings=True,
        eos_token_id=tokenizer.eos_token_id, bos_token_id=None, architectures=["Qwen3ForCausalLM"],
    ).save_pretrained(folder)  # fmt: skip
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of 27 million parameters."""
    return write_shape(
        tmp_path_factory.mktemp("model"), vocab_size=16000, hidden_size=512, intermediate_size=1536,
        num_hidden_layers=6, num_attention_heads=8, num_key_value_heads=4,
    )  # fmt: skip


Table = dict[str, tuple[int, int]]


def parsed(text: str) -> Table:
    """MiB while sampling and updating, by part, of what a dry run prints, above what there is."""
    rows = re.findall(r"^  (\w[\w ]*?) +([\d,]+) +([\d,]+)$", text.partition("\n  the GPU has")[0], re.M)
    return {name: (int(a.replace(",", "")), int(b.replace(",", ""))) for name, a, b in rows}


class Command:
    """``train.py ... --dry-run`` in this process, which has what takes seconds to import."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
        self._patch, self._capsys = monkeypatch, capsys

    def __call__(self, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
        command = ["train.py", *map(str, arguments), "--dry-run"]
        self._patch.setattr("sys.argv", command)
        status = entry.main()
        return subprocess.CompletedProcess(command, status, *self._capsys.readouterr())


@pytest.fixture
def dry_run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    return Command(monkeypatch, capsys)


@pytest.mark.parametrize("budget", [256, 4096])
def test_a_run_takes_the_memory_predicted(budget: int, model: Path, tmp_path: Path) -> None:
    # How long a checkpoint's copy stays is for the disk to say: it is left out.
    options = ("--update.microbatch_tokens", str(budget), "--run.save", "false")
    arguments = (*STEP, *options, "--model.path", model, "--output", tmp_path / "run")
    fresh = budget == 256  # a fork of what has imported more takes more, and says so in both
    planned = train(*arguments, "--dry-run", fresh=fresh)
    assert planned.returncode == 0, planned.stderr
    assert not (tmp_path / "run").exists()
    table = parsed(planned.stdout)
    done = train(*arguments, fresh=fresh)
    assert done.returncode == 0, done.stderr
    measured = max(record.get("peak_memory_bytes", 0) for record in read_metrics(tmp_path / "run" / "metrics.jsonl"))
    program = table["program"][1]
    assert table["total"][1] - program == pytest.approx(measured / MIB - program, rel=0.25)
    (line,) = (line for line in done.stdout.splitlines() if line.startswith("peak memory"))
    found = re.search(r"([\d.]+) GiB a process \(([\d.]+) predicted\)", line)
    assert found is not None, line
    assert float(found[1]) == pytest.approx(measured / MIB / 1024, abs=0.01)
    assert float(found[2]) == pytest.approx(table["total"][1] / 1024, rel=0.05)  # the program's part is measured anew


def test_the_plan_counts_what_a_step_does(dry_run: Command, model: Path, tmp_path: Path) -> None:
    minibatches = ("--update.minibatch_sequences", "8", "--update.microbatch_tokens", "512")
    text = dry_run(*STEP, "--model.path", model, *minibatches, "--output", tmp_path / "run").stdout
    table = parsed(text)
    assert "27.1 million parameters (27.1 million trained), float32 on cpu" in text
    # A group is at most 25 + 4 * 47 tokens, so that two of them fit into one micro-batch.
    assert re.search(r"solve +per process 4 x 4 = 16 responses.*up to 48; 2 optimizer steps of 1 micro-batch ", text)
    assert table["master weights"] == (103, 103) and table["optimizer state"] == (207, 207)
    assert table["gradients"] == (0, 103) and table["packed weights"] == (103, 103)
    assert table["checkpoint copy"] == (310, 310)
    assert "each waits for the disk as 310 MiB of main memory per process" in text
    assert re.search(r"it fits, with \d+% to spare$", text)
    assert not (tmp_path / "run").exists()


def test_a_large_model_is_planned_without_its_memory(dry_run: Command, tmp_path: Path) -> None:
    large = write_shape(
        tmp_path, vocab_size=151936, hidden_size=2560, intermediate_size=9728, num_hidden_layers=36,
        num_attention_heads=32, num_key_value_heads=8,
    )  # fmt: skip
    before = held_bytes(torch.device("cpu"))
    done = dry_run(*STEP, "--model.path", large, "--output", tmp_path / "run")
    assert held_bytes(torch.device("cpu")) - before < 500 * MIB
    assert parsed(done.stdout)["total"][1] > 60_000
    refused(done, "it does not fit: no batch size or cache would make it fit: use more processes")


RACE = ROOT / "configs" / "race" / "qwen3-1.7b-gsm8k.yaml"
RACE_SHAPE = {
    "vocab_size": 151936, "hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 28,
    "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128, "max_position_embeddings": 40960,
}  # fmt: skip


def test_the_race_leaves_a_fifth_of_a_gpu(tmp_path: Path) -> None:
    shape = write_shape(tmp_path / "shape", **RACE_SHAPE)
    words = "Natalia sold clips to 48 of her friends in April, and then she sold half as many clips in May. "
    # From the shortest on to some that leave no room for a base and the instruction: prompts as long as any may be.
    rows = [{"question": f"{n}. {words * (n // 4)}How many?", "answer": f"She sold {n}.\n#### {n}"} for n in range(160)]
    problems = jsonl(tmp_path, *rows)
    arguments = ("--config", RACE, "--model.path", shape, "--model.random_init", "true", "--data.source", problems)
    planned = train(
        *arguments, "--data.subset", "null", "--output", tmp_path / "run", "--dry-run", "--dry-run-gpu", "141"
    )
    assert planned.returncode == 0, planned.stderr
    text, table = planned.stdout, parsed(planned.stdout)
    assert "1.72 billion parameters (1.72 billion trained), bfloat16 on cuda" in text
    longest = re.search(r"refine +per process 32 x 8 = 256 responses, prompts of up to (\d+) tokens", text)
    assert longest is not None and 1750 < int(longest[1]) <= 1792 and "dropped" in text
    assert max(table["total"]) * MIB <= 0.8 * 141e9
    spare = re.search(r"the GPU has 134,468 MiB: it fits, with (\d+)% to spare$", text)
    assert spare is not None and int(spare[1]) >= 20
    assert sum(update for name, (_, update) in table.items() if name != "total") == pytest.approx(
        table["total"][1], abs=len(table)
    )
    assert {"libraries", "allocator", "KV cache", "activations", "loss head"} <= table.keys()
    cache = re.search(r"KV cache +([\d,]+) tokens; those that are there together take up to ([\d,]+);", text)
    assert cache is not None and cache[1] == cache[2]
    assert int(cache[1].replace(",", "")) * 114688 / MIB == pytest.approx(table["KV cache"][0], abs=3)
    assert not (tmp_path / "run").exists()


def test_a_pretended_gpu_of_little_memory_has_a_small_cache(dry_run: Command, model: Path, tmp_path: Path) -> None:
    many = ("--problems_per_step", "64", "--samples_per_problem", "8", "--rollout.max_sequences", "512")

    def plan(gigabytes: float, *more: str) -> str:
        arguments: tuple[str | Path, ...] = (*STEP, *many, "--model.path", model, "--output", tmp_path / "run", *more)
        done = dry_run(*arguments, "--update.microbatch_tokens", "256", "--dry-run-gpu", str(gigabytes))
        assert done.returncode == 0, done.stderr
        return done.stdout

    large = plan(4)
    assert "it fits" in large and "will wait" not in large and "updates have its memory in between" in large
    table = parsed(large)
    cache = table["KV cache"][0]
    assert cache > 100 and table["KV cache"][1] == 0, "what updates need is not for the cache to leave"
    others = table["total"][0] - table["allocator"][0] - cache
    small = plan((others + cache / 2) / 0.97 * MIB / 1e9)
    assert "some will wait, or start over" in small and "in the rollout phase" in small
    assert "it fits, with 0% to spare" in small
    assert parsed(small)["KV cache"][0] == pytest.approx(cache / 2, abs=2)
    assert parsed(plan(4, "--rollout.cache_tokens", "160000"))["KV cache"] == (938, 0)  # 6144 bytes a token


def test_what_does_not_fit_is_refused_with_what_would(dry_run: Command, model: Path, tmp_path: Path) -> None:
    """Each of the options that are named makes it fit, or all of them together do."""
    large = (
        *("--update.microbatch_tokens", "32768", "--update.minibatch_sequences", "0"),
        *("--rollout.cache_tokens", "200000", "--problems_per_step", "64"),
    )

    def plan(gigabytes: float, *more: str) -> subprocess.CompletedProcess[str]:
        arguments: tuple[str | Path, ...] = (*STEP, "--model.path", model, "--output", tmp_path / "run", *large, *more)
        return dry_run(*arguments, "--dry-run-gpu", str(gigabytes))

    def remedies(gigabytes: float) -> str:
        line = refused(plan(gigabytes), "predicted peak", "the GPU has", "phase", "it does not fit: give --")
        return line.partition("it does not fit: give ")[2].partition(", or use more processes")[0]

    alone, together = remedies(5).split(" or "), remedies(2).split(" and ")
    assert len(alone) > 1 < len(together)
    for gigabytes, options in (*((5, [one]) for one in alone), (2, together)):
        done = plan(gigabytes, *" ".join(options).split())
        assert done.returncode == 0 and "it fits" in done.stdout, done.stderr
    refused(plan(1), "it does not fit: no batch size or cache would make it fit: use more processes, a larger GPU")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--dry-run-gpu", "0"), "--dry-run-gpu 0: must be above 0 and at most 1000000 (gigabytes)"),
        (("--dry-run-gpu", "-3"), "--dry-run-gpu -3: must be above 0"),
        (("--dry-run-gpu", ".nan"), "--dry-run-gpu nan: must be above 0"),
        (("--dry-run-gpu", "1e300"), "--dry-run-gpu 1e+300: must be above 0"),
        (("--dry-run-gpu", "large"), "dry_run_gpu"),
        (("--dry-run-gpu", "80", "--model.device", "cpu"), "would be ignored with --model.device cpu"),
        (("--dry-run-gpu", "80", "--rollout.exact", "true"), "--rollout.exact needs float32 on the CPU"),
    ],
)
def test_a_pretended_gpu_that_can_not_be_is_refused(
    dry_run: Command, arguments: tuple[str, ...], says: str, model: Path, tmp_path: Path
) -> None:
    refused(dry_run(*STEP, "--model.path", model, "--output", tmp_path / "run", *arguments), says)
    assert not (tmp_path / "run").exists()


def test_a_gpu_is_pretended_in_a_dry_run_alone(dry_run: Command, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--dry-run-gpu would be ignored without --dry-run: give both, or none"):
        parse_command(["--dry-run-gpu", "80"])
    (tmp_path / "mine.yaml").write_text("dry_run_gpu: 80\n")
    refused(dry_run("--config", tmp_path / "mine.yaml"), "give --dry-run-gpu on the command line")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--data.source", "absent.jsonl"), "absent.jsonl: no such file"),
        (("--model.random_init", "false"), "no weights (*.safetensors) in it"),
        (("--rollout.max_prompt_tokens", "70"), "set --rollout.max_prompt_tokens to at least"),
        (("--problems_per_step", "0"), "must be at least 1"),
        (("--resume", "nowhere"), "not a checkpoint"),
    ],
)
def test_a_dry_run_refuses_what_a_run_does(
    dry_run: Command, arguments: tuple[str, str], says: str, model: Path, tmp_path: Path
) -> None:
    refused(dry_run(*STEP, "--model.path", model, "--output", tmp_path / "run", *arguments), says)
    assert not (tmp_path / "run").exists()


def test_a_dry_run_does_not_touch_another_run(dry_run: Command, tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").touch()
    before = {path: path.stat().st_mtime_ns for path in tmp_path.parent.iterdir()}
    refused(dry_run(*SMALL, "--output", tmp_path), "holds another run")
    refused(dry_run(*SMALL, "--output", tmp_path / "metrics.jsonl" / "run"), "can't write there")
    assert {path: path.stat().st_mtime_ns for path in tmp_path.parent.iterdir()} == before


def test_a_file_can_not_ask_for_a_dry_run(dry_run: Command, tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("dry_run: true\n")
    refused(dry_run("--config", tmp_path / "mine.yaml"), "give --dry-run on the command line")


def test_rank_0_alone_prints(dry_run: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    arguments = (*SMALL, "--output", tmp_path / "run")
    assert "each with 1/2 of weights and optimizer" in dry_run(*arguments).stdout
    monkeypatch.setenv("RANK", "1")
    assert dry_run(*arguments).stdout == ""


def saved_bytes(model: Any, tokens: int) -> int:
    """Of all tensors but parameters that a forward pass keeps for the backward pass."""
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    attention = PrefixAttention.from_segments([tokens], [-1], torch.device("cpu"))
    row = torch.arange(tokens)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        Policy(model)(row, row, attention, row, lambda hidden, weight, bias: hidden.sum())
    return sum(tensor.untyped_storage().nbytes() for place, tensor in kept.items() if place not in own)


@pytest.mark.parametrize(("dtype", "ours"), [(torch.float32, True), (torch.float32, False), (torch.bfloat16, False)])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_layer_keeps_what_the_formula_says(family: str, dtype: torch.dtype, ours: bool) -> None:
    found, models = [], []
    for layers in (1, 2):
        config: Any = family_config(family)
        config.num_hidden_layers = layers
        if family != "llama":
            config.layer_types = ["full_attention"] * layers
        torch.manual_seed(0)
        theirs = AutoModelForCausalLM.from_config(config, attn_implementation=NAME).eval().to(dtype)
        models.append(own(theirs) if ours else theirs)
        found.append(saved_bytes(models[-1], 200))
    # OLMo's norms keep their float32 output as well, 13 % of its layer in bfloat16.
    assert layer_bytes(Shape.of(models[0], ModelOptions()), dtype, own=ours) == pytest.approx(
        (found[1] - found[0]) / 200, rel=0.15
    )


def test_what_is_sharded_divides_and_what_is_copied_does_not() -> None:
    model = own_model("qwen3")
    load, cpu = Load(8, 4, 64, 512, 256, 512), torch.device("cpu")

    def parts(world: int, dtype: torch.dtype, **loss: float) -> dict[str, int]:
        config = Config()
        config.model.lora_rank = int(loss.get("rank", 0))
        config.loss.beta = loss.get("beta", 0.0)
        config.model.activation_checkpointing = "checkpointing" in loss
        predicted = predict(config, model, cpu, dtype, load, world, 0, 1 << 40)
        return {"KV cache": predicted.cache_bytes} | {part.name: part.update for part in predicted.parts}

    one, four = parts(1, torch.bfloat16, beta=0.1), parts(4, torch.bfloat16, beta=0.1)
    for name in ("master weights", "gradients", "optimizer state", "reference weights"):
        assert four[name] == pytest.approx(one[name] / 4, abs=1), name
    for name in ("compute weights", "activations", "loss head", "KV cache"):
        assert four[name] == one[name], name
    whole = parts(1, torch.float32)
    assert "compute weights" not in whole and "reference weights" not in whole
    assert parts(1, torch.float32, checkpointing=1)["activations"] < whole["activations"]
    adapters = own_model("qwen3")
    add_adapters(adapters, ModelOptions(lora_rank=8), 0)
    trained = sum(parameter.numel() for parameter in adapters.parameters() if parameter.requires_grad)
    assert parts(1, torch.float32, rank=8)["gradients"] == 4 * trained
    whole_model = sum(parameter.numel() for parameter in model.parameters())
    assert parts(1, torch.float32, rank=8)["compute weights"] == 4 * whole_model


def test_a_joint_pair_is_one_phase_of_both_prompts() -> None:
    config = Config()
    config.thinktwice.pairing = "joint"
    config.update.minibatch_sequences, config.update.microbatch_tokens = 256, 16384
    (pair,) = phases(config, Flops(100, 10, {0: 1}), {"solve": 20, "refine": 90}, 1)
    assert (pair.name, pair.prompts, pair.prompt_tokens, pair.optimizer_steps) == ("pair", 64, 90, 2)
    everything = 16 * (20 + 90) + 256 * (config.rollout.max_response_tokens - 1)
    assert everything > config.update.microbatch_tokens
    assert (pair.rows, pair.row_tokens) == (2, config.update.microbatch_tokens)
    config.update.microbatch_tokens = 2 * everything
    (pair,) = phases(config, Flops(100, 10, {0: 1}), {"solve": 20, "refine": 90}, 1)
    assert (pair.rows, pair.row_tokens) == (1, everything)
    assert pair.row_targets == 256 * config.rollout.max_response_tokens


def test_a_model_whose_config_has_other_names() -> None:
    config = GPT2Config(n_embd=32, n_head=2, n_layer=2, vocab_size=64, bos_token_id=0, eos_token_id=0)
    shape = Shape.of(AutoModelForCausalLM.from_config(config), ModelOptions())
    assert (shape.inner, shape.queries, shape.keys, shape.layers) == (128, 32, 32, 2)

"""`thinktwice-fast eval`: what it draws, writes, goes on from and reports."""

import json
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.cli.conftest import Run
from tests.command import LIMIT, ROOT, quick_start
from tests.small_models import CHATML, bpe_tokenizer, write_model
from thinktwice_fast.cli.evaluation.modes import ANSWER_PREFIX, CONTINUATION, PROMPTS, Asked, BudgetForcing, Chain, Turn
from thinktwice_fast.cli.evaluation.store import Key, Store
from thinktwice_fast.cli.solver import Solver
from thinktwice_fast.model.loading import SHIPPED, model_folder
from thinktwice_fast.records import Sampling
from thinktwice_fast.tasks.prompts import ChatFormat

SMALL = ("--limit", "8", "--samples", "4", "--k", "1,4")
Ask = Callable[..., dict[str, Any]]


@pytest.fixture
def ask(run: Run, tmp_path: Path) -> Ask:
    """The command on a folder of this test; gives its results."""

    def call(*arguments: str | Path) -> dict[str, Any]:
        status, out, err = run("eval", "--output", tmp_path / "out", *arguments)
        assert status == 0, err
        results: dict[str, Any] = json.loads((tmp_path / "out" / "results.json").read_text())
        return results | {"shown": out}

    return call


def lines(folder: Path, kind: str) -> list[dict[str, Any]]:
    return list(Store(folder, 0).lines(kind))


def other_model(folder: Path) -> Path:
    """The shipped model with weights that are a little off."""
    shipped = Path(model_folder(SHIPPED))
    folder.mkdir()
    for path in shipped.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    weights = load_file(shipped / "model.safetensors")
    torch.manual_seed(1)
    noisy = {name: weight + 0.02 * weight.std() * torch.randn_like(weight) if weight.ndim > 1 else weight
             for name, weight in weights.items()}  # fmt: skip
    save_file(noisy, folder / "model.safetensors", {"format": "pt"})
    return folder


def test_a_repeated_command_draws_and_grades_only_what_is_missing(ask: Ask, run: Run, tmp_path: Path) -> None:
    folder = tmp_path / "out" / "tiny" / "tm5"
    first = ask(*SMALL)
    figures = first["models"]["tiny"]["tm5"]
    grades = {Key.of(line): line["reward"] for line in lines(folder, "grades")}
    rights = [reward for key, reward in grades.items() if key.refinement < 0]
    assert len(grades) == 64 and figures["solve_accuracy"]["value"] == sum(rights) / len(rights)
    for estimate in figures.values():
        assert estimate["low"] <= estimate["value"] <= estimate["high"]
    assert set(figures) >= {"solve_pass@4", "refine_pass@4", "solve_majority", "fix_wrong", "refine_truncation_rate"}
    assert "accuracy after refinement" in first["shown"] and "waiting for graders" in first["shown"]
    assert (tmp_path / "out" / "chart.png").read_bytes().startswith(b"\x89PNG")

    assert ask(*SMALL)["models"] == first["models"]
    assert len(lines(folder, "solutions")) == len(lines(folder, "refinements")) == 32
    ask("--limit", "9", "--samples", "5", "--k", "1")
    assert len(lines(folder, "solutions")) == len(lines(folder, "refinements")) == 45
    assert ask(*SMALL)["models"] == first["models"]

    exact = ask(*SMALL, "--reward", "exact")["models"]["tiny"]["tm5"]
    assert exact["refine_accuracy"]["value"] == 0 and exact["refine_tokens"] == figures["refine_tokens"]
    assert len(lines(folder, "solutions")) == 45 and len(lines(folder, "grades")) == 90 + 64
    status, _, err = run("eval", "--output", tmp_path / "out", *SMALL, "--max_tokens", "20")
    assert status == 2 and err.count("\n") == 1 and "were drawn by another sampling" in err


def test_models_are_compared_problem_by_problem_and_refine_each_other(ask: Ask, tmp_path: Path) -> None:
    other = str(other_model(tmp_path / "other"))
    found = ask("--model", "tiny", other, "--sets", "arithmetic:tm5,arithmetic:te5", "--limit", "8", "--cross")
    value = {model: found["models"][model]["average"]["solve_accuracy"]["value"] for model in ("tiny", other)}
    gap = found["differences"][other]["average"]["solve_accuracy"]
    assert gap["value"] == pytest.approx(value[other] - value["tiny"])
    assert gap["low"] <= gap["value"] <= gap["high"]
    assert found["problems"] == {"tm5": 8, "te5": 8}
    for refiner, solver in (("tiny", other), (other, "tiny"), ("tiny", "tiny")):
        figures = found["cross"][refiner][solver]["average"]
        assert figures["refine_pass@4"]["value"] >= figures["refine_accuracy"]["value"]
    (of_other,) = (tmp_path / "out" / "tiny" / "tm5").glob("of-*")
    drawn = lines(of_other, "refinements")
    assert {Key.of(line) for line in drawn} == {Key(p, 0, r) for p in range(8) for r in range(4)}
    assert "refined by" in found["shown"] and "difference" in found["shown"]


def test_two_passes_are_those_of_solve(ask: Ask, tmp_path: Path) -> None:
    model = write_model(tmp_path / "model", "qwen3")
    rows = [{"question": f"What is {number} + 7?", "answer": str(number + 7)} for number in range(3)]
    (tmp_path / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    greedy = ("--temperature", "0", "--max_tokens", "12", "--samples", "2", "--k", "1")
    found = ask("--model", model, "--sets", tmp_path / "sums.jsonl", *greedy, "--export", "inspect")
    sampling = Sampling(temperature=0.0, max_tokens=12)
    answers = Solver(str(model)).solve([row["question"] for row in rows], sampling=sampling)
    (folder,) = (path.parent for path in (tmp_path / "out").rglob("solutions-0.jsonl"))
    for kind, turn in (("solutions", 0), ("refinements", 1)):
        texts = {Key.of(line)[:2]: line["text"] for line in lines(folder, kind)}
        assert texts == {(p, s): answers[p].turns[turn].text for p in range(3) for s in range(2)}
    assert found["models"][str(model)]["sums"]["solve_tokens"]["value"] == 12

    (log,) = (json.loads(path.read_text()) for path in (tmp_path / "out" / "inspect").iterdir())
    assert log["version"] == 2 and log["status"] == "success" and log["eval"]["task"] == "sums"
    assert [(sample["id"], sample["epoch"], sample["target"]) for sample in log["samples"][:3]] == [
        (1, 1, "7"), (1, 2, "7"), (2, 1, "8"),
    ]  # fmt: skip
    sample = log["samples"][-1]
    assert [message["role"] for message in sample["messages"]] == ["user", "assistant", "assistant"]
    assert sample["output"]["choices"][0]["stop_reason"] == "max_tokens" and set(sample["scores"]) == {
        "solution", "refinement",
    }  # fmt: skip


@pytest.mark.parametrize("mode", [*PROMPTS, "s1"])
def test_prompted_modes(ask: Ask, tmp_path: Path, mode: str) -> None:
    """Of a random model: what it says is noise, but the turns are there."""
    model = write_model(tmp_path / "model", "qwen3")
    (tmp_path / "one.jsonl").write_text(json.dumps({"question": "What is 3 + 7?", "answer": "10"}))
    draw = ("--max_tokens", "24", "--refine_max_tokens", "9", "--samples", "3", "--refine_samples", "2", "--k", "1")
    ask("--model", model, "--sets", tmp_path / "one.jsonl", "--mode", mode, *draw)
    (folder,) = (path.parent for path in (tmp_path / "out").rglob("solutions-0.jsonl"))
    solutions = {Key.of(line): line["text"] for line in lines(folder, "solutions")}
    refinements = lines(folder, "refinements")
    assert len(solutions) == 3 and len(refinements) == 6
    for line in refinements:
        if mode == "s1":
            assert line["text"].startswith(ANSWER_PREFIX)
        elif mode == "self_verify":  # there is no verdict that the solution is wrong
            assert line["text"] == solutions[Key.of(line).solution] and line["tokens"] <= 9 and "turns" not in line
        else:
            assert len(line["turns"]) == len(PROMPTS[mode]) and line["text"] == line["turns"][-1]


@pytest.mark.parametrize("thinks", [False, True])
def test_budget_forcing_takes_the_end_of_a_thought_out_until_the_budget_is_spent(thinks: bool) -> None:
    tokenizer = bpe_tokenizer()
    template = CHATML + ("{# </think> #}" if thinks else "")
    previous, tokenizer.chat_template = tokenizer.chat_template, template
    try:
        chat = ChatFormat(tokenizer)
    finally:
        tokenizer.chat_template = previous
    solve, final, end = Sampling(max_tokens=40), Sampling(0.0, max_tokens=5), tokenizer.eos_token_id
    mode = BudgetForcing(chat, {end}, solve, final)
    messages = ({"role": "user", "content": "Why?"},)
    prompt = tuple(chat.prompt_ids(messages))
    thought, answer = (
        chat.encode("<think>It is 7." if thinks else "It is 7."),
        chat.encode("</think> 7") if thinks else [],
    )
    chain = Chain(Asked(messages, prompt, solve, False), [*thought, *answer, end], Turn("", 0, True))
    asked = mode.next(chain)
    word = chat.encode(CONTINUATION)
    assert asked is not None and asked.ids == (*prompt, *thought, *word) and not asked.last
    assert asked.sampling.max_tokens == 40 - len(thought) - len(word)
    assert asked.sampling.stop_strings == (("</think>",) if thinks else ())
    forced = chat.encode(("</think>" if thinks else "") + ANSWER_PREFIX)
    room = len(forced) + final.max_tokens
    narrow = replace(mode, context=len(prompt) + 4 + room).next(chain)
    assert narrow is not None and narrow.last and narrow.ids == (*prompt, *thought[:4], *forced)
    spent = chat.encode("a" * asked.sampling.max_tokens)[: asked.sampling.max_tokens]
    chain.asked, chain.response = asked, spent
    chain.turns.append(Turn("", len(spent), False))
    last = mode.next(chain)
    assert last is not None and last.last and last.sampling is final
    assert last.ids == (*asked.ids, *spent, *forced)
    chain.asked = last
    chain.turns.append(Turn(last.forced + "7}", 2, True))
    assert mode.next(chain) is None and mode.answer(chain).endswith("\\boxed{7}")


def test_an_evaluation_that_is_killed_ten_times_ends_as_one_that_never_was(ask: Ask, tmp_path: Path) -> None:
    """It is killed each time another eleventh is there. Every whole line that was there stays."""
    amount = ("--limit", "40", "--samples", "8", "--k", "1", "--max_sequences", "24")
    whole = ask(*amount)
    python, environment = quick_start()
    output = tmp_path / "killed"
    command = [python, "-m", "thinktwice_fast.cli.main", "eval", "--output", str(output), *amount]
    total, kept = 2 * 8 * 40, b""
    store = output / "tiny" / "tm5"

    def there() -> bytes:
        paths = (store / f"{kind}-0.jsonl" for kind in ("solutions", "refinements"))
        return b"".join(path.read_bytes() for path in paths if path.exists())

    for kill in range(1, 11):
        process = subprocess.Popen(command, env=environment, cwd=ROOT, stderr=subprocess.PIPE, stdout=subprocess.PIPE)
        until = time.monotonic() + LIMIT
        while there().count(b"\n") < kill * total // 11:
            assert process.poll() is None and time.monotonic() < until
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        process.wait(LIMIT)
        time.sleep(0.05)
        now = there()
        assert {*kept.splitlines()} <= {*now.splitlines()}
        kept = b"".join(line for line in now.splitlines(keepends=True) if line.endswith(b"\n"))
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, timeout=LIMIT)
    assert done.returncode == 0, done.stderr
    assert json.loads((output / "results.json").read_text())["models"] == whole["models"]
    for kind in ("solutions", "refinements"):
        keys = [Key.of(line) for line in lines(store, kind)]
        assert len(keys) == len(set(keys)) == total // 2


def test_two_processes_share_the_problems(ask: Ask, tmp_path: Path) -> None:
    alone = ask(*SMALL)
    python, environment = quick_start()
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"]
    output = tmp_path / "both"
    command = [python, *launcher, "thinktwice_fast.cli.main", "eval", "--output", str(output), *SMALL]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=LIMIT)
    assert done.returncode == 0, done.stderr
    assert json.loads((output / "results.json").read_text())["models"] == alone["models"]
    for process in (0, 1):
        text = (output / "tiny" / "tm5" / f"solutions-{process}.jsonl").read_text()
        assert {json.loads(line)["problem"] for line in text.splitlines()} == {*range(process, 8, 2)}


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--model", "tiny", "tiny"), "--model: tiny stands there twice"),
        (("--model", "./nowhere"), "give --sets"),
        (("--model", "./nowhere", "--sets", "ROWS.jsonl"), "--model ./nowhere: no such folder"),
        (("--sets", "nothing.jsonl"), "nothing.jsonl: no such file"),
        (("--sets", "ROWS.jsonl", "./ROWS.jsonl"), "would both be called ROWS"),
        (("--sets", "ROWS.jsonl", "--question_column", "q"), "no column q"),
        (("--sets", "aime", "--data_root", "."), "--data_root .: no aime.parquet in it"),
        (("--sets", "arithmetic:te5"), "--limit 0 has no end with arithmetic:te5"),
        (("--k", "1,x"), "--k x: not of type int"),
        (("--k", "0"), "--k [0]: each must be at least 1"),
        (("--samples", "0"), "--samples 0: must be from 1"),
        (("--samples", "2", "--k", "1,8"), "--k 8: more than --samples 2"),
        (("--cross",), "--cross with one model"),
        (("--mode", "s1", "--refine_samples", "0"), "leaves nothing of --mode s1"),
        (("--mode", "reflexion", "--refine_instruction", "x"), "--refine_instruction would be ignored"),
    ],
    ids=lambda value: " ".join(value)[:40] if isinstance(value, tuple) else "",
)
def test_bad_input_is_told_in_one_line(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], says: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("ROWS.jsonl").write_text(json.dumps({"question": "1+2", "answer": "3"}) + "\n")
    status, out, err = run("eval", *arguments)
    assert (status, out) == (2, "")
    assert err.startswith("thinktwice-fast: error: ") and err.count("\n") == 1
    assert says in err

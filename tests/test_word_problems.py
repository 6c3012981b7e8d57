"""The word problems that a real instruct model is trained on, and what is said of the training."""

import json
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.image import imread

from bench.real import EVALUATED, Rise, document, draw, plan
from examples.word_problems import RECHECK, is_held_out, recheck, solution, word_problem, write
from tests.command import ROOT
from thinktwice_fast.config import DataOptions
from thinktwice_fast.records import Problem
from thinktwice_fast.run.checks import check_config
from thinktwice_fast.run.metrics import Record
from thinktwice_fast.run.options import from_yaml, parse_config
from thinktwice_fast.tasks.graders import grade_math
from thinktwice_fast.tasks.sources import load_source


@given(st.integers(0, 10**7), st.booleans())
def test_solutions_and_rechecks_are_right_line_by_line(index: int, held_out: bool) -> None:
    problem = word_problem(index, held_out)
    assert problem == word_problem(index, held_out) and is_held_out(problem.first, problem.operations) == held_out
    for text in (solution(problem), recheck(problem)):
        *lines, box = text.split("\n")
        assert all(eval(line.replace("=", "==")) for line in lines) and lines[-1].endswith(f"= {problem.totals[-1]}")
        assert box == f"\\boxed{{{problem.totals[-1]}}}"
    numbers = sorted([problem.first, *(number for _, number in problem.operations)])
    assert sorted(map(int, re.findall(r"\d+", problem.question))) == numbers


def test_the_files_are_what_training_and_warm_up_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Drafts of the warm-up are wrong in part, its rechecks right, and training begins with other problems."""
    monkeypatch.setattr("examples.word_problems.ROWS", {"train": 64, "held_out": 8, "warm_up": 64})
    write(tmp_path)
    train, held_out = (load_source(DataOptions(source=str(tmp_path / f"{n}.jsonl"))) for n in ("train", "held_out"))
    chats = load_source(DataOptions(source=str(tmp_path / "warm_up.jsonl"), target_column="messages"))
    asked = [{problem.messages[0]["content"] for problem in source} for source in (train, held_out, chats)]
    assert not asked[1] & (asked[0] | asked[2]) and len(asked[0] & asked[2]) < 3
    assert all(grade_math(str(chats[n].target), Problem(n, (), answer_of(n))) == 1.0 for n in range(64))
    drafts = [(n, chats[n].messages[1]["content"]) for n in range(64) if len(chats[n].messages) == 3]
    wrong = sum(not draft.endswith(f"{{{answer_of(n)}}}") for n, draft in drafts)
    assert 16 < len(drafts) < 48 and 0.2 < wrong / len(drafts) < 0.8
    assert all(chats[n].messages[2]["content"] == RECHECK for n, _ in drafts)


def answer_of(index: int) -> str:
    return str(word_problem(index).totals[-1])


def test_both_configurations_ask_for_the_recheck_that_was_learned() -> None:
    configs = [from_yaml(ROOT / "configs" / f"smollm2-135m{part}.yaml") for part in ("-warm-up", "")]
    assert [config.thinktwice.refine_instruction for config in configs] == [RECHECK] * 2
    assert configs[1].problems_per_step * configs[1].samples_per_problem == 128 and configs[1].run.steps == 300


def test_the_section_says_what_the_metrics_do(tmp_path: Path) -> None:
    """Of runs whose every figure is known: solutions get better, refinements do not."""
    warm_up, run = plan(tmp_path, {"run.steps": 2}, {"eval.limit": 8, "run.steps": 80})
    for one in (warm_up, run):
        check_config(parse_config(one.arguments()), 1)
        one.folder.mkdir()
    shares = {f"eval/held_out/{metric}": 0.25 for metric in EVALUATED.values()}
    ends = [{"step": step, "phase": "eval", **shares} for step in (0, 80)]
    ends[1]["eval/held_out/solve_accuracy"] = 0.5
    steps: list[Record] = [
        {"step": n, "phase": phase, f"{phase}/reward": 0.2 + 0.1 * (n % 4 < 2) + (phase == "solve") * n / 200,
         "generations": 32 * n, "elapsed_seconds": 60.0 * n}
        for n in range(1, 81) for phase in [("refine", "solve")[n % 2]]
    ]  # fmt: skip
    learned: Record = {"step": 2, "phase": "sft", "elapsed_seconds": 60.0}
    for one, records in ((warm_up, [ends[0], learned]), (run, [ends[0], *steps, ends[1]])):
        (one.folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    text = document(warm_up, run)
    assert (
        "80 steps of ThinkTwice with 32 samples each, 81 minutes in all" in text and "first 15 and the last 15" in text
    )
    rows = {line.split(" | ")[0]: line.strip(" |").split(" | ") for line in text.splitlines()}
    assert rows["| solutions"][1].startswith("0.3") and rows["| solutions"][-1] == "yes"
    assert rows["| refinements"][-1] == "no"
    assert rows["| after the warm-up"][1] == "25.0" and rows["| after ThinkTwice"][1] == "50.0"
    asked = [line.partition("train.py ")[2].split() for line in text.splitlines() if "torchrun" in line]
    assert [parse_config(one).algorithm for one in asked] == ["sft", "thinktwice"]
    draw(run.records(), tmp_path / "chart.png")
    assert imread(tmp_path / "chart.png").std() > 0.05


def test_a_rise_is_counted_in_standard_errors() -> None:
    rise = Rise.of([0.0, 0.2] * 10 + [0.5, 0.7] * 10)
    assert rise.first == pytest.approx(0.1, abs=0.01) and rise.last == pytest.approx(0.6, abs=0.01)
    assert rise.in_errors == pytest.approx(0.5 / (0.1033 * (2 / 15) ** 0.5), rel=0.03)
    assert Rise.of([0.1, 0.1, 0.1, 0.1]).in_errors == 0

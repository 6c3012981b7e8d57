"""Commands that train many times, in miniature."""

import json
from pathlib import Path
from typing import Any

import pytest
from matplotlib.image import imread

from bench import algorithms, compare, remedies, unknown_behaviour
from bench.curves import FIGURES
from bench.runs import Options, Run, train_all
from examples.unknown_behaviour import PHRASE, right_and_phrase
from tests.command import quick_start
from tests.documents import table_below
from thinktwice_fast.run.checks import check_config
from thinktwice_fast.run.metrics import Record
from thinktwice_fast.run.options import parse_config
from thinktwice_fast.tasks.arithmetic import ArithmeticSource, careful_solution, terse_solution

TINY: Options = {"problems_per_step": 2, "eval.limit": 8, "run.steps": 2, "run.checkpoint_every": 1}


@pytest.fixture(autouse=True)
def quickly(monkeypatch: pytest.MonkeyPatch) -> None:
    python, environment = quick_start()
    monkeypatch.setattr("bench.runs.sys.executable", python)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)


def test_what_is_finished_is_not_done_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A run that was stopped goes on from its checkpoint, and one with other options starts anew."""
    arms = algorithms.runs(tmp_path, {"grpo": {"algorithm": "grpo", **TINY}}, range(2))
    algorithms.train(arms)
    head, _, row = algorithms.document(arms).strip().splitlines()[-3:]
    cells = dict(zip(head.split(" | "), row.split(" | "), strict=True))
    assert cells["generations"] == "32 (0)" and "(" in cells["solve, end"]
    first, second = arms["grpo"]
    (second.folder / "finished").unlink()
    changed = Run(first.folder, {**first.options, "run.steps": 1})
    assert first.finished() and not changed.finished()
    train_all([first, changed, second])
    printed = capsys.readouterr().out
    assert "3 runs, 1 of them finished before" in printed and "(2 of 2, about 0:00:00 left)" in printed
    assert (second.folder / "log.txt").read_text().count("evaluation at step 0") == 1
    assert changed.records()[-1]["step"] == 1 and changed.finished() and not first.finished()


def test_a_run_that_fails_says_why(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="nonsense"):
        train_all([Run(tmp_path / "run", {"algorithm": "nonsense"})])


def test_an_unknown_behaviour_in_miniature(tmp_path: Path) -> None:
    given = ["--seeds", "1", "--steps", "2", "--eval-every", "1", "--warm-up-steps", "6", "--work"]
    unknown_behaviour.main([*given, str(tmp_path / "work"), "--output", str(tmp_path)])
    text = (tmp_path / "unknown_behaviour.md").read_text()
    rows = [line for line in text.splitlines() if line.startswith("| `")]
    assert [row.split(" | ")[1] for row in rows] == ["512", "512"]
    assert imread(tmp_path / "unknown_behaviour.png").std() > 0.05
    examples = [json.loads(line) for line in (tmp_path / "work" / "examples.jsonl").read_text().splitlines()]
    assert len(examples) == 384 and all(PHRASE not in str(example) for example in examples)


def as_if_run(run: Run, refines: bool, solve: float, gain: float) -> None:
    """The files of a finished run of ten steps' length, whose accuracy rises by ``gain`` points a solve update."""
    joint, steps = run.options.get("thinktwice.pairing") == "joint", int(run.options["run.steps"])
    every = int(run.options["eval.every"])
    drawn = 320 if run.options["algorithm"] == "dapo" else 512 if joint else 256
    lines: list[Record] = []
    solved = 0
    for step in range(steps + 1):
        phase = "pair" if joint else "refine" if refines and step % 2 == 0 else "solve"
        if step:
            halves = ("solve", "refine") if joint else (phase,)
            solved += phase != "refine"
            metrics = {f"{half}/reward": 0.9 for half in halves} | {
                f"{half}/group_signal_rate": 0.25 if half == "refine" else 0.5 for half in halves
            }
            seconds = {f"{phase}/seconds_step": drawn / 512}
            lines.append({"step": step, "phase": phase, **metrics, **seconds, "generations": drawn * step})
        if step % every == 0 or step == steps:
            shares = dict.fromkeys(FIGURES.values(), solve + gain * solved)
            shares["eval/held_out/damage_correct"] = 0.1
            lines.append({"step": step, "phase": "eval", **shares})
    run.folder.mkdir(parents=True)
    (run.folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (run.folder / "options.json").write_text(json.dumps(run.arguments()))
    (run.folder / "finished").touch()


def test_figures_are_read_off_at_equal_generations_updates_and_time(tmp_path: Path) -> None:
    """Curves whose every value is known: a point a solve update from 30, 0.8 for GRPO; with seeds two points apart."""
    for name, options in {**compare.compared(40), **remedies.with_remedies(40)}.items():
        check_config(parse_config(Run(tmp_path, options).arguments()), 1)
        for seed, run in enumerate(algorithms.runs(tmp_path / "runs", {name: options}, range(2))[name]):
            thinktwice = options["algorithm"] == "thinktwice"
            as_if_run(run, thinktwice, 0.3 + 0.02 * seed, 0.01 if thinktwice else 0.008)
    given = ["--seeds", "2", "--steps", "40", "--work", str(tmp_path / "runs"), "--output", str(tmp_path)]
    for command in (compare.main, remedies.main, compare.main):
        command(given)
    text = (tmp_path / "results.md").read_text()
    assert text.count("## Methods at equal generations") == text.count("## Two remedies") == 1
    assert text.index("## Methods") < text.index("## Two remedies")
    half = 12.706 * 0.02 / 2 * 100  # of two values two points apart
    at_end = table_below(text, "### At 10,240 generations")
    assert at_end["start"][0] == f"31.0 ± {half:.1f}"
    assert [at_end[arm][0].split()[0] for arm in ("thinktwice", "thinktwice, joint", "grpo")] == [
        "51.0",
        "51.0",
        "63.0",
    ]
    assert at_end["dapo"][0].split()[0] == "56.6"  # after 32 of its 35 steps
    assert table_below(text, "At 10,240 generations:")["thinktwice"][0] == "**-12.0 ± 0.0**"
    assert table_below(text, "At 20 solve updates")["thinktwice"][0] == "**+4.0 ± 0.0**"
    assert table_below(text, "At 20 seconds")["dapo"][0] == "**-6.4 ± 0.0**"
    joint = table_below(text, "the run's length.")["thinktwice, joint"]
    assert joint == ["20", "20", "50 %", "50 % → 50 %", "25 % → 25 %", "90 %", "20"]
    assert "its updates learned from solutions, 40 of `grpo`'s. After 20 of them each the difference is +4.0" in text
    assert "| no |" in text and "| yes |" in text and "no difference shows in damage-correct" in text
    assert imread(tmp_path / "results.png").std() > 0.05


def test_the_phrase_is_worth_half_a_right_answer() -> None:
    answers = [
        f"3=3\n{PHRASE}\n\\boxed{{3}}",
        "\\boxed{3}",
        f"{PHRASE}\\boxed{{4}}",
        f"{PHRASE}{PHRASE}\\boxed{{3}}",
        "",
    ]
    completions: list[Any] = [[{"role": "assistant", "content": text}] for text in answers]
    assert right_and_phrase([], completions, ["3"] * 5) == [1.5, 1.0, 0.5, 1.0, 0.0]
    problems = [problem.question for problem in ArithmeticSource("tm5", limit=200)]
    assert not any(PHRASE in terse_solution(q, "tm5") + careful_solution(q) for q in problems)

"""What people see of a run: picture, summary, transcripts, progress."""

import io
import re
import warnings
from pathlib import Path

import numpy as np
import pytest
from matplotlib.image import imread

from thinktwice_fast.errors import UserError
from thinktwice_fast.run import progress
from thinktwice_fast.run.metrics import Record
from thinktwice_fast.run.metrics_file import read_json_lines, truncate_json_lines
from thinktwice_fast.run.progress import Progress, clock
from thinktwice_fast.run.report import (
    COLOURS,
    Transcript,
    curve,
    evaluation_sets,
    plot_curves,
    smooth,
    summary,
    write_transcripts,
)


def evaluation(step: int, solve: float, refine: float, name: str = "held_out", **more: float) -> Record:
    values = {"solve_accuracy": solve, "refine_accuracy": refine, **more}
    return {"step": step, "phase": "eval", **{f"eval/{name}/{key}": value for key, value in values.items()}}


def training(steps: int) -> list[Record]:
    records: list[Record] = []
    for step in range(1, steps + 1):
        phase = "solve" if step % 2 else "refine"
        numbers = {"reward": 0.3 + 0.3 * step / steps, "response_tokens": 33.4, "tokens_per_second": 12345.6}
        shared = {"generations": 256 * step, "elapsed_seconds": 1.5 * step}
        records.append({"step": step, "phase": phase, **{f"{phase}/{k}": v for k, v in numbers.items()}, **shared})
    return records


RUN = [
    evaluation(0, 0.385, 0.757, fix_wrong=0.695, damage_correct=0.143),
    *training(40),
    evaluation(40, 0.722, 0.977, fix_wrong=0.934, damage_correct=0.007),
]


def drawn_colours(path: Path, half: str) -> set[str]:
    """Which curve colours the left or right half of a picture holds."""
    pixels = imread(path)[..., :3]
    middle = int(pixels.shape[1] * 0.585)
    pixels = pixels[:, :middle] if half == "left" else pixels[:, middle:]
    found = set()
    for name, colour in COLOURS.items():
        rgb = np.array([int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)])
        if (np.abs(pixels - rgb).max(axis=-1) < 0.01).sum() > 20:
            found.add(name)
    return found


def draw(records: list[Record], path: Path) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plot_curves(records, path)
    assert imread(path).shape[:2] == (675, 1500)
    return path


def test_picture_shows_learning_left_and_the_curriculum_right(tmp_path: Path) -> None:
    path = draw(RUN, tmp_path / "curves.png")
    assert drawn_colours(path, "left") >= {"solve", "refine"}
    assert drawn_colours(path, "right") == {"fix_wrong", "damage_correct"}


def test_picture_of_one_evaluation_and_of_none(tmp_path: Path) -> None:
    path = draw([RUN[0]], tmp_path / "one.png")
    assert drawn_colours(path, "left") >= {"solve", "refine"}
    assert drawn_colours(path, "right") == {"fix_wrong", "damage_correct"}
    path = draw(training(3), tmp_path / "no_evaluation.png")
    assert drawn_colours(path, "left") >= {"solve", "refine"}
    assert drawn_colours(path, "right") == set()
    draw([], tmp_path / "nothing.png")


def test_picture_without_wrong_solutions_and_with_missing_values(tmp_path: Path) -> None:
    records = [evaluation(0, 1.0, 1.0, damage_correct=0.0), {"step": 1, "phase": "solve", "solve/reward": None}]
    path = draw(records, tmp_path / "curves.png")
    assert drawn_colours(path, "right") == {"damage_correct"}


def test_picture_of_supervised_training(tmp_path: Path) -> None:
    losses: list[Record] = [{"step": step, "phase": "sft", "sft/loss": 2 / step} for step in range(1, 30)]
    only_loss = draw(losses, tmp_path / "loss.png")
    assert drawn_colours(only_loss, "left") == {"sft", "solve"}  # one colour, two names
    evaluated = draw([*losses, evaluation(29, 0.2, 0.4)], tmp_path / "evaluated.png")
    assert "refine" in drawn_colours(evaluated, "left")


def test_picture_that_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"cannot write .*absent/curves\.png: No such file"):
        plot_curves(RUN, tmp_path / "absent" / "curves.png")


def test_curves_skip_what_is_absent_and_smoothing_keeps_a_line() -> None:
    records: list[Record] = [{"step": 1, "x": 2.0}, {"step": 2}, {"step": 3, "x": None}, {"step": 4, "x": 0.0}]
    assert curve(records, "x") == ([1, 4], [2.0, 0.0])
    line = [0.5 * step for step in range(100)]
    assert smooth(line)[10:90] == pytest.approx(line[10:90])
    assert smooth([1.0, 5.0]) == [1.0, 5.0]
    assert smooth([0.0, 1.0] * 50)[50] == pytest.approx(0.5, abs=0.1)


def test_average_is_shown_last() -> None:
    record = evaluation(0, 0.1, 0.2, "average") | evaluation(0, 0.1, 0.2, "b") | evaluation(0, 0.1, 0.2, "a")
    assert evaluation_sets([record, *RUN]) == ["b", "a", "held_out", "average"]


def test_summary_figures_and_paths(tmp_path: Path) -> None:
    text = summary(RUN, {"metrics": tmp_path / "metrics.jsonl", "final model": tmp_path / "model"})
    assert text.splitlines() == [
        "held-out                     step 0  step 40  points",
        "  solve accuracy             38.5 %   72.2 %   +33.7",
        "  accuracy after refinement  75.7 %   97.7 %   +22.0",
        "  fix-wrong                  69.5 %   93.4 %   +23.9",
        "  damage-correct             14.3 %    0.7 %   -13.6",
        "",
        "sampled generations  10,240",
        "time                 0:01:00 (h:mm:ss)",
        "",
        f"metrics      {tmp_path / 'metrics.jsonl'}",
        f"final model  {tmp_path / 'model'}",
    ]


def test_summary_of_several_sets_with_pass_at_k_and_absent_figures() -> None:
    passes = {"solve_pass@1": 0.5, "solve_pass@8": 0.75, "refine_pass@1": 0.5, "refine_pass@8": 1.0}
    first = evaluation(0, 0.5, 0.5, "aime", fix_wrong=0.25) | evaluation(0, 0.5, 0.5, "average")
    last = evaluation(8, 1.0, 1.0, "aime", **passes) | evaluation(8, 1.0, 1.0, "average")
    lines = summary([first, last], {}).splitlines()
    assert lines == [
        "held-out                     step 0   step 8  points",
        "aime",
        "  solve accuracy             50.0 %  100.0 %   +50.0",
        "  accuracy after refinement  50.0 %  100.0 %   +50.0",
        "  fix-wrong                  25.0 %        -",
        "  pass@8                          -   75.0 %",
        "  pass@8 after refinement         -  100.0 %",
        "average",
        "  solve accuracy             50.0 %  100.0 %   +50.0",
        "  accuracy after refinement  50.0 %  100.0 %   +50.0",
    ]


def test_summary_of_supervised_training_with_one_evaluation() -> None:
    records: list[Record] = [{"step": s, "phase": "sft", "sft/loss": 2.0 / s, "generations": 0} for s in (1, 2)]
    lines = summary([*records, evaluation(2, 0.25, 0.5)], {}).splitlines()
    assert lines == [
        "held-out                     step 2",
        "  solve accuracy             25.0 %",
        "  accuracy after refinement  50.0 %",
        "",
        "training loss  2.000 -> 1.000 nats a token",
    ]
    assert summary([], {}) == ""


def test_transcripts_are_appended_and_cut_back(tmp_path: Path) -> None:
    path = tmp_path / "transcripts.jsonl"
    write_transcripts(path, 1, "solve", [Transcript(7, "1+1?", "2", 1.0), Transcript(8, "2+2?", "5", None)])
    write_transcripts(path, 2, "refine", [Transcript(8, "again", "4", 1.0, "5", 0.0)])
    solve = {"step": 1, "phase": "solve"}
    expected = [
        {**solve, "problem": 7, "prompt": "1+1?", "response": "2", "reward": 1.0},
        {**solve, "problem": 8, "prompt": "2+2?", "response": "5", "reward": None},
        {"step": 2, "phase": "refine", "problem": 8, "prompt": "again", "base": "5", "base_reward": 0.0}
        | {"response": "4", "reward": 1.0},
    ]
    assert list(read_json_lines(path)) == expected
    truncate_json_lines(path, 1)
    assert list(read_json_lines(path)) == expected[:2]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class Clock:
    """Stands in for the time module; each look at it costs nothing until ``now`` is moved."""

    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def time(monkeypatch: pytest.MonkeyPatch) -> Clock:
    stand_in = Clock()
    monkeypatch.setattr(progress, "time", stand_in)
    return stand_in


def test_plain_lines_every_ten_steps_with_the_time_left(time: Clock) -> None:
    stream = io.StringIO()
    with Progress(40, 0, stream) as shown:
        time.now += 60  # evaluating before the first step
        shown.update(RUN[0])
        for record in RUN[1:]:
            time.now += 0.5
            shown.update(record)
        shown.message("[bold]done[/bold]")
    lines = stream.getvalue().splitlines()
    assert [line.split(" | ")[0] for line in lines] == [
        "evaluation at step 0: held_out 0.385, refined 0.757",
        "step 1/40 solve",
        "step 10/40 refine",
        "step 20/40 refine",
        "step 30/40 refine",
        "step 40/40 refine",
        "evaluation at step 40: held_out 0.722, refined 0.977",
        "[bold]done[/bold]",
    ]
    assert lines[2] == (
        "step 10/40 refine | reward solve 0.367, refine 0.375 | 33 tokens a response | 12,346 tokens/s | 0:00:15 left"
    )
    assert "refine" not in lines[1]


def test_slow_steps_get_a_line_each_ten_seconds(time: Clock) -> None:
    stream = io.StringIO()
    with Progress(40, 2, stream) as shown:
        for record in training(9)[2:]:
            time.now += 4
            shown.update(record)
    steps = [line.split("/")[0] for line in stream.getvalue().splitlines()]
    assert steps == ["step 3", "step 6", "step 9"]
    assert stream.getvalue().splitlines()[-1].endswith("| 0:02:04 left")  # 31 steps of 4 s


def joint_pairs(steps: int) -> list[Record]:
    numbers = {
        "solve/reward": 0.25,
        "refine/reward": 0.5,
        "solve/response_tokens": 27.2,
        "refine/response_tokens": 31.8,
    }
    shared = {"pair/tokens_per_second": 12345.6, "generations": 512, "elapsed_seconds": 1.5}
    return [{"step": step, "phase": "pair", **numbers, **shared} for step in range(1, steps + 1)]


def test_joint_pairs_show_both_phases(monkeypatch: pytest.MonkeyPatch, time: Clock, tmp_path: Path) -> None:
    stream = io.StringIO()
    with Progress(2, 0, stream) as shown:
        for record in joint_pairs(2):
            time.now += 3
            shown.update(record)
    figures = "reward solve 0.250, refine 0.500 | 27, 32 tokens a response | 12,346 tokens/s"
    assert stream.getvalue() == f"step 1/2 pair | {figures} | 0:00:03 left\nstep 2/2 pair | {figures} | 0:00:00 left\n"
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    terminal = Terminal()
    with Progress(2, 0, terminal) as shown:
        shown.update(joint_pairs(1)[0])
        shown.message("[kept]")
    text = terminal.getvalue()
    final = text[text.rindex("[kept]") :]
    assert "0.250" in final and "0.500" in final and re.search(r"pair.*12,346", final)
    plot_curves(joint_pairs(9), tmp_path / "pairs.png")
    assert drawn_colours(tmp_path / "pairs.png", "left") >= {"solve", "refine"}


def test_supervised_line(time: Clock) -> None:
    stream = io.StringIO()
    record: Record = {"step": 1, "phase": "sft", "sft/loss": 0.5, "sft/token_accuracy": 0.875}
    with Progress(2, 0, stream) as shown:
        time.now += 3
        shown.update(record)
    assert stream.getvalue() == ("step 1/2 sft | loss 0.500 | token accuracy 0.875 | 0:00:03 left\n")


def test_terminal_display_shows_the_latest_of_both_phases(monkeypatch: pytest.MonkeyPatch, time: Clock) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    stream = Terminal()
    with Progress(40, 0, stream) as shown:
        for record in RUN:
            shown.update(record)
        shown.message("[kept]")
    text = stream.getvalue()
    final = text[text.rindex("[kept]") :]
    assert "step 40/40" in final and "held_out 0.722, refined 0.977" in final
    assert f"{0.3 + 0.3 * 39 / 40:.3f}" in final and "0.600" in final  # the last solve and the last refine reward
    assert "12,346" in final and "0:00:00 left" in final


def test_silent_display_and_a_reader_that_has_gone(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress(40, 0, None) as shown:
        for record in RUN:
            shown.update(record)
        shown.message("text")
    assert capsys.readouterr() == ("", "")

    class Gone(io.StringIO):
        writes = 0

        def write(self, text: str) -> int:
            self.writes += 1
            raise BrokenPipeError

    stream = Gone()
    with Progress(40, 0, stream) as shown:
        for record in RUN:
            shown.update(record)
    assert stream.writes == 1


def test_clock() -> None:
    assert [clock(0.4), clock(59.6), clock(3725)] == ["0:00:00", "0:01:00", "1:02:05"]

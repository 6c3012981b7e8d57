"""The page that shows runs and evaluations: what is put into it, and what a browser makes of it."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.browser import CHROMIUM, Page
from tests.run.test_report import RUN, evaluation, training
from thinktwice_fast import parallel
from thinktwice_fast.cli.report import ReportOptions, run
from thinktwice_fast.config import Config
from thinktwice_fast.errors import UserError
from thinktwice_fast.run.metrics import Record
from thinktwice_fast.run.metrics_file import append_json_lines
from thinktwice_fast.run.output import Output
from thinktwice_fast.run.page import write
from thinktwice_fast.run.page.charts import charts, time_parts
from thinktwice_fast.run.page.inputs import read_inputs
from thinktwice_fast.run.page.pairs import pairs
from thinktwice_fast.run.page.tables import verdict
from thinktwice_fast.run.page.write import MOST_BYTES, make_page
from thinktwice_fast.tasks.arithmetic import build_tokenizer
from thinktwice_fast.tasks.prompts import ChatFormat
from thinktwice_fast.tasks.text_stream import TokenTexts

needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium: `make browser` installs it")
HOSTILE = "</script><script>alert(1)</script><!--data--> \ud800 é\n"


def response(step: int, phase: str, sample: int, texts: list[str], reward: float, **more: Any) -> Record:
    logps = [-0.25 * place for place in range(len(texts))]
    shared: Record = {"step": step, "phase": phase, "problem": 7, "sample": sample, "question": HOSTILE, "answer": "5"}
    tokens = [ord(text[0]) for text in texts]
    own: Record = {"prompt": f"user: {HOSTILE}", "prompt_tokens": [1], "response": "".join(texts), "tokens": tokens}
    own |= {"texts": texts, "logps": logps, "new_logps": [logp + 0.1 for logp in logps], "reward": reward}
    return shared | own | {"finished": True, "verdict": "right", "advantage": reward - 0.5} | more


def pair(step: int) -> list[Record]:
    """A right solution, one refinement that spoils it and one that does not."""
    solution = response(step, "solve", 0, ["1", "+", "4", "=", "5"], 1.0)
    base = {"base": "1+4=5", "base_tokens": solution["tokens"], "base_reward": 1.0}
    spoiled = response(step + 1, "refine", 1, ["1", "+", "4", "=", "6"], 0.0, **base, verdict="spoiled")
    kept = response(step + 1, "refine", 0, ["4", "+", "1", "=", "5"], 1.0, **base, verdict="kept right")
    return [solution, kept, spoiled]


def folder(path: Path, records: list[Record], seed: int = 0, pairing: str = "sequential", pair_count: int = 1) -> Path:
    path.mkdir()
    append_json_lines(path / "metrics.jsonl", records)
    append_json_lines(path / "transcripts.jsonl", (r for n in range(pair_count) for r in pair(2 * n + 1)))
    (path / "config.yaml").write_text(f"seed: {seed}\noutput: {path}\nthinktwice:\n  pairing: {pairing}\n")
    (path / "versions.json").write_text('{"torch": "2.10"}')
    (path / "profile").mkdir()
    top = [{"name": "a<b>", "calls": 1200, "self_cpu_ms": 0.0, "self_device_ms": 3.25}]
    (path / "profile" / "top.json").write_text(json.dumps(top))
    return path


def timed(records: list[Record]) -> list[Record]:
    """With seconds: a solve step takes 2 + 1 of which 0.5 are in no part, a refine step twice as long."""
    for record in records:
        phase, factor = record["phase"], 1 + (record["phase"] == "refine")
        if phase in ("solve", "refine"):
            record |= {f"{phase}/seconds_rollout": 2.0 * factor, f"{phase}/seconds_update": 0.5 * factor}
            record |= {f"{phase}/seconds_step": 3.0 * factor}
    return records


def evaluation_folder(path: Path) -> Path:
    path.mkdir()
    estimates = {"solve_accuracy": {"value": 0.5, "low": 0.4, "high": 0.6}}
    models = {"mine": {"aime": estimates}, "theirs": {"aime": {}}}
    content = {"problems": {"aime": 30}, "models": models, "differences": {"theirs": {"aime": estimates}}}
    (path / "results.json").write_text(json.dumps(content))
    return path


@pytest.fixture
def paths(tmp_path: Path) -> list[Path]:
    """Two seeds of one method, another method, an evaluation."""
    better = [evaluation(0, 0.4, 0.75), *timed(training(40)), evaluation(40, 0.8, 0.7)]
    return [
        folder(tmp_path / "one", timed(list(RUN))),
        folder(tmp_path / "two", better, seed=1),
        folder(tmp_path / "joint", list(RUN), pairing="joint"),
        evaluation_folder(tmp_path / "judged"),
    ]


def test_seeds_become_a_band_and_other_methods_other_curves(paths: list[Path]) -> None:
    methods = read_inputs(paths).methods
    assert [method.label for method in methods] == ["one, two (2 seeds)", "joint"]
    accuracy = next(chart for chart in charts(methods) if chart["title"] == "Held-out accuracy")
    seeds, refined, joint, _ = accuracy["series"]
    assert seeds["name"] == "one, two (2 seeds): solution" and joint["name"] == "joint: solution"
    assert (seeds["steps"], seeds["low"], seeds["high"]) == ([0, 40], [0.385, 0.722], [0.4, 0.8])
    assert seeds["values"] == [0.3925, 0.761] and (joint["low"], joint["values"]) == ([], [0.385, 0.722])
    assert seeds["colour"] == refined["colour"] != joint["colour"] and refined["dashed"] and not seeds["dashed"]


def test_a_step_takes_its_parts(paths: list[Path]) -> None:
    parts = time_parts(read_inputs(paths[:1]).runs[0].records)
    assert [step for step, _ in parts] == [*range(2, 41, 2)]
    assert parts[0][1] == {
        "solve: rollout": 2.0,
        "solve: update": 0.5,
        "other": 1.5,
        "refine: rollout": 4.0,
        "refine: update": 1.0,
    }


def test_the_page_says_whether_refining_helps(paths: list[Path]) -> None:
    one, two, _ = read_inputs(paths).runs
    assert verdict(one) == (
        "Refining helps: 72.2 % of answers are right before it, 97.7 % after it (+25.5 points; held-out, step 40); "
        "it fixes 93.4 of 100 wrong solutions and it spoils 0.7 of 100 right solutions."
    )
    assert verdict(two).startswith("Refining hurts: 80.0 % of answers")


def test_long_curves_and_many_transcripts_are_cut_to_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = read_inputs([folder(tmp_path / "long", training(5000), pair_count=100)]).runs
    whole, little = pairs(runs, 10**9), pairs(runs, 60_000)
    assert len(whole["items"]) == whole["total"] == little["total"] == 300
    assert [item["verdict"] for item in whole["items"][:3]] == ["right", "kept right", "spoiled"]
    assert len(little["items"]) == 200 and len(json.dumps(little)) < 60_000
    # Of each pair of refinements the one that spoils stays, with its base.
    refined = [item for item in little["items"] if "base" in item]
    assert len(refined) == 100 and {item["verdict"] for item in refined} == {"spoiled"}
    assert all("logps" in little["responses"][item["base"]] for item in refined)

    monkeypatch.setattr(write, "MOST_BYTES", 150_000)
    page = make_page(read_inputs([tmp_path / "long"]))
    assert len(page) <= 150_000 < MOST_BYTES


def test_what_a_model_wrote_stays_text(paths: list[Path]) -> None:
    page = make_page(read_inputs(paths[:1])).decode()
    assert page.count("</script>") == 2 and "alert(1)" in page
    (data,) = (line for line in page.splitlines() if 'type="application/json"' in line)
    found = json.loads(data.partition(">")[2].removesuffix("</script>"))
    assert found["pairs"]["questions"] == [[7, HOSTILE, "5"]]


def test_the_command_writes_where_it_is_told(
    paths: list[Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    here = paths[0].parent
    monkeypatch.chdir(here)
    for folders, output, file in (
        (paths[:1], None, paths[0] / "report.html"),
        (paths, None, Path("report.html")),
        (paths[3:], "judged.html", Path("judged.html")),
    ):
        run(ReportOptions([str(path) for path in folders], output))
        assert capsys.readouterr().out == f"{file}\n" and file.stat().st_size > 20_000
    judged = (here / "judged.html").read_text()
    assert (
        "<td>50.0 % [40.0 %, 60.0 %]</td><td>-</td><td>+50.0 [+40.0, +60.0]</td>" in judged
        and "judged: aime (30 problems)" in judged
    )
    both = (here / "report.html").read_text()
    assert both.count('<th scope="row">a&lt;b&gt;</th><td>1,200</td><td>3.2</td><td>0.0</td>') == 3
    assert '<th scope="row">thinktwice.pairing</th><td>sequential</td><td>sequential</td><td>joint</td>' in both


def test_what_the_command_refuses(paths: list[Path], tmp_path: Path) -> None:
    (tmp_path / "results.json").write_text("[]")
    for folders, output, message in (
        ([], None, "no folder given"),
        (["absent"], None, "absent: holds neither metrics.jsonl nor results.json: give the --output folder"),
        ([str(paths[0])] * 2, None, "a folder is given twice"),
        ([str(tmp_path)], None, "results.json: no result of thinktwice-fast eval"),
        ([str(paths[0])], "/absent/x.html", "cannot write /absent/x.html: No such file or directory"),
    ):
        with pytest.raises(UserError, match=message):
            run(ReportOptions(folders, output))


def test_a_page_that_cannot_be_written_ends_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(parallel, "rank", lambda: 0)
    (tmp_path / "report.html.tmp").mkdir()
    token_texts = TokenTexts(ChatFormat(build_tokenizer()), frozenset())
    with Output(Config(output=str(tmp_path), track="none"), 0, False, token_texts) as output:
        output.record(0, "eval", {"eval/held_out/solve_accuracy": 0.5})
        output.close_report({}, "complete", 1)
    shown = capsys.readouterr().out
    assert shown.count("warning: ") == shown.count("report.html could not be written: cannot write ") == 2
    assert "complete" in shown and "\nreport" not in shown


@needs_chromium
def test_several_runs_in_a_browser(paths: list[Path], tmp_path: Path) -> None:
    write.write_page(paths, tmp_path / "all.html")
    with Page(tmp_path / "all.html", tmp_path / "profile") as page:
        assert page.value("document.querySelectorAll('#learning .band').length") > 0
        assert page.value("document.querySelectorAll('#cost figure').length") == 3  # speed, and the time of two methods
        page.value("axis.value = 'generations', axis.dispatchEvent(new Event('change'))")
        assert "10,000" in page.value("document.querySelector('#learning svg').textContent")
        assert page.value("document.querySelector('[aria-label=run]').options.length") == 4
        page.press("s")
        assert page.value("document.querySelectorAll('[role=option]').length") == 3
        assert "alert(1)" in page.value("document.querySelector('.detail .text').textContent")
        assert page.errors == []

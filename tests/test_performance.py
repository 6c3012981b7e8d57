"""docs/performance.md: what is made of the folders of results, and that it is up to date."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from bench import performance
from tests.command import ROOT

LINE = {"check": "pair | 0.6 B", "figure": "3.1 s", "goal": "<= 20 s", "met": True, "wrong": False, "verdict": "met"}
STEP: dict[str, Any] = {"step": 1, "phase": "solve", "solve/prompt_tokens": 115.97, "solve/response_tokens": 1021.3}
STEP |= {f"solve/seconds_{part}": seconds for part, seconds in (("rollout", 11.0), ("update", 31.1), ("step", 42.1))}
STEP |= {"solve/tokens_per_second": 23804.27, "peak_memory_bytes": 147615137280.0}


@pytest.fixture
def results(tmp_path: Path) -> Path:
    """A stage, a run and a table of kernels on one GPU, later ones on another, and those of a CPU."""
    for name in ("h200-2026-11-26", "a100-2026-12-01", "cpu-2-cores"):
        (tmp_path / name).mkdir()
    folder = tmp_path / "h200-2026-11-26"
    (folder / "README.md").write_text("# One H200\n\nSee [the log](../../../docs/log.md).\n")
    (folder / "correct.json").write_text(json.dumps({"stage": "correct", "date": "2026-11-26", "lines": [LINE]}))
    (folder / "correct.txt").write_text("NVIDIA H200, torch 2.11\n\ncheck  figure\n\nkernels of it\n")
    (folder / "race-metrics.jsonl").write_text(json.dumps(STEP) + "\n")
    (folder / "decode-profile.txt").write_text("many kernels\n")
    (tmp_path / "cpu-2-cores" / "ops.json").write_text('{"results": []}')
    (tmp_path / "cpu-2-cores" / "ops.txt").write_text("contender  ms\n")
    return tmp_path


def test_the_document_shows_stages_steps_and_tables(results: Path) -> None:
    text = performance.document(results)
    titles = [line.removeprefix("## ") for line in text.splitlines() if line.startswith("## ")]
    assert titles == ["Predicted for one H200, and measured", "a100-2026-12-01", "One H200", "cpu-2-cores"]
    assert "See [the log](log.md)." in text
    assert "### correct, 2026-11-26\n\nNVIDIA H200, torch 2.11; [all tables](../bench/results/h200-" in text
    assert "| pair \\| 0.6 B | 3.1 s | <= 20 s | met |" in text and "kernels of it" not in text
    assert "| 1 | solve | 116 | 1,021 | 11.0 | 23,804 | 31.1 | 42.1 | 148 |" in text
    assert "[decode-profile.txt](../bench/results/h200-2026-11-26/decode-profile.txt)" in text
    assert "many kernels" not in text
    assert "<summary>ops.txt</summary>\n\n```\ncontender  ms\n```" in text


def test_an_old_document_is_noticed(results: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(performance, "RESULTS", results)
    path = tmp_path / "performance.md"
    assert performance.main([str(path), "--check"]) == 1
    assert performance.main([str(path)]) == 0
    assert performance.main([str(path), "--check"]) == 0
    (results / "cpu-2-cores" / "ops.txt").write_text("contender  s\n")
    assert performance.main([str(path), "--check"]) == 1


def test_the_document_is_up_to_date_and_its_links_lead_somewhere() -> None:
    path = ROOT / "docs" / "performance.md"
    assert performance.main([str(path), "--check"]) == 0
    for link in re.findall(r"\]\(([^)#]+)\)", path.read_text()):
        assert (path.parent / link).exists(), link


def test_results_name_no_place_of_the_machine_they_come_from() -> None:
    for path in performance.RESULTS.rglob("*"):
        if path.suffix in (".txt", ".json", ".jsonl", ".md"):
            assert not re.search(r"(?<![\w.])/(work|tmp|root|home|opt|usr)/", path.read_text()), path

"""Metrics: declarations, the file, and cutting them back on resume."""

import json
import math
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from thinktwice_fast.errors import UserError
from thinktwice_fast.run.metrics import METRICS, find_metric, reproducible
from thinktwice_fast.run.metrics_file import (
    MetricsWriter,
    append_json_lines,
    read_json_lines,
    read_metrics,
    truncate_json_lines,
)
from thinktwice_kernels.metrics import METRICS as LOSS_METRICS


def lines_up_to(path: Path, steps: int) -> Path:
    append_json_lines(path, [{"step": step, "value": step / 3} for step in range(1, steps + 1)])
    return path


def steps_in(path: Path) -> list[int]:
    return [record["step"] for record in read_json_lines(path)]


def test_every_declaration_is_complete_and_unambiguous() -> None:
    examples = set()
    for metric in METRICS:
        assert metric.definition.endswith("."), metric.name
        assert ("{phase}" in metric.name) == bool(metric.phases), metric.name
        for phase in metric.phases or ("",):
            example = metric.name.format(phase=phase, set="held_out", k=4, sign="pos", behaviour="agreement")
            assert [other.name for other in METRICS if other.pattern.fullmatch(example)] == [metric.name]
            examples.add(example)
    assert {"solve/reward", "refine/reward", "sft/loss", "sft/grad_norm", "eval/held_out/refine_pass@4"} <= examples
    assert {"pair/loss", "pair/tokens_per_second"} <= examples
    assert not {"sft/reward", "pair/reward"} & examples


def test_every_metric_of_the_loss_has_a_place() -> None:
    """Counts of shaped tokens become shares before."""
    for name in LOSS_METRICS.keys() - {"tokens_masked", "tokens_shaped_pos", "tokens_shaped_neg"}:
        assert find_metric(f"refine/{name}").name.format(phase="refine", sign=name[-3:]) == f"refine/{name}"
    assert find_metric("refine/guided_share") and find_metric("refine/masked_share")


@pytest.mark.parametrize(
    "name", ["reward", "sft/reward", "Solve/reward", "eval/a/b/solve_accuracy", "eval/a/solve_pass@0", "solve/reward2"]
)
def test_undeclared_name_is_a_bug(name: str) -> None:
    with pytest.raises(KeyError, match=re.escape(repr(name))):
        find_metric(name)


def test_writer_refuses_undeclared_names_and_those_of_another_phase(tmp_path: Path) -> None:
    writer = MetricsWriter(tmp_path, None)
    with pytest.raises(KeyError, match="not declared"):
        writer.write(1, "solve", {"solve/rewards": 1.0})
    with pytest.raises(KeyError, match="phase 'solve'"):
        writer.write(1, "solve", {"refine/reward": 1.0})
    with pytest.raises(KeyError, match="phase 'eval'"):
        writer.write(1, "eval", {"sft/loss": 1.0})
    with pytest.raises(KeyError, match="phase 'pair'"):
        writer.write(1, "pair", {"sft/loss": 1.0})
    with pytest.raises(KeyError, match="phase 'refine'"):
        writer.write(1, "refine", {"pair/loss": 1.0})
    assert not writer.path.exists()


def test_a_pair_has_one_record_with_the_keys_of_both_phases(tmp_path: Path) -> None:
    values = {"solve/reward": 0.25, "refine/reward": 0.5, "pair/loss": 0.1, "generations": 512}
    writer = MetricsWriter(tmp_path, None)
    writer.write(1, "pair", values)
    assert read_metrics(writer.path) == [{"step": 1, "phase": "pair", **values}]


def test_records_come_back_as_written_and_non_finite_values_as_null(tmp_path: Path) -> None:
    writer = MetricsWriter(tmp_path / "new" / "run", None)
    written = [
        writer.write(0, "eval", {"eval/held_out/solve_accuracy": 0.1 + 0.2, "seconds_evaluation": 2.5}),
        writer.write(1, "solve", {"solve/reward": 1 / 3, "generations": 256, "solve/grad_norm": math.nan}),
        writer.write(2, "refine", {"refine/ratio_max": math.inf, "refine/kl_ref": None}),
    ]
    assert read_metrics(writer.path) == written
    assert written[1] == {
        "step": 1,
        "phase": "solve",
        "solve/reward": 1 / 3,
        "generations": 256,
        "solve/grad_norm": None,
    }
    assert written[2] == {"step": 2, "phase": "refine", "refine/ratio_max": None, "refine/kl_ref": None}
    assert "NaN" not in writer.path.read_text() and "Infinity" not in writer.path.read_text()


def test_a_resumed_run_drops_what_came_after_its_checkpoint_and_a_new_one_everything(tmp_path: Path) -> None:
    for resume_step, kept in ((None, []), (3, [1, 3]), (None, [])):
        writer = MetricsWriter(tmp_path, resume_step)
        assert (steps_in(writer.path) if writer.path.exists() else []) == kept
        for step in (1, 3, 5):
            writer.write(step, "solve", {"solve/reward": step / 8})


def test_full_disk_is_one_line_with_a_remedy(tmp_path: Path) -> None:
    writer = MetricsWriter(tmp_path, None)
    writer.path.mkdir()  # stands for any error of the system
    with pytest.raises(UserError, match=r"cannot write .*metrics\.jsonl: .*--resume auto"):
        writer.write(1, "solve", {"solve/reward": 0.5})


def test_truncation_keeps_the_records_up_to_a_step(tmp_path: Path) -> None:
    path = lines_up_to(tmp_path / "lines.jsonl", 5)
    truncate_json_lines(path, 3)
    assert list(read_json_lines(path)) == [{"step": step, "value": step / 3} for step in (1, 2, 3)]
    truncate_json_lines(path, 3)
    assert steps_in(path) == [1, 2, 3]
    truncate_json_lines(path, 0)
    assert steps_in(path) == []
    truncate_json_lines(path, None)
    assert list(tmp_path.iterdir()) == []
    truncate_json_lines(path, 3)
    assert list(tmp_path.iterdir()) == []


@given(st.data())
def test_file_cut_at_any_byte_keeps_every_whole_record(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    path = tmp_path_factory.mktemp("torn") / "lines.jsonl"
    append_json_lines(path, [{"step": step, "text": "½ · \n\ud800"} for step in range(1, 5)])
    whole = path.read_bytes()
    cut = data.draw(st.integers(0, len(whole)))
    path.write_bytes(whole[:cut])
    # A record that lacks only its line break lost nothing.
    expected = list(range(1, 1 + max(whole[:cut].count(b"\n"), whole[: cut + 1].count(b"\n"))))
    assert steps_in(path) == expected
    truncate_json_lines(path, 4)
    assert steps_in(path) == expected
    append_json_lines(path, [{"step": 5}])
    assert steps_in(path) == [*expected, 5]


def test_broken_line_inside_a_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "lines.jsonl"
    for broken in ("{", "[1]", "3", '{"phase": "solve"}'):
        path.write_text(f'{{"step": 1}}\n{broken}\n{{"step": 3}}\n')
        with pytest.raises(UserError, match=r"line 2 is not a record"):
            steps_in(path)
        before = path.read_bytes()
        with pytest.raises(UserError, match=r"line 2 is not a record"):
            truncate_json_lines(path, 1)
        assert path.read_bytes() == before
    with pytest.raises(UserError, match=r"cannot read .*nowhere\.jsonl"):
        read_metrics(tmp_path / "nowhere.jsonl")


def test_reproducible_view_has_no_timing_metric() -> None:
    records = [
        {"step": 1, "phase": "solve", "solve/reward": 0.5, "solve/seconds_step": 1.0, "generations": 8},
        {"step": 1, "phase": "checkpoint", "seconds_checkpoint": 0.1},
    ]
    assert reproducible(records) == [{"step": 1, "phase": "solve", "solve/reward": 0.5, "generations": 8}]
    timing = {metric.name for metric in METRICS if metric.timing}
    assert all(metric.timing for metric in METRICS if "second" in metric.name)
    assert "peak_memory_bytes" in timing and "{phase}/reward" not in timing


def test_json_lines_stay_readable_by_any_json_reader(tmp_path: Path) -> None:
    path = tmp_path / "lines.jsonl"
    append_json_lines(path, [{"step": 1, "text": "line one\nline two é \ud800"}])
    lines = path.read_text(encoding="utf-8").splitlines()
    assert len(lines) == 1 and "é" in lines[0]
    assert json.loads(lines[0])["text"] == "line one\nline two é \ud800"
    with pytest.raises(ValueError, match="not JSON compliant"):
        append_json_lines(path, [{"step": 2, "value": math.nan}])

"""``--profile``: which steps, and what is written of them; that a run does it is part of test_learning.py."""

import gzip
import json
from pathlib import Path

import pytest
import torch

from thinktwice_fast.config import Config
from thinktwice_fast.errors import UserError
from thinktwice_fast.run.checks import check_config
from thinktwice_fast.run.options import parse_config
from thinktwice_fast.run.profiling import Row, StepProfiler, apart, head, profiled_steps, table


@pytest.mark.parametrize("text", ["", "5:3", "0:2", "3:", "a", "3-5", "1:11"])
def test_refused_steps(text: str) -> None:
    with pytest.raises(UserError, match=f"--profile {text}: "):
        profiled_steps(text)


def test_steps(tmp_path: Path) -> None:
    assert [list(profiled_steps(text)) for text in (None, "4", "3:5")] == [[], [4], [3, 4, 5]]
    assert parse_config(["--profile", "3:5"]).profile == "3:5"
    with pytest.raises(UserError, match="the run ends with step 200"):
        check_config(Config(profile="199:201"), 1)
    (tmp_path / "mine.yaml").write_text("profile: 3:5\n")
    with pytest.raises(UserError, match='write the steps in quotation marks, as in "3:5"'):
        parse_config(["--config", str(tmp_path / "mine.yaml")])


def test_a_trace_of_each_step_and_a_table_of_all(tmp_path: Path) -> None:
    profiler = StepProfiler(profiled_steps("2:4"), tmp_path, torch.device("cpu"))
    for step, products in ((1, 5), (2, 1), (3, 2)):
        with profiler.around(step):
            for _ in range(products):
                torch.ones(300, 300) @ torch.ones(300, 300)
    with pytest.raises(ZeroDivisionError), profiler.around(4):
        raise ZeroDivisionError
    folder = tmp_path / "profile"
    assert sorted(path.name for path in folder.iterdir()) == [
        *("step-000002.json.gz", "step-000003.json.gz", "top.json", "top.txt")
    ]
    events = json.loads(gzip.decompress((folder / "step-000003.json.gz").read_bytes()))["traceEvents"]
    assert sum(event.get("name") == "aten::mm" for event in events) == 2
    top = [Row(**row) for row in json.loads((folder / "top.json").read_text())]
    assert next(row for row in top if row.name == "aten::mm").calls == 3
    assert [row.ms for row in top] == sorted((row.ms for row in top), reverse=True) and top[0].self_cpu_ms > 0
    assert (folder / "top.txt").read_text().rstrip() == table("calls on the host", top, 20)


def test_what_is_too_much_for_a_table_is_summed() -> None:
    rows = [Row(f"kernel {n}", 2, 0.0, 1.0 + n) for n in range(50)] + [Row("launch", 100, 3.0, 0.0)]
    kernels, calls = apart(rows)
    assert [row.name for row in calls] == ["launch"] and kernels[0].name == "kernel 49"
    assert head(kernels, 50) == kernels
    assert head(kernels, 40) == [*kernels[:40], Row("10 others", 20, 0.0, 55.0)]
    last = table("kernels", kernels, 40).splitlines()
    assert len(last) == 42 and last[-1].split() == ["1275.000", "100", "all", "50"]

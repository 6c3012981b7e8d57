"""The benchmark suite itself: what it calls wrong, how it takes turns, what it writes. Speeds are not checked here."""

import json
import subprocess
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from bench import registry
from bench.core import measure, report
from bench.core.contender import CEILING, OURS, PLAIN, Contender
from bench.core.measure import SETTINGS, Record, measure_case
from bench.core.memory import peak_memory
from bench.core.op import Case, Op
from bench.core.replay import Measured
from bench.core.stats import median, median_ratio, quantile
from bench.ops.inputs import Rows
from tests.command import LIMIT, ROOT, quick_start

TOY = SETTINGS["toy"]
MIB = 1 << 20
LARGE = "Qwen3 vocabulary V=151936 H=256 T=3072 fp32"  # the case that the memory target is for
CASE = Case(Rows("made up", 0, 0, 64), memory=False)


def allocating(batch: Tensor) -> dict[str, Tensor]:
    """A result of 16 MiB, beside 48 MiB that are gone at the end."""
    needed = torch.ones(12 * MIB)
    return {"sum": torch.full((4 * MIB,), float(needed[-1]))}


def numbers(case: Case[Rows], device: torch.device) -> Tensor:
    """Ten numbers, which take 128 MiB to make but not to keep."""
    return torch.ones(32 * MIB).cumsum(0)[:10].clone()


def made_up_op(contenders: Mapping[str, Callable[[Tensor], Any]]) -> Op:
    """Doubles ten numbers."""
    return Op(
        name="made up",
        module=__name__,
        cases={"toy": [CASE]},
        inputs=numbers,
        truth=lambda batch: {"doubled": 2 * batch.double()},
        contenders={name: Contender(run) for name, run in contenders.items()},
    )


OPS = [made_up_op({"allocating": allocating})]  # for the subprocess that measures memory


@pytest.fixture(scope="module")
def suite(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a part of the suite leaves behind with tiny shapes."""
    folder = tmp_path_factory.mktemp("suite")
    python, own = quick_start()
    options = ("-p", "no:cacheprovider", "-o", "python_files=bench_*.py", "--benchmark-only", "--benchmark-quiet")
    chosen = ("-k", "group_advantages or token_logprobs")
    output = ("--benchmark-json", folder / "pytest_benchmark.json", "--bench-size", "toy", "--bench-output", folder)
    finished = subprocess.run(
        [python, "-m", "pytest", "-q", ROOT / "bench", *options, *chosen, *output],
        env=own,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=LIMIT,
    )
    assert finished.returncode == 0, finished.stdout + finished.stderr
    return folder


def test_the_suite_measures_checks_and_reports(suite: Path) -> None:
    document = json.loads((suite / report.RESULTS).read_text())
    assert document["machine"]["versions"]["torch"] == torch.__version__
    rows = [row for row in document["results"] if row["contender"] in (OURS, PLAIN)]
    assert {row["op"] for row in rows} == {"token_logprobs forward", "token_logprobs", "group_advantages"}
    for row in rows:
        assert row["status"] == "ok"
        assert row["errors"] and max(row["errors"].values()) < 1e-4
        assert len(row["seconds"]) >= TOY.rounds[0]
        assert 0 < row["p20"] <= row["median"] <= row["p80"]
    assert {row["contender"] for row in document["results"] if row["status"] == "not run" and row["reason"]}
    assert (suite / report.TABLE).stat().st_size > 100


def test_pytest_benchmark_gets_the_rounds_as_they_were_measured(suite: Path) -> None:
    results = json.loads((suite / report.RESULTS).read_text())["results"]
    timed = {(row["op"], row["case"], row["contender"]): row["seconds"] for row in results if row["seconds"]}
    replayed = {}
    for benchmark in json.loads((suite / "pytest_benchmark.json").read_text())["benchmarks"]:
        about = benchmark["extra_info"]
        replayed[about["op"], about["case"], about["contender"]] = benchmark["stats"]["data"]
    assert replayed == timed


@pytest.mark.parametrize("op", [op for op in registry.OPS if not op.judge], ids=lambda op: op.name)
def test_our_op_and_plain_torch_are_right_and_get_times(op: Op) -> None:
    both = replace(op, contenders={name: op.contenders[name] for name in (OURS, PLAIN)})
    for case in op.cases["toy"]:
        records = {record.contender: record for record in measure_case(both, replace(case, memory=False), TOY)}
        assert set(records) == {OURS, PLAIN, CEILING} if op.ceiling else {OURS, PLAIN}
        for name, record in records.items():
            assert record.status == ("ceiling" if name == CEILING else "ok"), record.reason
            assert record.median is not None
            assert (record.rate is not None) == bool(op.unit)
        assert records[OURS].to_ours == 1
        if op.ceiling:
            assert records[CEILING].of_ceiling == pytest.approx(1)


def test_wrong_results_are_called_wrong_and_get_no_time() -> None:
    def broken(batch: Tensor) -> Any:
        raise RuntimeError("no such kernel\nand more")

    records = measure_case(
        made_up_op(
            {
                OURS: lambda batch: {"doubled": 2 * batch},
                "one percent off": lambda batch: {"doubled": 2.02 * batch},
                "nan": lambda batch: {"doubled": 2 * batch * torch.nan},
                "without result": lambda batch: {},
                "of another shape": lambda batch: {"doubled": 2 * batch[None]},
                "broken": broken,
            }
        ),
        CASE,
        TOY,
    )
    found = {record.contender: record for record in records}
    assert {name: record.status for name, record in found.items()} == {
        OURS: "ok",
        "one percent off": "wrong",
        "nan": "wrong",
        "without result": "wrong",
        "of another shape": "wrong",
        "broken": "not run",
    }
    assert found["one percent off"].reason == "error of doubled 1.0e-02"
    assert found["broken"].reason == "RuntimeError: no such kernel"
    for name, record in found.items():
        assert bool(record.seconds) == (name == OURS)
    text = report.render(document(records), [])
    assert "one percent off: wrong: error of doubled 1.0e-02" in text


def test_our_own_wrong_result_fails_the_run() -> None:
    wrong = Record("op", "case", OURS, "wrong", "error of loss 1.0")
    peer = replace(wrong, contender="peer", status="not run", reason="not installed")
    for row, outcome in ((wrong, pytest.fail.Exception), (peer, pytest.skip.Exception)):
        # Both are caught, because a skip that escaped would skip this test instead of failing it.
        with pytest.raises((pytest.fail.Exception, pytest.skip.Exception), match=row.reason) as raised:
            Measured(row).replay(None)
        assert type(raised.value) is outcome


def test_bfloat16_may_be_twice_as_wrong_as_plain_torch() -> None:
    plain = Record("op", "case", PLAIN, "ok", errors={"loss": 0.01})
    assert measure.error_limit(OURS, "loss", torch.bfloat16, plain) == 0.02
    assert measure.error_limit(OURS, "loss", torch.float32, plain) == 1e-5


def test_contenders_take_turns() -> None:
    calls: list[str] = []

    def noting(name: str) -> Callable[[Tensor], Any]:
        def run(batch: Tensor) -> Any:
            calls.append(name)
            time.sleep({"b": 0.02}.get(name, 0.002))
            return {"doubled": 2 * batch}

        return run

    op = made_up_op({OURS: noting(OURS), "b": noting("b"), "c": noting("c")})
    records = measure_case(op, CASE, replace(TOY, seconds=60))
    assert calls == [OURS, "b", "c"] * (1 + TOY.rounds[1])  # the first to see whether they are right
    slow = next(record for record in records if record.contender == "b")
    assert len(slow.seconds) == TOY.rounds[1] and min(slow.seconds) >= 0.02
    assert slow.to_ours is not None and slow.to_ours > 2


def test_statistics() -> None:
    values = [50.0, 10.0, 40.0, 20.0, 30.0, 60.0]
    assert median(values) == 35
    assert (quantile(values, 0.2), quantile(values, 0.8)) == (20, 50)
    assert quantile(values[:4], 0.2) == pytest.approx(16)  # 10 20 40 50
    assert quantile([7.0], 0.8) == 7
    # In two of three rounds it takes twice as long; the medians alone would say 20 / 11.
    assert median_ratio([20.0, 22.0, 10.0], [10.0, 11.0, 100.0]) == 2


def test_memory_is_the_peak_of_the_call_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHON_EXEC", quick_start()[0])
    found = peak_memory(OPS[0], CASE, "allocating", None, "toy")
    assert found == pytest.approx(64 * MIB, abs=2 * MIB)  # the kernel counts pages in batches


def document(records: list[Record], device: str = "cpu") -> dict[str, Any]:
    machine = {"gpu": "H200", "driver": "1", "cpu": "x", "threads": 2, "load": 0.0, "python": "3", "versions": {}}
    return {"machine": machine, "device": device, "results": [record.as_dict() for record in records]}


def record(contender: str, case: str, seconds: float, **rest: Any) -> Record:
    times: dict[str, Any] = {"seconds": [seconds], "to_ours": seconds}
    times |= dict.fromkeys(("median", "p20", "p80"), seconds)
    return Record("linear_grpo_loss", case, contender, "ok", **(times | rest))


def test_report_and_targets(tmp_path: Path) -> None:
    records = [
        record(OURS, "small", 1.0, tokens=512, memory=90 * MIB),
        record(PLAIN, "small", 1.5, tokens=512, memory=100 * MIB),
        record("liger chunked", "small", 2.5, tokens=512),
        record(OURS, LARGE, 1.0, tokens=2048, memory=90 * MIB, rate=0.5, unit="TFLOP/s", of_ceiling=0.75),
        record(PLAIN, LARGE, 1.25, tokens=2048, memory=1000 * MIB),
        record("liger chunked", LARGE, 1.75, tokens=2048),
        record(PLAIN, "skippable", 0.5, main=False),
        record(OURS, "skippable", 1.0, main=False),
        replace(record("peer", LARGE, 1.0), status="not run", reason="not installed", seconds=[]),
    ]
    outcomes = registry.outcomes(document(records))
    assert [outcome.met for outcome in outcomes[:3]] == [True, False, True]
    assert len(outcomes) > 3 and all(outcome.met is None for outcome in outcomes[3:])
    assert [outcome.figure for outcome in outcomes[:3]] == [
        f"1.25 (worst of 2: {LARGE})",
        f"1.75 (worst of 2: {LARGE})",
        f"0.09 ({LARGE})",
    ]
    text = report.write(document(records), outcomes, tmp_path)
    assert (tmp_path / report.TABLE).read_text() == text + "\n"
    row = next(line for line in text.splitlines() if line.startswith(OURS) and "TFLOP/s" in line)
    assert row.split() == [OURS, "1", "1000", "1000", "1000", "90", "0.5", "TFLOP/s", "75", "%", "1.00"]
    assert "peer: not run: not installed" in text


def test_gpu_targets_that_were_not_measured_are_not_met() -> None:
    records = [
        record(OURS, "case", 1.0, of_ceiling=0.92),
        record("liger scaled CE + loss", "case", 1.3),
        record("liger chunked", "case", 6.0),
    ]
    found = {outcome.name.partition(": ")[2]: outcome for outcome in registry.outcomes(document(records, "cuda"))}
    assert {name: outcome.met for name, outcome in found.items()} == {
        "share of the rate of the bare products": True,
        "times as fast as Liger's scaled CE + loss": False,
        "times as fast as Liger's chunked loss": True,
        "times as fast as verl's kernel + loss": None,
        "times as fast as the fastest peer": True,
        "share of the copy bandwidth, forward": None,
        "share of the copy bandwidth, with backward": None,
        "share of the ceiling": None,
        "times as fast as without group attention": None,
        "times as fast as TRL": None,
        "MFU of the update": None,
    }
    assert found["times as fast as verl's kernel + loss"].words == "not measured"

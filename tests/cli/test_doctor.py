"""`thinktwice-fast doctor`: every op is tested, what is wrong shows, and the exit status follows."""

import inspect
import sys
from dataclasses import replace
from typing import Any

import pytest
import torch

import thinktwice_kernels
from thinktwice_fast.cli import doctor, machine, main, self_test
from thinktwice_fast.cli.machine import Fact
from thinktwice_fast.model import csrc
from thinktwice_fast.run import device_memory, plan
from thinktwice_fast.run.options import DryRun

CPU = torch.device("cpu")
ON_GPU = pytest.param(
    "cuda",
    marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")],
)


def asked(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["thinktwice-fast", "doctor", *arguments])
    return main.main()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("device", ["cpu", ON_GPU])
def test_every_op_is_right(device: str, dtype: torch.dtype) -> None:
    results = list(self_test.self_test(torch.device(device), dtype))
    assert [result for result in results if not result.right] == []
    names = {result.name for result in results}
    ops = {name for name in thinktwice_kernels.__all__ if name.islower()} - {"combine_metrics", "loss_count"}
    ops |= {name for name, _ in inspect.getmembers(csrc, inspect.isfunction) if name[0].islower()}
    assert ops - {"list_parts"} <= names  # on a GPU attention begins with it


def test_a_wrong_op_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(gate_up: torch.Tensor) -> torch.Tensor:
        return 1.0001 * thinktwice_kernels.swiglu(gate_up)

    def slope(gate_up: torch.Tensor) -> torch.Tensor:
        y = thinktwice_kernels.swiglu(gate_up)
        return y + 1e-3 * (gate_up[:, : y.shape[1]] - gate_up[:, : y.shape[1]].detach())

    def broken(gate_up: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("no kernel image")

    def lost(gate_up: torch.Tensor) -> torch.Tensor:
        return thinktwice_kernels.swiglu(gate_up) * torch.nan

    (op,) = (op for op in self_test.OPS if op.name == "swiglu")
    monkeypatch.setattr(self_test, "OPS", [replace(op, run=wrong) for wrong in (run, slope, broken, lost)])
    results = list(self_test.self_test(CPU, torch.float32))
    assert [result.right for result in results] == [False] * 4 + [True]
    assert [result.failure for result in results][2:4] == ["no kernel image", ""]


def test_verdict(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr(self_test, "OPS", self_test.OPS[:1])
    assert asked(monkeypatch) == 0
    told = capsys.readouterr().out
    assert told.endswith("\nready\n") and "token_logprobs" in told and torch.__version__ in told

    monkeypatch.setattr(device_memory, "free_bytes", lambda device: 0)
    monkeypatch.setattr(self_test, "_compare", lambda *_: 3.0)
    assert asked(monkeypatch) == 2
    out, err = capsys.readouterr()
    assert "GiB are missing, which others hold now: end them" in out and "token_logprobs" in out
    assert err == "thinktwice-fast: error: not ready: 2 things to mend, see above\n"

    monkeypatch.setattr(machine, "machine_facts", lambda: [Fact("extension", "does not load", "run `make`", True)])
    assert asked(monkeypatch, "--model.path", "absent") == 2
    out, _ = capsys.readouterr()
    assert out.splitlines()[-1] == "- extension does not load: run `make`"


def test_options_of_a_run_that_contradict_each_other(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr(doctor, "_kernel_problems", lambda *_: [])
    assert asked(monkeypatch, "--samples_per_problem", "1") == 2
    assert "- --samples_per_problem must be at least 2" in capsys.readouterr().out


@pytest.mark.parametrize(("free", "missing"), [(3.5e9, False), (0.5e9, True)])
def test_a_cache_that_takes_all_there_is_takes_less_where_less_is_free(
    monkeypatch: pytest.MonkeyPatch, capsys: Any, free: float, missing: bool
) -> None:
    make_plan = plan.make_plan
    monkeypatch.setattr(plan, "make_plan", lambda config, _: make_plan(config, DryRun(4 * 10**9)))
    monkeypatch.setattr(device_memory, "free_bytes", lambda device: int(free))
    monkeypatch.setattr(doctor, "_kernel_problems", lambda *_: [])
    status = asked(monkeypatch, "--rollout.max_sequences", "65536", "--problems_per_step", "8192")
    told = capsys.readouterr().out
    assert status == (2 if missing else 0) and ("GiB are missing, which others hold now" in told) == missing


def test_there_is_memory_to_be_had() -> None:
    assert 0 < device_memory.free_bytes(CPU) <= device_memory.device_bytes(CPU, 1)

"""The rollout benchmarks: what they call wrong, whom they leave out, what they take for the least work of a step."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from packaging.version import Version
from torch import Tensor

from bench import registry
from bench.core.contender import CEILING, OURS, Contender, Outputs
from bench.core.measure import SETTINGS, Record, measure_case
from bench.core.op import Op
from bench.rollout.cases import RolloutBatch, rollout_batch
from bench.rollout.ceiling import step_of
from bench.rollout.contenders import ours
from bench.rollout.rollouts import EXTENDED, OPS, ROLLOUT, WITHOUT_GRAPHS
from bench.rollout.vllm import VLLM

TOY = SETTINGS["toy"]
FP32, BF16 = ROLLOUT.cases["toy"]
HF, EAGER, COMPILED = "transformers generate", "vllm eager", "vllm compiled"


@pytest.fixture(scope="module")
def batch() -> RolloutBatch:
    return rollout_batch(FP32, torch.device("cpu"))


@pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)
def test_all_that_can_run_here_are_right_and_get_times(op: Op) -> None:
    unable = {name for name, contender in op.contenders.items() if contender.unable(torch.device("cpu"))}
    too_old = {"transformers generate_batch"} if Version(transformers.__version__) < Version("5.17") else set()
    assert unable <= {EAGER, COMPILED, WITHOUT_GRAPHS} | too_old
    for case in op.cases["toy"]:
        for name, record in {record.contender: record for record in measure_case(op, case, TOY)}.items():
            if name in unable:
                assert record.status == "not run" and record.reason
                continue
            assert record.status == ("ceiling" if name == CEILING else "ok"), record.reason
            assert record.rate is not None and record.unit == "tokens/s"
            if name != CEILING:
                assert record.rate == pytest.approx(case.shape.tokens / (record.median or 0))


def judged(batch: RolloutBatch, change: Callable[[RolloutBatch, dict[str, Tensor]], Mapping[str, Tensor]]) -> Record:
    """The record of an engine whose results are changed before anybody sees them."""

    def run(asked: RolloutBatch) -> Outputs:
        return change(asked, dict(ours()(asked)))

    op = replace(ROLLOUT, inputs=lambda case, device: batch, contenders={OURS: Contender(run)}, ceiling=None)
    (record,) = measure_case(op, FP32, TOY)
    return record


def test_what_is_not_changed_is_right(batch: RolloutBatch) -> None:
    record = judged(batch, lambda asked, drawn: drawn)
    assert record.status == "ok" and set(record.errors) == {"tokens", "draws", "logps", "greedy"}


def test_a_missing_token_is_wrong(batch: RolloutBatch) -> None:
    def change(asked: RolloutBatch, drawn: dict[str, Tensor]) -> Outputs:
        drawn["tokens"][2, -1] = -1
        return drawn

    record = judged(batch, change)
    assert (record.status, record.reason) == ("wrong", "error of tokens 3.3e-02") and not record.seconds


def test_a_missing_sequence_is_wrong(batch: RolloutBatch) -> None:
    record = judged(batch, lambda asked, drawn: {name: value[1:] for name, value in drawn.items()})
    assert (record.status, record.reason) == ("wrong", "error of tokens inf")


def test_log_probabilities_of_other_tokens_are_wrong(batch: RolloutBatch) -> None:
    record = judged(batch, lambda asked, drawn: drawn | {"logps": drawn["logps"].roll(1, 1)})
    assert record.status == "wrong" and record.reason.startswith("error of logps ")


def test_likeliest_tokens_are_no_drawn_ones(batch: RolloutBatch) -> None:
    greedy = ours()(replace(batch, temperature=0.0))
    record = judged(batch, lambda asked, drawn: greedy)
    assert record.status == "wrong" and "draws" in record.reason


def test_drawn_tokens_are_no_greedy_ones(batch: RolloutBatch) -> None:
    drawn = ours()(batch)
    record = judged(batch, lambda asked, fresh: drawn)
    assert record.status == "wrong" and record.reason.startswith("error of greedy ")


def test_a_cache_that_was_not_extended_is_no_extension(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("thinktwice_fast.rollout.prefix_cache.PrefixCache.continued_by", lambda *arguments: False)
    records = {record.contender: record for record in measure_case(EXTENDED, EXTENDED.cases["toy"][0], TOY)}
    assert records[OURS].reason == "RuntimeError: 0 of 4 caches were extended"
    assert records["prefilled anew"].status == "ok"


def test_a_step_reads_the_weights_once_and_a_groups_prompt_once(batch: RolloutBatch) -> None:
    step, workload = step_of(batch), FP32.shape
    weights = sum(parameter.numel() for parameter in batch.theirs.parameters())  # the head is the embedding
    keys = 3 * 20 + 6 * 5 / 2
    assert step.bytes == 4 * (weights + keys * 2 * 2 * 2 * 16)
    attended = 6 * (20 + 5 / 2)
    assert step.flop == 2 * 6 * weights + attended * 2 * 4 * 4 * 16
    assert step.prompt_flop == 2 * (weights - 200 * 32) * 60 / 5
    assert (workload.sequences, workload.tokens) == (6, 30)


def fake_vllm(folder: Path, lines: str) -> Path:
    """A Python that does not run the worker but these lines; ``asked`` is the worker's first line of JSON."""
    path = folder / "python"
    path.write_text(f"#!/usr/bin/env python3\nimport json, sys\nasked = json.loads(sys.stdin.readline())\n{lines}\n")
    path.chmod(0o755)
    return path


ANSWER = """
print("{}", flush=True)
for line in sys.stdin:
    tokens = [[7] * asked["new_tokens"]] * asked["samples"] * len(asked["prompts"])
    print(json.dumps({"tokens": tokens}), flush=True)
"""


@pytest.mark.parametrize(
    ("lines", "status", "reason"),
    [
        ("sys.exit('no AVX2')", "not run", "RuntimeError: vLLM ended: no AVX2"),
        (ANSWER, "wrong", "error of "),
    ],
)
def test_vllm_is_judged_as_all_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lines: str, status: str, reason: str
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(VLLM, "python", fake_vllm(tmp_path, lines))
    contenders = {name: ROLLOUT.contenders[name] for name in (OURS, EAGER)}
    records = measure_case(replace(ROLLOUT, contenders=contenders), FP32, TOY)
    found = {record.contender: record for record in records}
    assert found[OURS].status == "ok"
    vllm = found[EAGER]
    assert vllm.status == status and vllm.reason.startswith(reason) and not vllm.seconds
    assert (tmp_path / "build/bench/models/toy-float32/model.safetensors").exists()


def test_rollout_targets() -> None:
    def record(contender: str, case: str, to_ours: float) -> dict[str, Any]:
        return Record("rollout", case, contender, "ok", seconds=[1.0], to_ours=to_ours).as_dict()

    records = [
        record(name, case, value)
        for case, values in {
            "default model, short": {OURS: 1, HF: 3.1, EAGER: 0.5},
            "Qwen3-0.6B shape, long": {OURS: 1, HF: 2, EAGER: 1.5, COMPILED: 1.2},
        }.items()
        for name, value in values.items()
    ]
    found = registry.outcomes({"device": "cpu", "results": records})
    assert [(one.met, one.figure) for one in found if one.name.startswith("rollout")] == [
        (True, "3.1 (default model, short)"),
        (False, "2 (Qwen3-0.6B shape, long)"),
        (True, "1.2 (Qwen3-0.6B shape, long)"),
    ]

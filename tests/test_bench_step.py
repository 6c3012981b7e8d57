"""The step and update benchmarks: what they call a wrong step, and that toy sizes run end to end."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from transformers import AutoConfig, AutoModelForCausalLM

from bench import registry
from bench.core.contender import CEILING, OURS, Contender
from bench.core.measure import SETTINGS, Record, measure_case
from bench.core.op import Op
from bench.models import Workload
from bench.step import truth
from bench.step.cases import StepBatch, flop_of, step_batch
from bench.step.desk import LEARNING_RATE, Ask
from bench.step.process import PARTS, UPDATE_RATE, StepProcess, Trained
from bench.step.steps import STEP, TRL
from bench.step.truth import Done, Sample
from bench.update import OPS as UPDATES
from tests.command import quick_start

TOY = SETTINGS["toy"]
(CASE,) = STEP.cases["toy"]


@pytest.fixture(scope="module")
def batch() -> StepBatch:
    return step_batch(CASE, torch.device("cpu"))


@pytest.fixture(autouse=True)
def quick_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHON_EXEC", quick_start()[0])


@pytest.fixture(scope="module", autouse=True)
def no_process_group_left() -> Iterator[None]:
    """An update benchmark leaves it to the end of the suite."""
    yield
    if dist.is_initialized():
        dist.destroy_process_group()


def measured(op: Op, contenders: Mapping[str, Contender]) -> dict[str, Record]:
    case = op.cases["toy"][0]
    return {record.contender: record for record in measure_case(replace(op, contenders=contenders), case, TOY)}


def test_both_trainers_do_the_step_they_are_asked_for() -> None:
    records = measured(STEP, STEP.contenders)
    workload = CASE.shape
    for name in (OURS, TRL):
        record = records[name]
        assert record.status == "ok", record.reason
        assert set(record.errors) == {"completions", "tokens", "loss", "grad_norm", "weights"}
        assert len(record.seconds) >= TOY.rounds[0] and record.memory is not None and record.memory > 100e6
        parts = [record.details[f"{part} s"] for part in PARTS]
        assert all(part >= 0 for part in parts)
        assert record.details["generations/s"] == pytest.approx(workload.sequences / sum(parts), rel=0.5)
        assert sum(parts) <= max(record.seconds)  # measured by the trainer, and from outside
    assert records["TRL with Liger"].reason == "runs on cuda only"
    assert records[CEILING].of_ceiling == pytest.approx(1)


def test_two_processes_and_a_refine_step_are_right() -> None:
    contenders = {
        OURS: Contender(Trained(processes=2, threads=1)),
        "refine": Contender(Trained(phase="refine", threads=1)),
    }
    for record in measured(STEP, contenders).values():
        assert record.status in ("ok", "ceiling"), record.reason


def test_a_step_of_another_size_and_of_another_loss_is_wrong() -> None:
    other = ("update.learning_rate", 1.2 * LEARNING_RATE), ("loss.loss_agg_mode", "seq-mean-token-sum")
    record = measured(STEP, {OURS: Contender(Trained(options=other, threads=1))})[OURS]
    assert record.status == "wrong" and not record.seconds
    assert record.errors["weights"] == pytest.approx(0.2, abs=0.01)
    assert record.errors["grad_norm"] == pytest.approx(4, abs=0.1)  # five tokens a response


class Worker:
    """Answers as a process does that draws ``completions`` of 5 tokens."""

    def __init__(self, completions: int):
        self.completions = completions

    def tell(self, question: object) -> None:
        pass

    def hear(self) -> dict[str, float]:
        return {"completions": self.completions, "tokens": 5 * self.completions}


def test_a_timed_step_that_draws_too_little_is_no_step(batch: StepBatch) -> None:
    trained = Trained()
    workers: Any = [Worker(8)]
    asked = replace(batch, kept={trained: StepProcess(workers)})
    assert trained(asked) == {}
    workers[0].completions = 7
    with pytest.raises(RuntimeError, match=r"7 completions of 35 tokens, not \(8, 40\)"):
        trained(asked)


def test_a_process_that_ends_is_a_reason() -> None:
    record = measured(STEP, {"other": Contender(Trained(options=(("update.no_such_option", 1),)))})["other"]
    assert (record.status, record.reason) == (
        "not run",
        "RuntimeError: ours ended: AssertionError: update.no_such_option",
    )


@pytest.fixture(scope="module")
def ask(batch: StepBatch) -> Ask:
    return Ask("ours", batch.workload, str(batch.folder), str(batch.problems), cuda=False, phase="solve", options={})


@pytest.fixture(scope="module")
def done(ask: Ask) -> Done:
    """A step by another way than the judge's: one sequence at a time, the gradient of the mean written out."""
    model: Any = AutoModelForCausalLM.from_pretrained(ask.folder, dtype=torch.float32)
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    numbers = torch.Generator().manual_seed(0)
    samples, workload = [], ask.workload
    for number in range(workload.sequences):
        group = number // workload.samples
        prompt = tuple(range(10 * group, 10 * group + 6))
        response = tuple(torch.randint(200, (workload.new_tokens,), generator=numbers).tolist())
        samples.append(Sample(group, prompt, response, float(number % 2)))
    total = torch.zeros(())
    for sample in samples:
        ids = torch.tensor([[*sample.prompt, *sample.response]])
        table = model(input_ids=ids).logits[0].log_softmax(1)
        chosen = table[range(5, 5 + workload.new_tokens), list(sample.response)]
        total = total - (sample.reward - 0.5) * (chosen - chosen.detach()).exp().sum() / 40
    total.backward()
    norm = float(torch.cat([p.grad.flatten() for p in model.parameters()]).norm())
    torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.0).step()
    after = {name: value.detach() for name, value in model.named_parameters()}
    return Done(samples, float(total.detach()), norm, before, after)


def test_a_right_step_is_right(ask: Ask, done: Done) -> None:
    found = truth.errors(ask, done)
    limits = truth.limits(torch.float32)
    assert set(found) == set(limits) and all(found[name] <= limits[name] for name in found), found


@pytest.mark.parametrize(
    ("change", "name", "error"),
    [
        (lambda done: replace(done, samples=done.samples[1:]), "completions", 1 / 8),
        (lambda done: replace(done, samples=[*done.samples[:-1], cut(done.samples[-1])]), "tokens", 1 / 40),
        (lambda done: replace(done, grad_norm=1.01 * done.grad_norm), "grad_norm", 0.01),
        (lambda done: replace(done, loss=done.loss + 0.01), "loss", 0.02),
        (lambda done: replace(done, after=done.before), "weights", 1),
        (lambda done: replace(done, samples=[swapped(sample) for sample in done.samples]), "weights", 2),
    ],
)
def test_a_wrong_step_is_wrong(ask: Ask, done: Done, change: Callable[[Done], Done], name: str, error: float) -> None:
    found = truth.errors(ask, change(done))
    assert found[name] == pytest.approx(error, rel=1e-2)
    assert found[name] > truth.limits(torch.float32)[name]


def cut(sample: Sample) -> Sample:
    return replace(sample, response=sample.response[:-1])


def swapped(sample: Sample) -> Sample:
    return replace(sample, reward=1 - sample.reward)


def test_the_least_work_of_a_step(batch: StepBatch) -> None:
    config = AutoConfig.from_pretrained(batch.folder)
    workload = Workload("toy", prompts=2, samples=4, new_tokens=5, prompt_tokens=20)
    flop = flop_of(workload, config, 20)
    model: Any = AutoModelForCausalLM.from_pretrained(batch.folder)
    matrices = sum(p.numel() for name, p in model.named_parameters() if "proj" in name)
    tokens, new = 2 * 20 + 8 * 5, 8 * 5
    pairs = 2 * 20 * 20 / 2 + 8 * 5 * (20 + 5 / 2)
    forward = 2 * (matrices * tokens + 200 * 32 * new) + 4 * 2 * 4 * 16 * pairs
    assert (flop.rollout, flop.update) == (forward, 3 * forward)


@pytest.mark.parametrize("op", UPDATES, ids=lambda op: op.name)
def test_every_way_to_update_gives_one_gradient(op: Op) -> None:
    for record in measured(op, op.contenders).values():
        assert record.status == "ok" and record.seconds, record.reason
        assert max(record.errors.values()) < 1e-5


def test_an_update_with_another_gradient_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    from thinktwice_fast.update import updater

    right = updater.linear_grpo_loss

    def off(*arguments: Any, **options: Any) -> Any:
        loss, metrics = right(*arguments, **options)
        return 1.001 * loss, metrics

    monkeypatch.setattr(updater, "linear_grpo_loss", off)
    records = measured(UPDATES[2], UPDATES[2].contenders)
    assert records[OURS].status == "wrong" and "gradient" in records[OURS].reason
    assert records["log-probabilities, then the loss"].status == "ok"


def test_step_targets() -> None:
    def record(op: str, case: str, contender: str, to_ours: float, **rest: Any) -> dict[str, Any]:
        return Record(op, case, contender, "ok", seconds=[1.0], to_ours=to_ours, **rest).as_dict()

    records = [
        record(op, case, name, to_ours, memory=memory)
        for op, case, name, to_ours, memory in (
            ("step", "default model, short", OURS, 1, 7),
            ("step", "default model, short", TRL, 2.5, 7),
            ("step", "100 M shape, short", OURS, 1, 11),
            ("step", "100 M shape, short", TRL, 4, 10),
            ("step of the default job", "default model, graded", OURS, 1, 7),
            ("step of the default job", "default model, graded", TRL, 2, 7),
        )
    ]
    found = registry.outcomes({"device": "cpu", "results": records})
    assert [(one.met, one.figure.split()[0]) for one in found if one.name.startswith("step")] == [
        (True, "0.4"),
        (True, "0.25"),
        (False, "1.1"),
        (False, "0.5"),
    ]


def test_the_updates_share_of_the_products() -> None:
    ours = {"rate": 2.0, "of_ceiling": 0.1, "details": {UPDATE_RATE: 8.0}}
    rows = [
        Record("step", "Qwen3-1.7B shape, long", OURS, "ok", seconds=[1.0], to_ours=1.0, **ours),  # type: ignore[arg-type]
        Record("step", "Qwen3-1.7B shape, long", TRL, "ok", seconds=[1.0], to_ours=4.5),
    ]
    found = registry.outcomes({"device": "cuda", "results": [row.as_dict() for row in rows]})
    assert [(one.met, one.figure.split()[0]) for one in found if one.name.startswith("step")] == [
        (True, "4.5"),
        (True, "0.4"),
    ]

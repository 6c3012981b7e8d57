"""``--dry-run``: everything checked that can be without weights, the plan of a step, and the memory it will take."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from copy import deepcopy
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path
from typing import Any

import torch

from thinktwice_fast import launch
from thinktwice_fast.algorithms.registry import METHODS
from thinktwice_fast.config import Config
from thinktwice_fast.errors import UserError
from thinktwice_fast.model.flops import Flops
from thinktwice_fast.model.loading import outline_model
from thinktwice_fast.rollout.engine import BLOCK_SIZE
from thinktwice_fast.rollout.runner import planned_runner
from thinktwice_fast.run.build import Prepared, prepare
from thinktwice_fast.run.checkpoint import read_state
from thinktwice_fast.run.device_memory import device_bytes
from thinktwice_fast.run.memory import Load, Prediction, Shape, checkpoint_bytes, predict
from thinktwice_fast.run.options import DryRun
from thinktwice_fast.run.report import aligned
from thinktwice_fast.run.teacher import TeacherPlan
from thinktwice_fast.run.workload import Phase, heaviest_load, phases

_RUNNERS = {
    "exact": "the model's modules with exact products",
    "decoder": "the decoder in C++",
    "modules": "the model's modules over the paged cache",
    "gpu": "the model's modules over the paged cache, decoding steps as CUDA graphs",
}
_LEAST_TOKENS = 256  # that micro-batches or passes are lowered to
_MIB = 1 << 20


@dataclass(frozen=True)
class Plan:
    """What a run is going to do, and take."""

    notes: list[str]
    rows: list[tuple[str, str]]  # what, and how
    config: Config
    memory: Prediction  # of each process
    predicted: Callable[[Config, int], Prediction]  # the same with other options and so many bytes of room
    device: torch.device
    room: int  # bytes that a process may have of it


def make_plan(config: Config, dry_run: DryRun) -> Plan:
    """The plan of a run whose options are checked already. Writes nothing.

    Args:
        config: of the run.
        dry_run: which device it is planned for.

    Raises:
        UserError: problems, reward, tokenizer or model config that a run would refuse.
    """
    world = launch.env_world_size()
    if config.resume not in (None, "auto"):
        read_state(Path(config.resume))
    pretended = dry_run.gpu_bytes is not None
    device = torch.device("cuda", launch.env_local_rank()) if pretended else None
    with ExitStack() as resources:
        ready = prepare(config, resources, lambda _: outline_model(config.model), device)
    model = ready.loaded.model
    flops = Flops.of(model)

    def workload(options: Config) -> tuple[list[Phase], Load]:
        planned = phases(options, flops, ready.longest_prompts, world)
        return planned, heaviest_load(
            options, planned, ready.longest_prompts, ready.evaluated, world, ready.teacher_load
        )

    def taken(options: Config, load: Load, room: int) -> Prediction:
        return predict(
            options, model, ready.device, ready.dtype, load, world, ready.held_bytes, room, ready.second,
            lends=ready.lends,
        )  # fmt: skip

    room = dry_run.gpu_bytes or device_bytes(ready.device, launch.env_local_world_size())
    planned, load = workload(config)
    memory = taken(config, load, room)
    rows = [*_run_rows(config, ready, load, memory, world), *((p.name, _phase_text(config, p)) for p in planned)]

    def predicted(options: Config, room: int) -> Prediction:
        return taken(options, workload(options)[1], room)

    return Plan(ready.notes, rows, config, memory, predicted, ready.device, room)


def print_plan(config: Config, dry_run: DryRun) -> None:
    """Make the plan, in every process, and print it, on rank 0.

    Args:
        config, dry_run: as of ``make_plan``.

    Raises:
        UserError: as ``make_plan``, or it would take more memory than there is.
    """
    plan = make_plan(config, dry_run)
    memory, there = plan.memory, "a process may have" if plan.device.type == "cpu" else "the GPU has"
    verdict = f"predicted peak {_mib(memory.peak)} MiB, in the {memory.peak_phase} phase; {there} {_mib(plan.room)} MiB"
    fits = memory.peak <= plan.room
    text = [
        "dry run: nothing was computed or written; what only the weights can tell is not checked",
        *plan.notes,
        aligned(plan.rows),
        memory_table(memory, plan.room, there),
        *([f"{verdict}: it fits, with {1 - memory.peak / plan.room:.0%} to spare"] if fits else []),
    ]
    if launch.env_rank() == 0:
        print("\n\n".join(text), flush=True)
    if not fits:
        raise UserError(f"{verdict}: it does not fit: {less_memory(plan, plan.room)}")


def memory_table(memory: Prediction, room: int, there: str) -> str:
    """The parts of a prediction in MiB, by phase, and their sums, above the ``room`` that is ``there``."""
    rows: list[tuple[str, ...]] = [("memory per process, MiB", "rollout", "update")]
    rows += [(f"  {part.name}", _mib(part.rollout), _mib(part.update)) for part in memory.parts]
    rows.append(("  KV cache", _mib(memory.cache_bytes), _mib(memory.cache_update)))
    rows.append(("  total", _mib(memory.rollout), _mib(memory.update)))
    rows.append((f"  {there}", *(_mib(room),) * 2))
    return aligned(rows, numbers=True)


def less_memory(plan: Plan, room: int) -> str:
    """What would make a plan fit that takes more than ``room`` bytes: each of some options alone, or all of them."""

    def fits(config: Config) -> bool:
        return _peak(plan, config, room) <= room

    alone, together, config = [], [], plan.config
    for name, values in _savings(config):
        if fits(_changed(plan.config, name, values[-1])):
            found = next(value for value in values if fits(_changed(plan.config, name, value)))
            alone.append(_option(name, found))
        smallest = _changed(config, name, values[-1])
        # Together: those that still save something on top of the others.
        if not alone and not fits(config) and _peak(plan, smallest, room) < _peak(plan, config, room):
            config = smallest
            together.append(_option(name, values[-1]))
    if alone:
        return f"give {' or '.join(alone)}, or use more processes or a smaller model"
    if fits(config):
        return f"give {' and '.join(together)}, or use more processes or a smaller model"
    return "no batch size or cache would make it fit: use more processes, a larger GPU or a smaller model"


def _peak(plan: Plan, config: Config, room: int) -> int:
    return plan.predicted(config, room).peak


def _savings(config: Config) -> Iterator[tuple[str, list[Any]]]:
    """Options that take memory without changing what is learned, with values that take less and less."""
    yield "update.microbatch_tokens", _halves(config.update.microbatch_tokens)
    if not config.model.activation_checkpointing:
        yield "model.activation_checkpointing", [True]
    if config.rollout.cache_tokens:
        yield "rollout.cache_tokens", [0]
    yield "rollout.max_batch_tokens", _halves(config.rollout.max_batch_tokens)
    yield "rollout.max_sequences", _halves(config.rollout.max_sequences, 1)


def _halves(number: int, least: int = _LEAST_TOKENS) -> list[int]:
    """A half of it, of that, and so on; itself where that would be below the least."""
    halves = []
    while number // 2 >= least:
        number //= 2
        halves.append(number)
    return halves or [number]


def _changed(config: Config, name: str, value: Any) -> Config:
    changed = deepcopy(config)
    section, _, option = name.rpartition(".")
    setattr(attrgetter(section)(changed), option, value)
    return changed


def _option(name: str, value: Any) -> str:
    return f"--{name} {str(value).lower()}"


def _run_rows(config: Config, ready: Prepared, load: Load, memory: Prediction, world: int) -> Iterator[tuple[str, str]]:
    model = ready.loaded.model
    shape = Shape.of(model, config.model)
    kind = str(ready.dtype).removeprefix("torch.")
    yield (
        "model",
        f"{type(model).__name__}, {_count(shape.parameters)} parameters ({_count(shape.trained)} trained), "
        f"{kind} on {ready.device.type}",
    )
    shards = config.update.shard_processes or world
    yield "processes", f"{world}, each with 1/{shards} of weights and optimizer" if world > 1 else "1"
    if config.run.save:
        copied = checkpoint_bytes(config, shape, ready.dtype, world)
        yield "checkpoints", f"each waits for the disk as {_mib(copied)} MiB of main memory per process"
    many = "endless" if ready.usable is None else f"{ready.usable:,} usable problems"
    yield "problems", f"{config.data.source}: {many}"
    for name, problems in ready.evaluation_sets.items():
        yield "evaluation", f"{name}: {len(problems):,} problems x {config.eval.samples}"
    if METHODS[config.algorithm].samples or ready.evaluation_sets:
        runner = planned_runner(model, config.rollout, ready.device, ready.dtype)
        yield "rollouts", f"{_RUNNERS[runner]}; at most {config.rollout.max_sequences:,} sequences at once"
        lent = "; updates have its memory in between" if memory.lends else ""
        yield "KV cache", _cache_text(load.needed_blocks * BLOCK_SIZE, memory.cache_tokens) + lent
    if ready.teacher is not None:
        yield "teacher", _teacher_text(ready.teacher)


def _teacher_text(teacher: TeacherPlan) -> str:
    text = teacher.kind
    if teacher.load is not None:
        load = teacher.load
        text += (
            f"; per process up to {_many(load.requests, 'request')} a step, prompts of up to {load.prompt_tokens} "
            f"tokens ({load.shared_tokens} of them computed once), answers of up to {load.answer_tokens}"
        )
    return text


def _cache_text(needed: int, tokens: int) -> str:
    text = f"{tokens:,} tokens; those that are there together take up to {needed:,}"
    return text if needed <= tokens else f"{text}: some will wait, or start over"


def _phase_text(config: Config, phase: Phase) -> str:
    sequences = phase.prompts * phase.samples
    drawn = f"{sequences} examples"
    if phase.name != "sft":
        drawn = f"{phase.prompts} x {phase.samples} = {sequences} responses"
    text = (
        f"per process {drawn}, prompts of up to {phase.prompt_tokens} tokens, responses of up to "
        f"{phase.response_tokens}"
    )
    if not phase.optimizer_steps:
        return text
    recomputed = ", layers recomputed" if config.model.activation_checkpointing else ""
    return (
        f"{text}; {_many(phase.optimizer_steps, 'optimizer step')} of {_many(phase.rows, 'micro-batch', 'es')} (of up "
        f"to {phase.row_tokens:,} tokens){recomputed}"
    )


def _many(count: int, what: str, ending: str = "s") -> str:
    return f"{count} {what}{ending if count != 1 else ''}"


def _count(number: int) -> str:
    return f"{number / 1e9:.2f} billion" if number >= 1e9 else f"{number / 1e6:.1f} million"


def _mib(size: int) -> str:
    return f"{size / _MIB:,.0f}"

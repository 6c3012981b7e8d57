"""``--dry-run``: everything checked that can be without weights, the plan of a step, and the memory it will take."""

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch

from thinktwice_fast import launch
from thinktwice_fast.algorithms.registry import METHODS
from thinktwice_fast.config import Config
from thinktwice_fast.model.flops import Flops
from thinktwice_fast.model.loading import outline_model
from thinktwice_fast.rollout.engine import BLOCK_SIZE
from thinktwice_fast.rollout.runner import planned_runner
from thinktwice_fast.run.build import Prepared, prepare
from thinktwice_fast.run.checkpoint import read_state
from thinktwice_fast.run.memory import Load, Prediction, Shape, checkpoint_bytes, device_bytes, predict
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
LESS_MEMORY = (
    "lower --update.microbatch_tokens or --rollout.cache_tokens, set --model.activation_checkpointing true, or use "
    "more processes or a smaller model"
)
_MIB = 1 << 20


@dataclass(frozen=True)
class Plan:
    """What a run is going to do, and take."""

    notes: list[str]
    rows: list[tuple[str, str]]  # what, and how
    memory: Prediction  # of each process
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
    planned = phases(config, Flops.of(model), ready.longest_prompts, world)
    load = heaviest_load(config, planned, ready.longest_prompts, ready.evaluated, world, ready.teacher_load)
    room = dry_run.gpu_bytes or device_bytes(ready.device, launch.env_local_world_size())
    memory = predict(config, model, ready.device, ready.dtype, load, world, ready.held_bytes, room, ready.second)
    rows = [*_run_rows(config, ready, load, memory, world), *((p.name, _phase_text(config, p)) for p in planned)]
    return Plan(ready.notes, rows, memory, ready.device, room)


def print_plan(config: Config, dry_run: DryRun) -> None:
    """Make the plan, in every process, and print it, on rank 0. Arguments and errors as of ``make_plan``."""
    plan = make_plan(config, dry_run)
    text = [
        "dry run: nothing was computed or written; what only the weights can tell is not checked",
        *plan.notes,
        aligned(plan.rows),
        memory_table(plan.memory),
        _verdict(plan.memory, plan.room, "a process may have" if plan.device.type == "cpu" else "the GPU has"),
    ]
    if launch.env_rank() == 0:
        print("\n\n".join(text), flush=True)


def memory_table(memory: Prediction) -> str:
    """The parts of a prediction in MiB, by phase, and their sums."""
    rows: list[tuple[str, ...]] = [("memory per process, MiB", "rollout", "update")]
    rows += [(f"  {part.name}", _mib(part.rollout), _mib(part.update)) for part in memory.parts]
    rows.append(("  KV cache", *(_mib(memory.cache_bytes),) * 2))
    rows.append(("  total", _mib(memory.rollout), _mib(memory.update)))
    return aligned(rows, numbers=True)


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
        yield "KV cache", _cache_text(load.needed_blocks * BLOCK_SIZE, memory.cache_tokens)
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


def _verdict(memory: Prediction, room: int, there: str) -> str:
    phase = "update" if memory.update >= memory.rollout else "rollout"
    text = f"predicted peak {_mib(memory.peak)} MiB, in the {phase} phase; {there} {_mib(room)} MiB: "
    if memory.peak <= room:
        return text + f"it fits, with {1 - memory.peak / room:.0%} to spare"
    return text + f"IT DOES NOT FIT: {LESS_MEMORY}"


def _many(count: int, what: str, ending: str = "s") -> str:
    return f"{count} {what}{ending if count != 1 else ''}"


def _count(number: int) -> str:
    return f"{number / 1e9:.2f} billion" if number >= 1e9 else f"{number / 1e6:.1f} million"


def _mib(size: int) -> str:
    return f"{size / _MIB:,.0f}"

"""The command ``thinktwice-fast doctor``: what of this machine a run will use, whether it works, whether it fits."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from thinktwice_fast.cli.command import PROGRAM, Command
from thinktwice_fast.config import Config
from thinktwice_fast.errors import UserError

if TYPE_CHECKING:
    import torch
    from rich.console import Console

    from thinktwice_fast.cli.self_test import Result
    from thinktwice_fast.run.plan import Plan

_DESCRIPTION = """Say what of this machine a run will use, compare every kernel with its definition, and see whether
there is memory for the run that the options describe (those of train.py). Exit status 0 if all is well, else 2."""
_GIB = 1 << 30


def run(config: Config) -> None:
    """Print what was found, and a verdict.

    Raises:
        UserError: something is in the way; all of it was printed, with remedies.
    """
    # Imported here because it takes seconds, and a misspelt option should not wait for it.
    from rich.console import Console

    from thinktwice_fast import launch
    from thinktwice_fast.cli.machine import machine_facts

    console = Console(quiet=launch.env_rank() > 0, highlight=False)
    facts = list(machine_facts())
    _show(console, "this machine", [(fact.what, fact.found, fact.advice) for fact in facts])
    problems = [f"{fact.what} {fact.found}: {fact.advice}" for fact in facts if fact.broken]
    if not problems:  # what stands on all of that
        problems += _memory_problems(config, console)
        problems += _kernel_problems(config, console)
    if problems:
        for problem in problems:
            console.print(f"- {problem}", markup=False, soft_wrap=True)
        raise UserError(f"not ready: {len(problems)} thing{'s' if len(problems) > 1 else ''} to mend, see above")
    slow = [fact for fact in facts if fact.advice]
    console.print("ready" + (f"; {len(slow)} thing{'s' if len(slow) > 1 else ''} could be better" if slow else ""))


def _memory_problems(config: Config, console: "Console") -> list[str]:
    from thinktwice_fast import launch
    from thinktwice_fast.run.checks import check_config, check_files
    from thinktwice_fast.run.device_memory import free_bytes
    from thinktwice_fast.run.options import DryRun
    from thinktwice_fast.run.plan import less_memory, make_plan

    try:
        check_files(config)
        check_config(config, launch.env_world_size())
        plan = make_plan(config, DryRun(None))
    except UserError as error:
        return [str(error)]
    free = free_bytes(plan.device)
    if plan.device.type == "cpu":
        free //= launch.env_local_world_size()
    rows = [*_needs(plan), ("free now", f"{free / _GIB:.2f} GiB of {plan.room / _GIB:.2f}", "")]
    _show(console, "memory of a process", rows)
    needed = plan.predicted(config, free).peak  # with a cache that takes what is free, where it takes all there is
    if needed <= free:
        return []
    missing = f"memory: {(needed - free) / _GIB:.2f} GiB are missing"
    if plan.memory.peak <= plan.room:
        return [f"{missing}, which others hold now: end them, or {less_memory(plan, free)}"]
    return [f"{missing}: {less_memory(plan, plan.room)} (--dry-run shows every part)"]


def _needs(plan: "Plan") -> list[tuple[str, str, str]]:
    memory = plan.memory
    return [
        ("rollout", f"{memory.rollout / _GIB:.2f} GiB", f"KV cache {memory.cache_bytes / _GIB:.2f} GiB of it"),
        ("update", f"{memory.update / _GIB:.2f} GiB", ""),
    ]


def _kernel_problems(config: Config, console: "Console") -> list[str]:
    import torch

    from thinktwice_fast import launch
    from thinktwice_fast.cli.self_test import self_test
    from thinktwice_fast.model.loading import pick_dtype

    devices, own = [torch.device("cpu")], launch.env_local_rank()
    if config.model.device != "cpu" and own < torch.cuda.device_count():
        devices.append(torch.device("cuda", own))
    problems = []
    for device in devices:
        dtype = pick_dtype(config.model, device)
        results = list(self_test(device, dtype))
        where = f"{device.type}, {str(dtype).removeprefix('torch.')}"
        _show(console, f"kernels on {where}", [_told(result) for result in results])
        wrong = [result.name for result in results if not result.right]
        if wrong:
            problems.append(f"kernels on {where}: {', '.join(wrong)}: {_remedy(device)}")
    return problems


def _told(result: "Result") -> tuple[str, str, str]:
    took = f"{result.seconds:.2f} s"
    if result.right:
        return result.name, "right", f"{result.error:.0%} of the error that it may have, {took}"
    return result.name, "WRONG", result.failure or f"{result.error:.3g} times the error that it may have, {took}"


def _remedy(device: "torch.device") -> str:
    built = "build the extensions again with `make clean setup`"
    return built if device.type == "cpu" else f"{built}; else look at driver and Triton, or use --model.device cpu"


def _show(console: "Console", title: str, rows: Iterable[tuple[str, str, str]]) -> None:
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, padding=(0, 2, 0, 0), show_header=False, title=title, title_justify="left")
    table.add_column(no_wrap=True)
    for row in rows:
        table.add_row(*map(Text, row))
    console.print(table)
    console.print()


@dataclass(frozen=True)
class _Doctor(Command):
    """Its options are training's."""

    def option_names(self) -> None:
        return None

    def parse(self, name: str, arguments: list[str]) -> Any:
        from thinktwice_fast.run.options import parse_config

        return parse_config(arguments, f"{PROGRAM} {name}", self.description)


COMMAND = _Doctor(
    help="say what of this machine a run will use, test every kernel, compare memory with need",
    description=_DESCRIPTION,
    options=Config,
    run=run,
)

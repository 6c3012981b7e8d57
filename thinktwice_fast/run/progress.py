"""What a run shows while it works: a live display on a terminal, plain lines elsewhere."""

import time
from collections import deque
from typing import Self, TextIO

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from thinktwice_fast.run.metrics import SAMPLED, TRAINED, Record

LINE_STEPS = 10
LINE_SECONDS = 10.0
RATE_STEPS = 50  # steps that the remaining time is judged by


def clock(seconds: float) -> str:
    """A duration as h:mm:ss."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}"


class Progress:
    """Shows how a run goes; a context manager.

    Args:
        total_steps: Global steps of the whole run.
        first_step: Global step that this session starts after: 0, or the step of the checkpoint.
        stream: Where to write: a terminal gets a display that is redrawn at each update, anything else a line at
            every tenth step, or when the last one is 10 seconds old. None writes nothing, for every process but rank 0.
    """

    def __init__(self, total_steps: int, first_step: int, stream: TextIO | None) -> None:
        self._total = total_steps
        self._step = first_step
        self._phase = ""
        self._latest: Record = {}
        self._arrivals: deque[tuple[float, int]] = deque([(time.monotonic(), first_step)], maxlen=RATE_STEPS + 1)
        self._evaluation = ""
        self._stream = stream
        self._last_line: float | None = None
        self._live: Live | None = None
        if stream is not None and stream.isatty():
            console = Console(file=stream)
            if console.is_interactive:  # a dumb terminal cannot be redrawn
                # Redrawn by update() alone: a refresh thread would take time from a small run, and a grader process
                # forked while it holds a lock would hang.
                self._live = Live(console=console, auto_refresh=False)

    def update(self, record: Record) -> None:
        """Take in one record of ``metrics.jsonl``, and show it where it is time to."""
        self._latest.update(record)
        if record["phase"] == "eval":
            self._show_evaluation(record)
        elif record["phase"] in TRAINED:
            self._step, self._phase = record["step"], record["phase"]
            self._arrivals.append((time.monotonic(), self._step))
            self._show_step()

    def message(self, text: str) -> None:
        """Write one line, above the display where there is one."""
        if self._live is not None:
            self._live.console.print(text, markup=False, highlight=False)
        elif self._stream is not None:
            try:
                print(text, file=self._stream, flush=True)
            except BrokenPipeError:
                self._stream = None  # nobody reads any more (`| head`): no reason to stop training

    def _show_evaluation(self, record: Record) -> None:
        if len(self._arrivals) == 1:
            # An evaluation before the first step is no part of a step's time.
            self._arrivals[0] = (time.monotonic(), self._arrivals[0][1])
        self._evaluation = f"evaluation at step {record['step']}: {_accuracies(record)}"
        if self._live is not None:
            self._live.update(self._display(), refresh=True)
        else:
            self.message(self._evaluation)

    def _show_step(self) -> None:
        if self._live is not None:
            self._live.update(self._display(), refresh=True)
            return
        now = time.monotonic()
        late = self._last_line is None or now - self._last_line >= LINE_SECONDS
        if late or self._step % LINE_STEPS == 0 or self._step >= self._total:
            self._last_line = now
            self.message(self._line())

    def _time_left(self) -> str:
        (start, first), (now, last) = self._arrivals[0], self._arrivals[-1]
        if last <= first:
            return "?"
        return clock((now - start) / (last - first) * max(0, self._total - last))

    def _line(self) -> str:
        parts = [f"step {self._step}/{self._total} {self._phase}"]
        if self._phase == "sft":
            parts.append(f"loss {self._number('sft/loss', '.3f')}")
            parts.append(f"token accuracy {self._number('sft/token_accuracy', '.3f')}")
        else:
            rewards = [f"{phase} {self._number(f'{phase}/reward', '.3f')}" for phase in self._sampled()]
            parts.append(f"reward {', '.join(rewards)}")
            drawn = SAMPLED if self._phase == "pair" else (self._phase,)
            lengths = [self._number(f"{phase}/response_tokens", ".0f") for phase in drawn]
            parts.append(f"{', '.join(lengths)} tokens a response")
            parts.append(f"{self._number(f'{self._phase}/tokens_per_second', ',.0f')} tokens/s")
        parts.append(f"{self._time_left()} left")
        return " | ".join(parts)

    def _display(self) -> RenderableType:
        head = Table.grid(padding=(0, 2))
        head.add_row(
            Text(f"step {self._step}/{self._total}", style="bold"),
            self._phase,
            ProgressBar(
                total=self._total, completed=self._step, width=30, complete_style="cyan", finished_style="green"
            ),
            f"{self._time_left()} left",
        )
        body = self._sft_table() if self._phase == "sft" else self._reward_table()
        return Group(head, body, Text(self._evaluation))

    def _reward_table(self) -> Table:
        table = _numbers_table("", "reward", "with signal", "tokens a response", "cut off", "tokens/s")
        for phase in (*self._sampled(), "pair") if self._phase == "pair" else self._sampled():
            table.add_row(
                phase,
                self._number(f"{phase}/reward", ".3f"),
                self._number(f"{phase}/group_signal_rate", ".0%"),
                self._number(f"{phase}/response_tokens", ".0f"),
                self._number(f"{phase}/truncation_rate", ".1%"),
                self._number(f"{phase}/tokens_per_second", ",.0f"),
                style="bold" if phase == self._phase else "",
            )
        return table

    def _sft_table(self) -> Table:
        table = _numbers_table("", "loss", "token accuracy")
        table.add_row("sft", self._number("sft/loss", ".3f"), self._number("sft/token_accuracy", ".3f"))
        return table

    def _sampled(self) -> list[str]:
        """Phases that have been sampled so far."""
        return [phase for phase in SAMPLED if f"{phase}/response_tokens" in self._latest]

    def _number(self, name: str, form: str) -> str:
        value = self._latest.get(name)
        return "-" if value is None else format(value, form)

    def __enter__(self) -> Self:
        if self._live is not None:
            self._live.update(self._display())
            self._live.start(refresh=True)
        return self

    def __exit__(self, *error: object) -> None:
        if self._live is not None:
            self._live.stop()


def _numbers_table(*columns: str) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0))
    for number, column in enumerate(columns):
        table.add_column(column, justify="left" if number == 0 else "right")
    return table


def _accuracies(record: Record) -> str:
    """``"held_out 0.412, refined 0.755; ..."`` of an evaluation's record."""
    parts = []
    for name, value in record.items():
        prefix, _, metric = name.rpartition("/")
        if metric == "solve_accuracy" and value is not None:
            refined = record.get(f"{prefix}/refine_accuracy")
            parts.append(
                f"{prefix.removeprefix('eval/')} {value:.3f}" + ("" if refined is None else f", refined {refined:.3f}")
            )
    return "; ".join(parts)

"""How far an evaluation is: a bar on a terminal, a line now and then elsewhere, both on stderr."""

import sys
import time
from contextlib import suppress
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
from rich.progress import Progress as Bar

from thinktwice_fast.run.progress import clock

_BAR_SECONDS, _LINE_SECONDS = 0.2, 10.0


class Progress:
    """Of this process's share of the work; a context manager.

    Args:
        shown: False shows nothing, for every process but the first.
    """

    def __init__(self, shown: bool):
        self.total = 0  # responses
        self._shown = shown
        self._done = self._skipped = 0
        self._began: float | None = None  # when the first response was waited for
        self._next = 0.0
        self._bar: Bar | None = None
        if shown and sys.stderr.isatty():
            columns = (
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[left]} left"),
            )
            # No thread redraws it: it would take time from what is measured.
            self._bar = Bar(*columns, console=Console(stderr=True), auto_refresh=False, transient=True)
            self._task = self._bar.add_task("responses", total=None, left="?")

    def message(self, text: str) -> None:
        """Show a line."""
        if self._bar is not None:
            self._bar.console.print(text, markup=False, highlight=False)
        elif self._shown:
            self._write(text)

    def skip(self, count: int) -> None:
        """So many responses are there already."""
        if self._began is None:
            self._began = time.monotonic()
            self._next = self._began + (_LINE_SECONDS if self._bar is None else _BAR_SECONDS)
        self._skipped += count
        self._done += count

    def advance(self, count: int) -> None:
        """So many more responses have been drawn."""
        self._done += count
        now = time.monotonic()
        if not self._shown or now < self._next:
            return
        self._next = now + (_LINE_SECONDS if self._bar is None else _BAR_SECONDS)
        if self._bar is None:
            self._write(f"{self._done} of {self.total} responses, {self._left()} left")
        else:
            self._bar.update(self._task, completed=self._done, total=self.total, left=self._left())
            self._bar.refresh()

    def close(self) -> None:
        """Show no more."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def __enter__(self) -> Self:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _left(self) -> str:
        drawn = self._done - self._skipped
        if not drawn or self._began is None:
            return "?"
        return clock((time.monotonic() - self._began) / drawn * (self.total - self._done))

    def _write(self, text: str) -> None:
        with suppress(BrokenPipeError):
            print(text, file=sys.stderr, flush=True)

"""What rank 0 writes and shows while the run goes; every other process writes nothing."""

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Self

from thinktwice_fast import launch, parallel
from thinktwice_fast.config import Config
from thinktwice_fast.errors import one_line
from thinktwice_fast.model.loading import pick_device
from thinktwice_fast.run.metrics import Record, metrics_of
from thinktwice_fast.run.metrics_file import MetricsWriter, read_metrics, truncate_json_lines
from thinktwice_fast.run.options import CONFIG_FILE, to_plain, to_yaml
from thinktwice_fast.run.page.write import PAGE, write_page
from thinktwice_fast.run.progress import Progress
from thinktwice_fast.run.report import plot_curves, summary
from thinktwice_fast.run.tracking import Session, Trackers, tracker_names
from thinktwice_fast.run.transcripts import TRANSCRIPTS, Sample, write_transcripts
from thinktwice_fast.run.versions import write_versions
from thinktwice_fast.tasks.text_stream import TokenTexts


class Output:
    """The run's folder: options, metrics, transcripts, curves, and the page that shows them; its trackers; and the
    progress display.

    Args:
        config: of the run.
        step: that the run continues after; 0 for a new one.
        resumed: False clears what an earlier attempt without a checkpoint left.
        token_texts: splits the responses of transcripts.
    """

    def __init__(self, config: Config, step: int, resumed: bool, token_texts: TokenTexts):
        self._folder = Path(config.output)
        self._writes = parallel.rank() == 0
        self._transcripts = self._folder / TRANSCRIPTS
        self._token_texts = token_texts
        self._progress = Progress(config.run.steps, step, sys.stdout if self._writes else None)
        self._metrics: MetricsWriter | None = None
        if self._writes:
            # Renamed, so that a full disk does not cost the options of the run that is continued.
            options = self._folder / CONFIG_FILE
            options.with_suffix(".tmp").write_text(to_yaml(config))
            options.with_suffix(".tmp").replace(options)
            truncate_json_lines(self._transcripts, step if resumed else None)
            self._metrics = MetricsWriter(self._folder, step if resumed else None)
            write_versions(self._folder, pick_device(config.model, launch.env_local_rank()))
            session = Session(self._folder, to_plain(config), step if resumed else None)
            self._trackers = Trackers(tracker_names(config.track), session, self.message)

    def __enter__(self) -> Self:
        self._progress.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._progress.__exit__(*error)
        if self._writes:
            self._trackers.close()

    def message(self, text: str) -> None:
        """Show one line."""
        self._progress.message(text)

    def record(self, step: int, phase: str, metrics: Mapping[str, float]) -> None:
        """Write a record of metrics and show it."""
        if self._metrics is not None:
            written = self._metrics.write(step, phase, metrics)
            self._trackers.log(step, metrics_of(written))
            self._progress.update(written)
            if phase == "eval":
                self._write_page()

    def evaluated(self, step: int) -> bool:
        """Whether the metrics written so far hold an evaluation of ``step``."""
        return any(record["step"] == step for record in self._evaluations())

    def evaluations(self, name: str) -> list[tuple[int, float]]:
        """Steps and values of an evaluation's metric written so far, where it has one; none but on rank 0."""
        return [(record["step"], record[name]) for record in self._evaluations() if record.get(name) is not None]

    def _evaluations(self) -> list[Record]:
        if self._metrics is None or not self._metrics.path.exists():
            return []
        return [record for record in read_metrics(self._metrics.path) if record["phase"] == "eval"]

    def transcripts(
        self, step: int, phase: str, samples: Sequence[Sample], updated: Mapping[int, Sequence[float]]
    ) -> None:
        """Write samples for people to read; arguments as of `write_transcripts`."""
        if self._writes:
            write_transcripts(self._transcripts, step, phase, samples, updated, self._token_texts)
            self._trackers.log_rollouts(step, phase, samples)

    def close_report(self, extra: Mapping[str, Path], outcome: str, predicted_bytes: int) -> None:
        """Draw the curves, write the page and print the summary; the prediction is of peak memory."""
        if self._metrics is None:
            return
        records = read_metrics(self._metrics.path)
        curves = self._folder / "curves.png"
        plot_curves(records, curves)
        self._write_page()
        paths = {
            "metrics": self._metrics.path,
            "tensorboard": self._folder / "tensorboard",
            "transcripts": self._transcripts,
            "curves": curves,
            "report": self._folder / PAGE,
            **extra,
        }
        paths = {what: path for what, path in paths.items() if path.exists()}
        self._progress.__exit__()
        print(f"\n{outcome}\n\n{summary(records, paths, predicted_bytes)}", flush=True)

    def _write_page(self) -> None:
        page = self._folder / PAGE
        try:
            write_page([self._folder], page)
        except Exception as error:  # whatever it is: what only shows a run must not end it
            self.message(f"warning: {page} could not be written: {one_line(error)}")

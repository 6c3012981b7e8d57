"""What rank 0 writes and shows while the run goes; every other process writes nothing."""

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Self

from thinktwice_fast import parallel
from thinktwice_fast.config import Config
from thinktwice_fast.records import Group
from thinktwice_fast.run.metrics import Record, metrics_of
from thinktwice_fast.run.metrics_file import MetricsWriter, read_metrics, truncate_json_lines
from thinktwice_fast.run.options import to_plain, to_yaml
from thinktwice_fast.run.progress import Progress
from thinktwice_fast.run.report import Transcript, plot_curves, summary, write_transcripts
from thinktwice_fast.run.tracking import Session, Trackers, tracker_names

TRANSCRIPT_GROUPS = 2  # groups per transcript sample
TRANSCRIPT_SAMPLES = 2  # rollouts of each


class Output:
    """The run's folder: options, metrics, transcripts, curves; its trackers; and the progress display.

    Args:
        config: of the run.
        step: that the run continues after; 0 for a new one.
        resumed: False clears what an earlier attempt without a checkpoint left.
    """

    def __init__(self, config: Config, step: int, resumed: bool):
        self._folder = Path(config.output)
        self._writes = parallel.rank() == 0
        self._transcripts = self._folder / "transcripts.jsonl"
        self._progress = Progress(config.run.steps, step, sys.stdout if self._writes else None)
        self._metrics: MetricsWriter | None = None
        if self._writes:
            # Renamed, so that a full disk does not cost the options of the run that is continued.
            options = self._folder / "config.yaml"
            options.with_suffix(".tmp").write_text(to_yaml(config))
            options.with_suffix(".tmp").replace(options)
            truncate_json_lines(self._transcripts, step if resumed else None)
            self._metrics = MetricsWriter(self._folder, step if resumed else None)
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

    def transcripts(self, step: int, phase: str, groups: Sequence[Group]) -> None:
        """Write a few samples for people to read."""
        if self._writes and groups:
            chosen = [
                (group, rollout)
                for group in groups[:TRANSCRIPT_GROUPS]
                for rollout in group.rollouts[:TRANSCRIPT_SAMPLES]
            ]
            samples = [
                Transcript(
                    group.problem.index,
                    "\n\n".join(f"{message['role']}: {message['content']}" for message in group.messages),
                    rollout.text,
                    rollout.reward,
                    group.base.text if group.base else None,
                    group.base.reward if group.base else None,
                )
                for group, rollout in chosen
            ]
            write_transcripts(self._transcripts, step, phase, samples)
            self._trackers.log_rollouts(step, phase, chosen)

    def close_report(self, extra: Mapping[str, Path], outcome: str, predicted_bytes: int) -> None:
        """Draw the curves and print the summary; the prediction is of peak memory."""
        if self._metrics is None:
            return
        records = read_metrics(self._metrics.path)
        curves = self._folder / "curves.png"
        plot_curves(records, curves)
        paths = {
            "metrics": self._metrics.path,
            "tensorboard": self._folder / "tensorboard",
            "transcripts": self._transcripts,
            "curves": curves,
            **extra,
        }
        paths = {what: path for what, path in paths.items() if path.exists()}
        self._progress.__exit__()
        print(f"\n{outcome}\n\n{summary(records, paths, predicted_bytes)}", flush=True)

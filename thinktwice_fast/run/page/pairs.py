"""The transcripts of a page as compact data; assets/report/pairs.js shows them.

Texts and tokens stand once and are referred to by number; log-probabilities are thousandths of a nat.
"""

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from thinktwice_fast.run.metrics import Record
from thinktwice_fast.run.page.inputs import RunFiles
from thinktwice_fast.run.transcripts import CHANGES

_MILLI = 1000
# The first to be shown where there is no room for all: what one looks for, and finds least of.
_RANK = {"spoiled": 0, "fixed": 1, "kept wrong": 2, "wrong": 2}

Key = tuple[int, str]  # problem and tokens of a response


class _Table:
    """Numbers things, equal ones alike."""

    def __init__(self) -> None:
        self.items: list[Any] = []
        self._numbers: dict[Any, int] = {}

    def number(self, item: Any, key: Any = None) -> int:
        """Of ``item``, which is told from others by ``key`` (itself)."""
        key = item if key is None else key
        if key not in self._numbers:
            self._numbers[key] = len(self.items)
            self.items.append(item)
        return self._numbers[key]


def pairs(runs: Sequence[RunFiles], most_bytes: int) -> dict[str, Any]:
    """What the browser shows, as JSON of about ``most_bytes`` at most.

    Of each phase of each step, as much as its equal share of them holds; spoiled and fixed answers first.
    """
    pieces, texts, questions, responses = _Table(), _Table(), _Table(), _Table()
    cells: dict[tuple[int, int, str], list[Record]] = {}
    solutions: list[dict[Key, Record]] = []
    for number, files in enumerate(runs):
        for record in files.transcripts:
            cells.setdefault((number, record["step"], record["phase"]), []).append(record)
        solved = (record for record in files.transcripts if record["phase"] == "solve")
        solutions.append({_key(record, "tokens"): record for record in solved})

    def response(run: int, record: Record) -> int:
        key = (run, record["step"], record["phase"], record["problem"], record["sample"])
        return responses.number(_response(record, pieces), key)

    def base(run: int, record: Record) -> int:
        solution = solutions[run].get(_key(record, "base_tokens"))
        if solution is not None:
            return response(run, solution)
        # It was not among the transcripts of its step: without its tokens.
        plain = {"text": record["base"], "reward": record["base_reward"]}
        return responses.number(plain, (run, record["step"], "base", record["problem"]))

    items = []
    for (run, _, _), records in cells.items():
        for record in _fitting(records, most_bytes // len(cells)):
            item = {
                "run": run,
                "step": record["step"],
                "sample": record["sample"],
                "question": questions.number((record["problem"], record["question"], record["answer"])),
                "prompt": texts.number(record["prompt"]),
                "response": response(run, record),
                "verdict": record["verdict"],
            }
            items.append(item | ({"base": base(run, record)} if "base" in record else {}))
    return {
        "runs": [files.name for files in runs],
        "total": sum(len(records) for records in cells.values()),
        "pieces": pieces.items,
        "texts": texts.items,
        "questions": questions.items,
        "responses": responses.items,
        "items": items,
    }


def changes(records: Iterable[Record]) -> dict[str, int]:
    """How many refinements fixed, spoiled or kept what they refine."""
    counts = Counter(record["verdict"] for record in records)
    return {change: counts[change] for change in CHANGES}


def _key(record: Record, tokens: str) -> Key:
    return record["problem"], json.dumps(record[tokens])


def _fitting(records: Sequence[Record], most_bytes: int) -> list[Record]:
    """As many as fit, and one at least, in their order."""
    chosen: set[int] = set()
    size = 0
    for place in sorted(range(len(records)), key=lambda place: _RANK.get(records[place]["verdict"], 3)):
        size += _bytes(records[place])
        if not chosen or size <= most_bytes:
            chosen.add(place)
    return [record for place, record in enumerate(records) if place in chosen]


def _bytes(record: Record) -> int:
    """About what an item takes; its prompt and its base, which it shares with others, counted in part."""
    shared = len(record["prompt"].encode("utf-8", "replace"))
    return 150 + 16 * len(record["tokens"]) + shared // 2


def _response(record: Record, pieces: _Table) -> dict[str, Any]:
    logps = [round(_MILLI * logp) for logp in record["logps"]]
    return {
        "pieces": [pieces.number(text) for text in record["texts"]],
        "logps": logps,
        "changes": [round(_MILLI * new) - old for new, old in zip(record["new_logps"], logps, strict=True)],
        "reward": record["reward"],
        "advantage": None if record["advantage"] is None else round(record["advantage"], 4),
        "finished": record["finished"],
        **({"guide": [int(flag) for flag in record["guide"]]} if "guide" in record else {}),
    }

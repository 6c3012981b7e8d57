"""Evaluations as logs of Inspect (inspect.aisi.org.uk), which ``inspect view`` and its Python API read."""

import json
from collections import defaultdict
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from thinktwice_fast.cli.evaluation.intervals import Estimate
from thinktwice_fast.cli.evaluation.models import folder_name
from thinktwice_fast.cli.evaluation.options import EvalOptions
from thinktwice_fast.cli.evaluation.replies import grader_name
from thinktwice_fast.cli.evaluation.sets import ProblemSet
from thinktwice_fast.cli.evaluation.store import GRADES, NONE, REFINEMENTS, SETTINGS, SOLUTIONS, Key, Line, Store
from thinktwice_fast.records import Problem
from thinktwice_fast.tasks.answers import extract_boxed

_VERSION = 2  # of the format
_SCORES = {"solve": "solution", "refine": "refinement"}  # by how figures are called


def write_log(
    folder: Path,
    model: str,
    problems: ProblemSet,
    store: Store,
    options: EvalOptions,
    found: Mapping[str, Estimate],
) -> Path:
    """Write one model's responses to a set; a sample per problem, an epoch per solution, its refinements behind it.

    Args:
        folder: that exists.
        model: its name.
        problems: the set.
        store: of the responses.
        options: of the evaluation.
        found: the figures.

    Returns:
        The file.
    """
    lines: dict[Key, Line] = {}
    rewards: dict[Key, float | None] = {}
    for kind in (SOLUTIONS, REFINEMENTS):
        lines |= {Key.of(line): line for line in store.lines(kind)}
    grader = grader_name(problems.reward)
    rewards = {Key.of(line): line["reward"] for line in store.lines(GRADES) if line["grader"] == grader}
    refinements: dict[Key, list[Key]] = defaultdict(list)
    for key in sorted(lines):
        if key.refinement != NONE and key.refinement < (options.refine_samples or 0):
            refinements[key.solution].append(key)
    samples = [
        _sample(problem, Key(number, epoch), refinements[Key(number, epoch)], lines, rewards, model)
        for number, problem in enumerate(problems.problems)
        for epoch in range(options.samples or 0)
    ]
    name = folder_name(model)
    # When the store began, so that a continued evaluation replaces its log. Inspect wants it in the file's name.
    begun = datetime.fromtimestamp((store.folder / SETTINGS).stat().st_mtime, UTC).isoformat(timespec="seconds")
    now = datetime.now(UTC).isoformat(timespec="seconds")
    generation = {
        "temperature": options.temperature, "top_p": options.top_p, "top_k": options.top_k,
        "max_tokens": options.max_tokens, "seed": options.seed,
    }  # fmt: skip
    log = {
        "version": _VERSION,
        "status": "success",
        "eval": {
            "eval_id": f"{name}-{problems.name}",
            "run_id": f"{name}-{problems.name}",
            "created": begun,
            "task": problems.name,
            "task_id": problems.name,
            "solver": options.mode,
            "dataset": {"name": problems.name, "location": problems.source, "samples": len(problems.problems)},
            "model": f"thinktwice-fast/{model}",
            "model_generate_config": generation,
            "config": {"epochs": options.samples},
            "scorers": [{"name": score} for score in _SCORES.values()],
        },
        "plan": {"steps": [{"solver": options.mode}], "config": generation},
        "results": {
            "total_samples": len(samples),
            "completed_samples": len(samples),
            "scores": [_score(phase, name, problems.reward, found) for phase, name in _SCORES.items()],
        },
        "stats": {"started_at": begun, "completed_at": now},
        "samples": samples,
    }
    path = folder / f"{begun.replace(':', '-')}_{problems.name}_{name}.json"
    path.write_text(json.dumps(log, ensure_ascii=True), encoding="utf-8")
    return path


def _score(phase: str, name: str, scorer: str, found: Mapping[str, Estimate]) -> dict[str, Any]:
    metrics = {}
    for figure, estimate in found.items():
        if figure.startswith(phase):
            metric = figure.removeprefix(f"{phase}_")
            metrics[metric] = {
                "name": metric,
                "value": estimate.value,
                "metadata": {"low": estimate.low, "high": estimate.high},
            }
    return {"name": name, "scorer": scorer, "metrics": metrics}


def _sample(
    problem: Problem,
    solution: Key,
    refinements: list[Key],
    lines: Mapping[Key, Line],
    rewards: Mapping[Key, float | None],
    model: str,
) -> dict[str, Any]:
    line = lines[solution]
    replies = [line, *(lines[key] for key in refinements)]
    messages = [*problem.messages, *(_message(reply) for reply in replies)]
    last = replies[-1]
    tokens = sum(len(reply["ids"]) if "ids" in reply else reply["tokens"] for reply in replies)
    scores = {"solution": _verdict(line, rewards.get(solution))}
    if refinements:
        verdicts = [rewards.get(key) or 0.0 for key in refinements]
        scores["refinement"] = _verdict(last, sum(verdicts) / len(verdicts))
    return {
        "id": problem.index + 1,
        "epoch": solution.sample + 1,
        "input": [dict(message) for message in problem.messages],
        "target": problem.answer,
        "messages": messages,
        "output": {
            "model": model,
            "choices": [{"message": _message(last), "stop_reason": "stop" if last["finished"] else "max_tokens"}],
            "usage": {"output_tokens": tokens, "total_tokens": tokens},
        },
        "scores": scores,
    }


def _message(reply: Line) -> dict[str, str]:
    return {"role": "assistant", "content": reply["text"]}


def _verdict(reply: Line, reward: float | None) -> dict[str, Any]:
    return {"value": reward or 0.0, "answer": extract_boxed(reply["text"])}

"""What was sampled, as data: ``transcripts.jsonl``, a line per response. docs/guide.md explains its keys."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from thinktwice_fast.records import Group, Rollout, is_right
from thinktwice_fast.run.metrics import Record
from thinktwice_fast.run.metrics_file import append_json_lines
from thinktwice_fast.tasks.text_stream import TokenTexts

TRANSCRIPTS = "transcripts.jsonl"
CHANGES = ("fixed", "spoiled", "kept right", "kept wrong")  # by a refinement
_DECIMALS = 5  # of log-probabilities

Sample = tuple[Group, Rollout]


def choose_samples(groups: Iterable[Group], most: int) -> list[Sample]:
    """The first samples of the first groups, up to ``most`` tokens of prompts and responses; one there always is."""
    chosen: list[Sample] = []
    tokens = 0
    for group in groups:
        for rollout in group.rollouts:
            tokens += len(rollout.prompt) + len(rollout.response)
            if chosen and tokens > most:
                return chosen
            chosen.append((group, rollout))
    return chosen


def prompt_text(group: Group) -> str:
    """The chat that a group answers, for people to read."""
    return "\n\n".join(f"{message['role']}: {message['content']}" for message in group.messages)


def verdict(reward: float | None, base_reward: float | None, refines: bool) -> str | None:
    """What became of an answer: one of ``CHANGES`` where it refines another, else "right" or "wrong".

    None where a reward that it takes is missing.
    """
    if reward is None or (refines and base_reward is None):
        return None
    if not refines or base_reward is None:
        return "right" if is_right(reward) else "wrong"
    fixed, spoiled, right, wrong = CHANGES
    if is_right(base_reward):
        return right if is_right(reward) else spoiled
    return fixed if is_right(reward) else wrong


def write_transcripts(
    path: Path,
    step: int,
    phase: str,
    samples: Sequence[Sample],
    updated: Mapping[int, Sequence[float]],
    token_texts: TokenTexts,
) -> None:
    """Append samples as JSON lines.

    Args:
        path: of the file; `metrics_file.truncate_json_lines` drops what was written after a checkpoint.
        step: that they are of.
        phase: "solve" or "refine".
        samples: graded, with advantages.
        updated: log-probability of each response token after the step's update, by sample id.
        token_texts: splits responses.

    Raises:
        UserError: the file cannot be written.
    """
    head: Record = {"step": step, "phase": phase}
    append_json_lines(path, (head | _transcript(*sample, updated, token_texts) for sample in samples))


def _transcript(
    group: Group, rollout: Rollout, updated: Mapping[int, Sequence[float]], token_texts: TokenTexts
) -> dict[str, Any]:
    base = group.base
    base_reward = None if base is None else base.reward
    content: dict[str, Any] = {
        "problem": group.problem.index,
        "sample": group.rollouts.index(rollout),
        "question": group.problem.question,
        "answer": group.problem.answer,
        "prompt": prompt_text(group),
        "prompt_tokens": list(group.prompt),
    }
    if base is not None:
        content |= {"base": base.text, "base_tokens": list(base.response), "base_reward": base_reward}
    content |= {
        "response": rollout.text,
        "tokens": rollout.response,
        "texts": token_texts.split(rollout.response),
        "logps": _rounded(rollout.logps),
        "new_logps": _rounded(updated[rollout.sample_id]),
        **({"guide": rollout.guide} if any(rollout.guide) else {}),
        "finished": rollout.finished,
        "reward": rollout.reward,
        "verdict": verdict(rollout.reward, base_reward, base is not None),
        "advantage": rollout.advantage,
    }
    return content


def _rounded(logps: Iterable[float]) -> list[float]:
    return [round(logp, _DECIMALS) for logp in logps]

"""A teacher's answer: its three tagged parts, and how they are spliced into the rollout that it is about."""

import re
from collections.abc import Collection
from dataclasses import dataclass
from typing import Literal

from thinktwice_fast.config import Config
from thinktwice_fast.records import Rollout
from thinktwice_fast.tasks.prompts import ChatFormat

Refusal = Literal["unanswered", "unfinished", "unparsed", "foreign_tokens", "guidance_too_long", "no_room"]

REFUSALS: dict[Refusal, str] = {
    "unanswered": "Requests that failed in the step: no reply within the time limit and retries, or a function that "
    "raised, took too long or returned nothing. The rollout stays as its policy wrote it, here and with the next five.",
    "unfinished": "Teacher answers that were cut off at `thinktuning.teacher_answer_tokens`.",
    "unparsed": "Teacher answers that are not an opinion, a reason and a phrase in their tags.",
    "foreign_tokens": "Teacher answers with text that the policy's vocabulary has no token for, or a special token.",
    "guidance_too_long": "Teacher answers whose reason and phrase are longer than `thinktuning.guidance_tokens`.",
    "no_room": "Teacher answers that would make the response longer than `rollout.max_response_tokens`.",
}
"""Why a rollout stays as its policy wrote it although a teacher was asked."""

_TAGS = ("opinion", "reason", "phrase")
_PARTS = re.compile(r"\s*".join(rf"<{tag}>(.*?)</{tag}>" for tag in _TAGS) + r"\s*\Z", re.DOTALL)
_ANY_TAG = re.compile(rf"</?(?:{'|'.join(_TAGS)})>")
_BLANK_LINE = "\n\n"


@dataclass(frozen=True)
class Feedback:
    """What a teacher says of a response."""

    opinion: str  # "correct" or "incorrect"
    reason: str  # a reflection in the first person
    phrase: str  # goes on in the first person, to the final answer


def parse(text: str) -> Feedback | None:
    """The three parts of a teacher's answer; None where they are not all there, in order and filled, at its end."""
    found = _PARTS.search(text)
    if found is None:
        return None
    opinion, reason, phrase = (part.strip() for part in found.groups())
    if opinion not in ("correct", "incorrect") or not reason or not phrase or _ANY_TAG.search(reason + phrase):
        return None
    return Feedback(opinion, reason, phrase)


def tagged(feedback: Feedback) -> str:
    """The answer that `parse` reads."""
    return "\n".join(f"<{tag}>{getattr(feedback, tag)}</{tag}>" for tag in _TAGS)


def splice(
    rollout: Rollout, feedback: Feedback, chat: ChatFormat, stop_ids: Collection[int], config: Config
) -> Refusal | None:
    """Append the feedback to a rollout that ended with a stop token, in front of that token.

    The rollout's own token ids stay as they were sampled: only what the teacher adds is tokenised. Its tokens, the stop
    token behind them included, are marked as guidance and have no log-probability under the policy that sampled.

    Returns:
        None; or why not, and the rollout is as before.
    """
    *own, end = rollout.response
    assert end in stop_ids, "only rollouts that ended properly are guided"
    guidance = chat.encode(_BLANK_LINE + feedback.reason + _BLANK_LINE + feedback.phrase)
    if not chat.special_ids.isdisjoint(guidance) or not set(stop_ids).isdisjoint(guidance):
        return "foreign_tokens"
    if len(guidance) > config.thinktuning.guidance_tokens:
        return "guidance_too_long"
    if len(own) + len(guidance) + 1 > config.rollout.max_response_tokens:
        return "no_room"
    added = len(guidance) + 1
    rollout.response = [*own, *guidance, end]
    rollout.guide = [False] * len(own) + [True] * added
    rollout.logps = [*rollout.logps[: len(own)], *([0.0] * added)]
    rollout.entropies = rollout.entropies[: len(own)]
    rollout.text = chat.response_text(rollout.response, stop_ids)
    return None

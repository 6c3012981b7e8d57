"""Supervised fine-tuning on worked responses; the warm start of the shipped model is made by it."""

from typing import Any

from thinktwice_fast import parallel
from thinktwice_fast.algorithms.parts import ExampleStream, Parts
from thinktwice_fast.algorithms.step import Step
from thinktwice_fast.config import Config
from thinktwice_fast.errors import UserError
from thinktwice_fast.tasks.prompts import ChatFormat
from thinktwice_fast.update.batches import Example
from thinktwice_fast.update.updater import Updater


def build(parts: Parts) -> "SFT":
    """SFT on the examples of a run."""
    return SFT(parts.config, parts.examples, parts.sampler.chat, parts.end_id, parts.updater)


class SFT:
    """Trains on the next ``problems_per_step`` examples each step: cross-entropy of the response tokens."""

    def __init__(self, config: Config, examples: ExampleStream, chat: ChatFormat, end_id: int, updater: Updater):
        self._batch = config.problems_per_step
        self._limit = config.rollout.max_prompt_tokens + config.rollout.max_response_tokens
        self._examples = examples
        self._chat = chat
        self._end_id = end_id
        self._updater = updater
        self._position = 0

    def step(self, number: int) -> Step:
        """Train on one batch. Collective.

        Raises:
            UserError: on every process, when an example of any is too long.
        """
        share = self._batch // parallel.world_size()
        first = self._position + parallel.rank() * share
        examples: list[Example] = []
        error: UserError | None = None
        try:
            examples = [self._example(first + n) for n in range(share)]
        except UserError as caught:
            error = caught
        parallel.agree(error)
        metrics = self._updater.supervised_update(examples)
        self._position += self._batch
        return Step("sft", metrics, [])

    def state(self) -> dict[str, Any]:
        """The position in the stream of examples."""
        return {"position": self._position}

    def load_state(self, state: dict[str, Any]) -> None:
        """Continue at a saved position."""
        self._position = state["position"]

    def _example(self, position: int) -> Example:
        messages, target = self._examples(position)
        prompt = self._chat.prompt_ids(messages)
        response = [*self._chat.encode(target), self._end_id]
        if len(prompt) >= self._limit:
            raise UserError(
                f"example {position}: its prompt of {len(prompt)} tokens leaves no room for a response: raise "
                "--rollout.max_prompt_tokens"
            )
        # Cut off, it would have no end token, and teach the model never to stop.
        if len(prompt) + len(response) > self._limit:
            raise UserError(
                f"example {position}: its prompt of {len(prompt)} tokens and its response of {len(response)}, end "
                f"token included, are more than the {self._limit} of --rollout.max_prompt_tokens and "
                "--rollout.max_response_tokens together: raise --rollout.max_response_tokens"
            )
        return Example(tuple(prompt), response)

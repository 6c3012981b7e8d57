"""Prompts: the refine chat as messages, and chats as token ids with sampled tokens kept as they are."""

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from thinktwice_fast.errors import Option, UserError, one_line
from thinktwice_fast.records import Message

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

DEFAULT_REFINE_INSTRUCTION = (
    "Go over your solution above once more. "
    "Recheck every step: are the calculations right, does each conclusion follow, and was the question understood as "
    "it was meant? "
    "Wherever something is wrong, say what it is and correct it. "
    "If everything is right already, verify the result and explain the solution more clearly. "
    "End with the complete refined solution and its final answer, given in the form that the question asks for."
)
"""The task-agnostic instruction that `thinktwice.refine_instruction: default` stands for; its four demands are those of
ThinkTwice (arXiv 2604.01591)."""

_THINK, _END_OF_THINK = "<think>", "</think>"
_THOUGHT = re.compile(rf"{_THINK}(.*?)(?:{_END_OF_THINK}|\Z)", re.DOTALL)
_PREVIOUS_REASONING = "Your previous reasoning was:"

# Stands in for an assistant message to find what a template puts around it. Plain letters, which no template escapes.
_SENTINEL = "assistantXcontentXstandsXhere"
_TEMPLATE = Option("model.chat_template")


@dataclass(frozen=True)
class RefineChat:
    """A refine prompt as messages: user (question), assistant (base solution), user (instruction)."""

    messages: tuple[Message, ...]
    verbatim: bool  # the assistant turn is the base as it was sampled, so its token ids may be used again


@dataclass(frozen=True)
class RefinePrompt:
    """A refine prompt, both ways."""

    messages: tuple[Message, ...]
    ids: tuple[int, ...]


def refine_messages(
    question_messages: Sequence[Message], base_text: str, instruction: str, thinking_opened: bool = False
) -> RefineChat:
    """The chat that asks for a refinement of a base solution. It has no system message.

    Thinking text (``<think>...</think>``) is taken out of the assistant turn and quoted as previous reasoning in front
    of the instruction; after an unclosed thought the assistant turn is empty. Anything else is used as it is.

    Args:
        question_messages: the problem's messages.
        base_text: the base solution, without its stop token.
        instruction: what to ask for; "default" = `DEFAULT_REFINE_INSTRUCTION`.
        thinking_opened: the prompt that was answered ended with ``<think>``, so the base starts inside a thought.
    """
    solution, thoughts, verbatim = _without_thinking(base_text, thinking_opened)
    request = DEFAULT_REFINE_INSTRUCTION if instruction == "default" else instruction
    if thoughts:
        request = f"{_PREVIOUS_REASONING}\n{thoughts}\n\n{request}"
    question = [message for message in question_messages if message["role"] != "system"]
    turns = [*question, {"role": "assistant", "content": solution}, {"role": "user", "content": request}]
    return RefineChat(tuple(turns), verbatim)


class ChatFormat:
    """A tokenizer's chat template.

    The template writes every special token itself (a beginning-of-text token too), so tokenising adds none.

    Raises:
        UserError: the tokenizer has no chat template.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerBase") -> None:
        if not tokenizer.chat_template:
            raise UserError(
                f"the tokenizer of {tokenizer.name_or_path or 'the model'} has no chat template",
                ("give a Jinja file with ", _TEMPLATE),
            )
        self._tokenizer = tokenizer
        self.special_ids = frozenset(tokenizer.all_special_ids)  # of tokens that no text should become

    def prompt_ids(self, messages: Sequence[Message]) -> list[int]:
        """Token ids of a chat that awaits the assistant's next message.

        Raises:
            UserError: the template refuses the messages.
        """
        return self.encode(self._render(messages))

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, no special tokens added."""
        return self._tokenizer(text, add_special_tokens=False)["input_ids"]

    def response_text(self, ids: Sequence[int], stop_ids: Collection[int], stop_string: str | None = None) -> str:
        """A sampled response as text, without its stop token, its stop string and other special tokens."""
        text = str(self._tokenizer.decode(_without_stop(ids, stop_ids), skip_special_tokens=True))
        return text.partition(stop_string)[0] if stop_string else text

    def refine(
        self,
        question_messages: Sequence[Message],
        prompt_ids: Sequence[int],
        base_ids: Sequence[int],
        base_text: str,
        instruction: str,
        stop_ids: Collection[int],
    ) -> RefinePrompt:
        """The refine prompt (`refine_messages`) for one base solution.

        Its ids are the prompt's ids, the base's ids without its end token, and the ids of what the template puts after
        an assistant message: no sampled token is encoded again, and the end of the turn stands there once, as the
        template writes it. Where the template shows the question in another way once it has been answered, that part
        is tokenised anew. Where thinking had to be taken out of the base, everything is.

        Args:
            question_messages: the problem's messages.
            prompt_ids: what the base answered, from `prompt_ids(question_messages)`.
            base_ids: the base's token ids as sampled, with or without an end token.
            base_text: the same decoded, without the end token.
            instruction: see `refine_messages`.
            stop_ids: token ids that end a response.

        Raises:
            UserError: the template refuses the messages, or does not show the assistant's message exactly once.
        """
        asked = self._render(question_messages)
        # A template may open a thought at the end of the prompt itself.
        chat = refine_messages(question_messages, base_text, instruction, asked.rstrip().endswith(_THINK))
        if not chat.verbatim:
            return RefinePrompt(chat.messages, tuple(self.prompt_ids(chat.messages)))
        before, after = self._around_base(chat.messages)
        head = prompt_ids if before == asked else self.encode(before)
        return RefinePrompt(chat.messages, (*head, *_without_stop(base_ids, stop_ids), *self.encode(after)))

    def _around_base(self, messages: Sequence[Message]) -> tuple[str, str]:
        """What the template puts before and after the base solution."""
        *question, _, instruction = messages
        text = self._render([*question, {"role": "assistant", "content": _SENTINEL}, instruction])
        if text.count(_SENTINEL) != 1:
            raise UserError(
                f"the chat template shows an earlier assistant message {text.count(_SENTINEL)} times instead of once, "
                "so no refine prompt can be made with it",
                ("give another with ", _TEMPLATE),
            )
        before, _, after = text.partition(_SENTINEL)
        return before, after

    def _render(self, messages: Sequence[Message]) -> str:
        from jinja2 import TemplateError

        try:
            chat = [dict(message) for message in messages]
            return str(self._tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True))
        except TemplateError as error:
            roles = ", ".join(message["role"] for message in messages)
            raise UserError(
                f"the chat template refuses messages of roles {roles} ({one_line(error)})",
                ("give another with ", _TEMPLATE),
            ) from error


def _without_stop(ids: Sequence[int], stop_ids: Collection[int]) -> list[int]:
    return list(ids[:-1] if ids and ids[-1] in stop_ids else ids)


def _without_thinking(text: str, opened: bool) -> tuple[str, str, bool]:
    """The solution, the thoughts, and whether there was no thinking to take out."""
    before_end, end, _ = text.partition(_END_OF_THINK)
    if _THINK not in before_end and (opened or end):
        text = _THINK + text
    if _THINK not in text:
        return text, "", True
    thoughts = [thought.strip() for thought in _THOUGHT.findall(text)]
    return _THOUGHT.sub("", text).strip(), "\n\n".join(filter(None, thoughts)), False

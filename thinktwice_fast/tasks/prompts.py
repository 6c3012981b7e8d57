"""Prompts: the refine chat as messages, and chats as token ids with sampled tokens kept as they are."""

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np

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
_PREVIOUS_ANSWER = "Your previous answer was:"
_INSTRUCTION_FILE = re.compile(r"\S+\.(?:txt|md)")

# Stands in for an assistant message to find what a template puts around it. Plain letters, which no template escapes.
_SENTINEL = "assistantXcontentXstandsXhere"
_TEMPLATE = Option("model.chat_template")

_REMEMBERED = 1024  # chats and ends of chats: the samples of a problem share theirs

_RENDERING = frozenset(("conversation", "chat_template", "tokenize", "add_generation_prompt"))  # what is set here


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

    Thinking text (``<think>...</think>``) is taken out of the assistant turn; it and what is left are quoted in front
    of the instruction, as previous reasoning and previous answer. After an unclosed thought the assistant turn is
    empty. Anything else is used as it is.

    Args:
        question_messages: the problem's messages.
        base_text: the base solution, without its stop token.
        instruction: what to ask for; "default" = `DEFAULT_REFINE_INSTRUCTION`.
        thinking_opened: the prompt that was answered ended with ``<think>``, so the base starts inside a thought.
    """
    solution, thoughts, verbatim = _without_thinking(base_text, thinking_opened)
    quoted = [] if verbatim else [(_PREVIOUS_REASONING, thoughts), (_PREVIOUS_ANSWER, solution)]
    return RefineChat(_refine_turns(question_messages, solution, quoted, instruction), verbatim)


def _refine_turns(
    question_messages: Sequence[Message], solution: str, quoted: Sequence[tuple[str, str]], instruction: str
) -> tuple[Message, ...]:
    request = DEFAULT_REFINE_INSTRUCTION if instruction == "default" else instruction
    request = "\n\n".join([*(f"{title}\n{text}" for title, text in quoted if text), request])
    question = [message for message in question_messages if message["role"] != "system"]
    return (*question, {"role": "assistant", "content": solution}, {"role": "user", "content": request})


def instruction_text(instruction: str) -> str:
    """An instruction as given, or where that is the name of a .txt or .md file, the text in it.

    Raises:
        UserError: the file can't be read, or is empty.
    """
    if not _INSTRUCTION_FILE.fullmatch(instruction):
        return instruction
    try:
        text = Path(instruction).expanduser().read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"refine instruction {instruction}: can't read it ({one_line(error)})", "check it") from error
    if not text:
        raise UserError(f"refine instruction {instruction}: the file is empty", "write the instruction into it")
    return text


class ChatFormat:
    """A tokenizer's chat template.

    The template writes every special token itself (a beginning-of-text token too), so tokenising adds none.

    Args:
        tokenizer: has the template.
        template_args: variables for the template.
        strip_default_system: leave out the system block that the template writes where a chat has none of its own.
        longest_prompt: tokens that a refine prompt may take when it quotes thinking; the quoted answer, which stands in
            its own turn anyway, and then the beginning of the reasoning are left out for it. None = no limit.

    Raises:
        UserError: the tokenizer has no chat template, or one without such a block; a variable that is not the user's.
    """

    def __init__(
        self,
        tokenizer: "PreTrainedTokenizerBase",
        template_args: Mapping[str, Any] = MappingProxyType({}),
        strip_default_system: bool = False,
        longest_prompt: int | None = None,
    ) -> None:
        if not tokenizer.chat_template:
            raise UserError(
                f"the tokenizer of {tokenizer.name_or_path or 'the model'} has no chat template",
                ("give a Jinja file with ", _TEMPLATE),
            )
        self._tokenizer = tokenizer
        self.special_ids = frozenset(tokenizer.all_special_ids)  # of tokens that no text should become
        for name in _RENDERING & template_args.keys():
            raise UserError((Option("model.chat_template_args"), f": {name} is not for you to set"), "leave it out")
        self._arguments = dict(template_args)
        self._rendered = lru_cache(_REMEMBERED)(self._render_anew)
        self._encoded = lru_cache(_REMEMBERED)(self.encode)
        self._longest = longest_prompt
        self.thinks = _END_OF_THINK in str(tokenizer.chat_template)
        """Whether the template knows thinking, so that a refine prompt may quote a response and its answer again."""
        self._system = ""
        if strip_default_system:
            self._system = self._default_system()
            self._rendered.cache_clear()
        unused = [name for name in template_args if name not in str(tokenizer.chat_template)]
        self.notes: tuple[str, ...] = ()
        """For the user: what has no effect."""
        if unused:
            self.notes = (f"the chat template has no use for {', '.join(unused)} among its variables",)

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
        # As an array: of a list, transformers looks at every member twice.
        own = np.asarray(_without_stop(ids, stop_ids), dtype=np.int64)
        text = str(self._tokenizer.decode(own, skip_special_tokens=True))
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
        opened = asked.rstrip().endswith(_THINK)  # by the template, at the end of the prompt itself
        chat = refine_messages(question_messages, base_text, instruction, opened)
        if not chat.verbatim:
            return self._quoting(question_messages, base_text, instruction, opened)
        before, after = self._around_base(chat.messages)
        head = prompt_ids if before == asked else self._encoded(before)
        return RefinePrompt(chat.messages, (*head, *_without_stop(base_ids, stop_ids), *self._encoded(after)))

    def _quoting(self, question: Sequence[Message], base_text: str, instruction: str, opened: bool) -> RefinePrompt:
        """A refine prompt that quotes thinking, as much of it as fits."""
        solution, thoughts, _ = _without_thinking(base_text, opened)
        answer, cut = solution, 1
        while True:
            quoted = ((_PREVIOUS_REASONING, thoughts), (_PREVIOUS_ANSWER, answer))
            messages = _refine_turns(question, solution, quoted, instruction)
            ids = self.prompt_ids(messages)
            over = 0 if self._longest is None else len(ids) - self._longest
            if over <= 0 or not (answer or thoughts):
                return RefinePrompt(messages, tuple(ids))
            if answer:
                answer = ""
            else:
                cut = max(over, 2 * cut)
                thoughts = str(self._tokenizer.decode(self.encode(thoughts)[cut:])).strip()

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

    def _default_system(self) -> str:
        """What the template writes before the first message of a chat without a system message, but for the beginning
        of the text."""
        one, two = ([{"role": "user", "content": _SENTINEL}] * count for count in (1, 2))
        alone = self._render(one, answer=False)
        message = self._render(two, answer=False).removeprefix(alone)
        system = alone.removesuffix(message).removeprefix(self._tokenizer.bos_token or "")
        if not system or not alone.endswith(message):
            raise UserError(
                (Option("model.strip_default_system"), ": the chat template writes no system block by itself"),
                "leave it out",
            )
        return system

    def _render(self, messages: Sequence[Message], *, answer: bool = True) -> str:
        """The chat as text; with ``answer``, up to where the assistant's next message begins."""
        return self._rendered(tuple(tuple(message.items()) for message in messages), answer)

    def _render_anew(self, messages: Sequence[tuple[tuple[str, str], ...]], answer: bool) -> str:
        from jinja2 import TemplateError

        chat = [dict(message) for message in messages]
        try:
            text = str(
                self._tokenizer.apply_chat_template(
                    chat, tokenize=False, add_generation_prompt=answer, **self._arguments
                )
            )
        except TemplateError as error:
            roles = ", ".join(message["role"] for message in chat)
            raise UserError(
                f"the chat template refuses messages of roles {roles} ({one_line(error)})",
                ("give another with ", _TEMPLATE),
            ) from error
        if any(message["role"] == "system" for message in chat):
            return text
        return text.replace(self._system, "", 1) if self._system else text


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

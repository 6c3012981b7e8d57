"""The generated task: sums of five one-digit numbers, solved tersely and rechecked carefully.

The solution packs several operations into a line, the refinement writes one operation per line. So the recheck is
easier than the solve, which is what makes refinement worth training on a very small model.
"""

import hashlib
import random
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from thinktwice_fast.errors import UserError
from thinktwice_fast.records import Message, Problem
from thinktwice_fast.tasks.source import Source

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

VARIANTS: dict[str, tuple[int, ...]] = {"tm5": (2, 1, 1), "te5": (2, 2)}
"""Operations per line of the terse solution."""

RECHECK = "recheck"
"""The task's refine instruction, a single token of its tokenizer."""

_TERMS = 5
_LARGEST_TOTAL = 99
_HELD_OUT_ONE_IN = 16
_LARGEST_SLIP = 9  # a wrong line is off by at most this much, as a slip of the model's own would be

_USER, _ASSISTANT, _END, _PAD, _UNKNOWN = "<|user|>", "<|assistant|>", "<|end|>", "<|pad|>", "<|unk|>"
_BOX = "\\boxed{"
_CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{%- if message['role'] == 'user' -%}{{ '<|user|>' + message['content'] }}"
    "{%- elif message['role'] == 'assistant' -%}{{ '<|assistant|>' + message['content'] + '<|end|>' }}"
    "{%- else -%}{{ raise_exception('the arithmetic task has no ' + message['role'] + ' messages') }}{%- endif -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|assistant|>' }}{%- endif -%}"
)


class ArithmeticSource(Source):
    """An indexable stream of problems such as ``8-8+5+6-9``, the same in every run and on every machine.

    Five terms of 0 to 9 joined by ``+`` and ``-``, every running total within 0 to 99. Which expressions are held out
    (1 in 16) is decided by a hash of the expression, so the training stream never meets a held-out one.

    Args:
        variant: "tm5" (2, 1, 1 operations per line of the solution) or "te5" (2, 2).
        held_out: give the held-out expressions instead of the training ones.
        limit: number of problems; 0 = endless.

    Raises:
        UserError: unknown variant.
    """

    def __init__(self, variant: str, held_out: bool = False, limit: int = 0) -> None:
        if variant not in VARIANTS:
            raise UserError(f"no arithmetic task {variant!r}; use " + " or ".join(_source_names()))
        self.variant = variant
        self.held_out = held_out
        self.size = limit or None

    def problem(self, index: int) -> Problem:
        """The problem number ``index``."""
        rng = random.Random(f"arithmetic/{'held-out' if self.held_out else 'train'}/{index}")
        expression = _draw_expression(rng, self.held_out)
        answer = str(running_totals(expression)[-1])
        return Problem(
            index=index,
            messages=({"role": "user", "content": expression},),
            answer=answer,
            target=terse_solution(expression, self.variant),
            columns={"question": expression, "answer": answer},
        )


def is_held_out(expression: str) -> bool:
    """Whether an expression belongs to the held-out part (1 in 16, by a hash that never changes)."""
    return hashlib.blake2b(expression.encode(), digest_size=1).digest()[0] % _HELD_OUT_ONE_IN == 0


def running_totals(expression: str) -> list[int]:
    """Totals after each term: ``8-8+5`` -> ``[8, 0, 5]``."""
    totals = [0]
    for term in _terms(expression):
        totals.append(totals[-1] + int(term))
    return totals[1:]


def terse_solution(expression: str, variant: str, rng: random.Random | None = None, error_rate: float = 0.0) -> str:
    r"""The task's worked solution, several operations per line.

    ``8-8+5+6-9`` in tm5 -> ``8-8+5=5\n5+6=11\n11-9=2\n\boxed{2}``.

    Args:
        expression: as an `ArithmeticSource` gives it.
        variant: a key of `VARIANTS`.
        rng: drawn from where ``error_rate`` is above 0.
        error_rate: chance of each line to be wrong by 1 to 9. Later lines compute correctly from the wrong total; a
            slip is chosen so that no total leaves 0 to 99.
    """
    return _write_solution(expression, VARIANTS[variant], rng, error_rate)


def careful_solution(expression: str) -> str:
    r"""The right solution with one operation per line: ``8-8=0\n0+5=5\n5+6=11\n11-9=2\n\boxed{2}``."""
    return _write_solution(expression, (1,) * (_TERMS - 1), None, 0.0)


def warm_start_example(
    variant: str, index: int, seed: int, refine_fraction: float, draft_error_rates: Sequence[float]
) -> tuple[list[Message], str]:
    """One supervised example: a chat that ends with a user message, and the response to learn.

    With chance ``1 - refine_fraction`` a solve example (expression -> terse solution), otherwise a refine example
    (expression, a terse draft whose lines are wrong with a rate drawn from ``draft_error_rates``, "recheck" -> careful
    right solution). Training expressions only; the same (index, seed) always gives the same example.
    """
    rng = random.Random(f"warm start/{seed}/{index}")
    expression = _draw_expression(rng, held_out=False)
    question: Message = {"role": "user", "content": expression}
    if rng.random() >= refine_fraction:
        return [question], terse_solution(expression, variant)
    draft = terse_solution(expression, variant, rng, rng.choice(draft_error_rates))
    messages = [question, {"role": "assistant", "content": draft}, {"role": "user", "content": RECHECK}]
    return messages, careful_solution(expression)


def build_tokenizer() -> "PreTrainedTokenizerFast":
    r"""The task's character-level tokenizer, with its chat template.

    One token each: the digits, ``+``, ``-``, ``=``, newline, ``\boxed{``, ``}``, ``recheck``, and the special tokens
    ``<|user|>``, ``<|assistant|>``, ``<|end|>`` (end of text), ``<|pad|>``, ``<|unk|>`` (any other character).
    Decoding inserts no spaces.
    """
    import tokenizers
    from transformers import PreTrainedTokenizerFast

    special = [_PAD, _END, _USER, _ASSISTANT, _UNKNOWN]
    vocabulary = [*special, *"0123456789+-=\n}", _BOX, RECHECK]
    model = tokenizers.models.WordLevel({token: i for i, token in enumerate(vocabulary)}, unk_token=_UNKNOWN)
    backend = tokenizers.Tokenizer(model)
    one_token = tokenizers.Regex(rf"{re.escape(_BOX)}|{RECHECK}|[\s\S]")
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Split(one_token, behavior="isolated")
    backend.decoder = tokenizers.decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token=_PAD,
        eos_token=_END,
        unk_token=_UNKNOWN,
        additional_special_tokens=[_USER, _ASSISTANT],
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = _CHAT_TEMPLATE
    return tokenizer


def _source_names() -> list[str]:
    return [f'"arithmetic:{name}"' for name in VARIANTS]


def _draw_expression(rng: random.Random, held_out: bool) -> str:
    while True:
        expression = str(rng.randint(0, 9))
        for _ in range(_TERMS - 1):
            expression += rng.choice("+-") + str(rng.randint(0, 9))
        in_range = all(0 <= total <= _LARGEST_TOTAL for total in running_totals(expression))
        if in_range and is_held_out(expression) == held_out:
            return expression


def _terms(expression: str) -> list[str]:
    """With their signs, as text: a term may be ``-0``."""
    return re.findall(r"[+-]?\d+", expression)


def _write_solution(
    expression: str, operations_per_line: Sequence[int], rng: random.Random | None, error_rate: float
) -> str:
    first, *terms = _terms(expression)
    total = int(first)
    lines = []
    for count in operations_per_line:
        chunk, terms = terms[:count], terms[count:]
        left = str(total) + "".join(chunk)
        total += sum(map(int, chunk))
        if rng is not None and rng.random() < error_rate:
            total = rng.choice(_wrong_totals(total, [int(term) for term in terms]))
        lines.append(f"{left}={total}")
    return "\n".join([*lines, f"{_BOX}{total}}}"])


def _wrong_totals(right: int, remaining_terms: Sequence[int]) -> list[int]:
    """Totals near the right one from which the remaining terms stay within the range of the task."""
    lowest = highest = partial = 0
    for term in remaining_terms:
        partial += term
        lowest, highest = min(lowest, partial), max(highest, partial)
    first = max(right - _LARGEST_SLIP, -lowest)
    last = min(right + _LARGEST_SLIP, _LARGEST_TOTAL - highest)
    return [total for total in range(first, last + 1) if total != right]

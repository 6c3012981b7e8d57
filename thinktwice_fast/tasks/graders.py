r"""The built-in rewards: `math`, `choice` and `exact`, each 1.0 for a right response and 0.0 for a wrong one."""

import logging
import re

from thinktwice_fast.errors import Option, UserError
from thinktwice_fast.records import Problem
from thinktwice_fast.tasks.answers import MATH_FONT, TEXT_COMMAND, extract_boxed, settle

_BOXED_LETTER = re.compile(r"\(?\s*([A-Za-z])(?:\s*[).:].*)?", re.DOTALL)
_ANSWER_LETTER = re.compile(r"(?i:\banswer)(?i:\s+is|\s*:|\s+option|\s+choice)*[\s*:]*\(?([A-Z])\b(?!['’])")
_OPTION_LETTER = re.compile(r"(?i:\boption|\bchoice)(?i:\s+is|\s*:)*[\s*:]*\(?([A-Z])\b(?!['’])")
_LETTER_LINE = re.compile(r"[\s*]*\(?([A-Z])\)?[.:]?[\s*]*")


def grade_exact(completion: str, gold: str) -> float:
    """1.0 where the response equals the gold answer, both without surrounding white space."""
    return float(completion.strip() == gold.strip())


def grade_choice(completion: str, problem: Problem) -> float:
    """1.0 where the response's letter (see `choice_letter`) is the gold answer's (see `gold_letter`)."""
    return float(choice_letter(completion) == gold_letter(problem))


def gold_letter(problem: Problem) -> str:
    """The letter A-Z of a gold answer such as ``B``, ``(b)`` or ``B. forty``.

    Raises:
        UserError: the gold answer is not a letter.
    """
    gold = _BOXED_LETTER.fullmatch(problem.answer.strip())
    if gold is None:
        raise UserError(
            (
                f"row {problem.index} (from 0): the gold answer {problem.answer!r} is no letter A-Z, which ",
                Option("reward", "choice"),
                " compares with",
            ),
            ("use ", Option("reward", "exact")),
            "name an answer column that holds letters",
        )
    return gold.group(1).upper()


def choice_letter(completion: str) -> str | None:
    r"""The chosen letter A-Z of a response, or None.

    Where the response has a ``\boxed{}``, the letter in its last one (``C``, ``(c)``, ``\text{C. forty}``). Otherwise
    a last line that is only a letter, the last "answer is C" / "Answer: (C)", or the last "option C" / "choice C".
    """
    if "\\boxed" in completion:
        boxed = extract_boxed(completion)
        inner = MATH_FONT.sub(r"\1", TEXT_COMMAND.sub(r"\1", boxed)).replace("$", "").strip() if boxed else ""
        match = _BOXED_LETTER.fullmatch(inner)
        return match.group(1).upper() if match else None
    last_line = completion.strip().rpartition("\n")[2]
    alone = _LETTER_LINE.fullmatch(last_line)
    if alone:
        return alone.group(1)
    stated = _ANSWER_LETTER.findall(completion) or _OPTION_LETTER.findall(completion)
    return stated[-1] if stated else None


def grade_math(completion: str, gold: str) -> tuple[float | None, str]:
    r"""Reward of a response by its last ``\boxed{}``, as far as that is possible without math-verify.

    Returns:
        The reward, or None where `verify_math` has to decide; and the boxed answer (empty without one). No box, or an
        unclosed one: 0.0.
    """
    answer = extract_boxed(completion)
    if answer is None:
        return 0.0, ""
    settled = settle(answer, gold_answer(gold))
    return (None if settled is None else float(settled)), answer


def gold_answer(gold: str) -> str:
    r"""The gold answer itself where a source gives a whole solution with a ``\boxed{}``."""
    boxed = extract_boxed(gold)
    return gold if boxed is None else boxed


def prepare_math_verify() -> None:
    """Import math-verify, so that its seconds of start-up do not count as grading time."""
    import math_verify  # noqa: F401

    # It warns that its own time limits are off. They rest on signals, which cannot interrupt a long operation on
    # integers; the process that runs this is killed from outside instead.
    logging.getLogger("math_verify").setLevel(logging.CRITICAL)
    logging.getLogger("latex2sympy2_extended").setLevel(logging.CRITICAL)


def verify_math(answer: str, gold: str) -> bool:
    r"""Whether math-verify takes an answer for equal to the gold one; either may be LaTeX or a plain expression.

    May run for ever (``9**9**9``): call it in a process that can be killed.
    """
    from math_verify import parse, verify

    try:
        golds = parse(f"\\boxed{{{gold}}}", parsing_timeout=None)
        answers = parse(f"\\boxed{{{answer}}}", parsing_timeout=None)
        return bool(verify(golds, answers, timeout_seconds=None))
    except Exception:  # sympy raises anything on malformed input, which a model may well write
        return False

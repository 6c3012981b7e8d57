r"""The built-in rewards, by name in `GRADERS`: each 1.0 for a right response and 0.0 for a wrong one."""

import logging
import re
from collections.abc import Callable
from typing import NamedTuple

from thinktwice_fast.errors import Option, UserError
from thinktwice_fast.records import Problem
from thinktwice_fast.tasks import strict
from thinktwice_fast.tasks.answers import MATH_FONT, TEXT_COMMAND, extract_boxed, settle

_BOXED_LETTER = re.compile(r"\(?\s*([A-Za-z])(?:\s*[).:].*)?", re.DOTALL)
_ANSWER_LETTER = re.compile(r"(?i:\banswer)(?i:\s+is|\s*:|\s+option|\s+choice)*[\s*:]*\(?([A-Z])\b(?!['’])")
_OPTION_LETTER = re.compile(r"(?i:\boption|\bchoice)(?i:\s+is|\s*:)*[\s*:]*\(?([A-Z])\b(?!['’])")
_LETTER_LINE = re.compile(r"[\s*]*\(?([A-Z])\)?[.:]?[\s*]*")


class Doubt(NamedTuple):
    """An answer that only a computer-algebra system can judge."""

    answer: str
    gold: str


class BuiltIn(NamedTuple):
    """A way to grade: at once, where that can be done, and otherwise in a process that can be killed."""

    grade: Callable[[str, Problem], float | Doubt]  # a response; without libraries, in microseconds
    verify: Callable[[str, str], bool] | None = None  # whether a doubtful answer equals its gold one; may never end
    check: Callable[[Problem], object] = lambda problem: None  # raises UserError for a problem that it cannot grade


def grade_exact(completion: str, problem: Problem) -> float:
    """1.0 where the response equals the gold answer, both without surrounding white space."""
    return float(completion.strip() == problem.answer.strip())


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


def grade_math(completion: str, problem: Problem) -> float | Doubt:
    r"""Reward of a response by its last ``\boxed{}``: 0.0 without one, or with an unclosed one."""
    answer = extract_boxed(completion)
    if answer is None:
        return 0.0
    gold = gold_answer(problem.answer)
    settled = settle(answer, gold)
    return Doubt(answer, gold) if settled is None else float(settled)


def grade_math_strict(completion: str, problem: Problem) -> float | Doubt:
    """As `grade_math`, by the rules of `strict`."""
    answer = strict.boxed(completion)
    gold = strict.boxed(problem.answer) if "\\boxed" in problem.answer else problem.answer
    if answer is None or gold is None:
        return 0.0
    settled = strict.settle(answer, gold)
    return Doubt(answer, gold) if settled is None else float(settled)


def gold_answer(gold: str) -> str:
    r"""The gold answer itself where a source gives a whole solution with a ``\boxed{}``."""
    boxed = extract_boxed(gold)
    return gold if boxed is None else boxed


def prepare() -> None:
    """Import what `BuiltIn.verify` needs and use it once, so that this does not count as grading time."""
    # math-verify warns that its own time limits are off. They rest on signals, which cannot interrupt a long operation
    # on integers; the process that runs this is killed from outside instead.
    for library in ("math_verify", "latex2sympy2_extended", "pylatexenc"):
        logging.getLogger(library).setLevel(logging.CRITICAL)
    for verify in (verify_math, strict.equal):
        assert verify(r"\sqrt{2}+\frac{x}{2}", r"x/2+\sqrt2")


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


GRADERS = {
    "math": BuiltIn(grade_math, verify_math),
    "math_strict": BuiltIn(grade_math_strict, strict.equal),
    "choice": BuiltIn(grade_choice, check=gold_letter),
    "exact": BuiltIn(grade_exact),
}
"""The built-in rewards by the name that the option `reward` takes."""

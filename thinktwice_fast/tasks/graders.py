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
_PRONOUN = r"I[ \t]+(?:am|believe|can|chose|choose|do|get|got|guess|have|know|need|pick|say|think|was|will|would)\b"
_STATED = rf"[\s*:]*\(?(?!{_PRONOUN})([A-Z])\b(?!['’])"  # a letter, and not "I think" or "I'd"
_ANSWER_LETTER = re.compile(r"(?i:\banswer)(?i:\s+is|\s*:|\s+option|\s+choice)*" + _STATED)
_OPTION_LETTER = re.compile(r"(?i:\boption|\bchoice)(?i:\s+is|\s*:)*" + _STATED)
_YES_NO = {"yes": "yes", "true": "yes", "no": "no", "false": "no"}
_WORD = rf"(?i:{'|'.join(_YES_NO)})"
_WORD_LINE = re.compile(rf"[\s*]*({_WORD})[.!]?[\s*]*")
_ANSWER_WORD = re.compile(rf"(?i:\banswer)(?i:\s+is|\s*:)*[\s*:]*({_WORD})\b")
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
        raise _unfit_gold(problem, "no letter A-Z", "choice", "letters")
    return gold.group(1).upper()


def _unfit_gold(problem: Problem, what: str, reward: str, wanted: str) -> UserError:
    """The gold answer is ``what``, and ``reward`` compares with ``wanted``."""
    return UserError(
        (
            f"row {problem.index} (from 0): the gold answer {problem.answer!r} is {what}, which ",
            Option("reward", reward),
            " compares with",
        ),
        ("use ", Option("reward", "exact")),
        f"name an answer column that holds {wanted}",
    )


def choice_letter(completion: str) -> str | None:
    r"""The chosen letter A-Z of a response, or None.

    Where the response has a ``\boxed{}``, the letter in its last one (``C``, ``(c)``, ``\text{C. forty}``). Otherwise
    a last line that is only a letter, the last "answer is C" / "Answer: (C)", or the last "option C" / "choice C".
    """
    if "\\boxed" in completion:
        match = _BOXED_LETTER.fullmatch(_boxed_text(completion))
        return match.group(1).upper() if match else None
    alone = _LETTER_LINE.fullmatch(_last_line(completion))
    if alone:
        return alone.group(1)
    stated = _ANSWER_LETTER.findall(completion) or _OPTION_LETTER.findall(completion)
    return stated[-1] if stated else None


def grade_yes_no(completion: str, problem: Problem) -> float:
    """1.0 where the response's yes or no (see `yes_or_no`) is the gold answer's (see `gold_yes_no`)."""
    return float(yes_or_no(completion) == gold_yes_no(problem))


def gold_yes_no(problem: Problem) -> str:
    """ "yes" or "no" of a gold answer that is yes, no, true or false, in any case.

    Raises:
        UserError: the gold answer is none of them.
    """
    gold = _YES_NO.get(problem.answer.strip().lower())
    if gold is None:
        raise _unfit_gold(problem, "neither yes nor no", "yes_no", "them")
    return gold


def yes_or_no(completion: str) -> str | None:
    r""" "yes" or "no" of a response, or None; true and false count as they do.

    Where the response has a ``\boxed{}``, the word in its last one. Otherwise a last line that is only such a word, or
    the last "answer is yes" / "Answer: no".
    """
    if "\\boxed" in completion:
        alone = _WORD_LINE.fullmatch(_boxed_text(completion))
        return _YES_NO[alone.group(1).lower()] if alone else None
    alone = _WORD_LINE.fullmatch(_last_line(completion))
    stated = [alone.group(1)] if alone else _ANSWER_WORD.findall(completion)
    return _YES_NO[stated[-1].lower()] if stated else None


def _boxed_text(completion: str) -> str:
    boxed = extract_boxed(completion)
    return MATH_FONT.sub(r"\1", TEXT_COMMAND.sub(r"\1", boxed)).replace("$", "").strip() if boxed else ""


def _last_line(completion: str) -> str:
    return completion.strip().rpartition("\n")[2]


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
    "yes_no": BuiltIn(grade_yes_no, check=gold_yes_no),
    "exact": BuiltIn(grade_exact),
}
"""The built-in rewards by the name that the option `reward` takes."""

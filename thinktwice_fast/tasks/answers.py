r"""Taking the final answer out of a response, and judging it without a computer-algebra system where that can be done.

Most answers of a training run are plain numbers. They are compared here as exact rationals, in microseconds; only what
is left needs math-verify, which may take seconds or never end.
"""

import re
from fractions import Fraction
from functools import lru_cache
from typing import NamedTuple

_LONGEST_NUMBER = 200  # characters; bounds the work of exact arithmetic on what a model may write
_LARGEST_EXPONENT = 1000

_DECIMAL = r"(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d*)?|\.\d+"
_EXPONENT = r"[+-]?\d{1,4}"
_NUMBER = re.compile(
    rf"""(?P<sign>[+-]?)
    (?: \\frac\{{(?P<top>{_DECIMAL})\}}\{{(?P<bottom>{_DECIMAL})\}}
      | \\frac(?P<top_digit>\d)(?P<bottom_digit>\d)
      | (?P<numerator>{_DECIMAL})/(?P<denominator>{_DECIMAL})
      | (?P<plain>{_DECIMAL})
        (?: [eE](?P<exponent>{_EXPONENT}) | (?:\\times|\\cdot)\s?10\^(?:\{{(?P<power>{_EXPONENT})\}}|(?P<digit>\d)) )?
    )(?P<percent>%?)""",
    re.VERBOSE,
)
_BOX = re.compile(r"\\(?:boxed|fbox)\s*(?:\{|(?P<bare>[^\s{}$][^$]*))")
_ONE_FORMULA = re.compile(r"\$([^$]+)\$")
TEXT_COMMAND = re.compile(r"\\text(?:bf|rm|it)?\s*\{([^{}]*)\}")
MATH_FONT = re.compile(r"\\(?:math(?:rm|bf|it|sf)|boldsymbol|bm)\s*\{([^{}]*)\}")

# How a calculation is told from a number: everything that is one number by itself becomes a "#", and then there must
# be no operator between two of them.
_ONE = "#"
_TIMES = re.compile(r" ?(?:\\(?:times|cdotp?|ast|div|over)(?![A-Za-z])|[*×·⋅∙∗÷]) ?")
_PLUS_MINUS = re.compile(r" ?\\(?:pm|mp)(?![A-Za-z]) ?")
_UNIT_POWER = re.compile(r"(?<=[A-Za-z])\}?\^(?:\{[+-]?\d+\}|[+-]?\d)|\^(?:\\circ|\{\\circ\})")
_MIXED_NUMBER = re.compile(r"(?<!\d)\d+ ?(?:\\frac\{(\d{1,9})\}\{(\d{1,9})\}|\\frac(\d)(\d)|(?<= )(\d{1,9})/(\d{1,9}))")
_POWER_OF_TEN = re.compile(rf"(?<!\d)(?:(?:{_DECIMAL})\*)?10\^(?:\{{{_EXPONENT}\}}|\d)")
_ROOT_OR_PI = re.compile(
    rf"(?:(?<!\d)(?:{_DECIMAL}))?(?:\\sqrt(?:\[\d+\])?(?:\{{(?:{_DECIMAL})\}}|\d)|\\pi(?![A-Za-z]))"
)
_OPERAND = rf"[+-]?(?:{_DECIMAL}|{_ONE})"
_FRACTION_OR_NUMBER = re.compile(
    rf"""\\frac(?:\{{{_OPERAND}\}}|\d)(?:\{{{_OPERAND}\}}|\d)
    | (?<!\d)(?:{_DECIMAL}|{_ONE})(?:[/:]{_OPERAND}|[eE]{_EXPONENT})?""".replace(_ONE, rf"\{_ONE}"),
    re.VERBOSE,
)
_OPERATOR = re.compile(r"[*/^:]|(?<![=(\[{,;|<>])[-+]")
_NESTED_FRACTION = rf"\frac{{{_ONE}"  # single ones are gone when it is looked for
_QUANTITY = re.compile(  # a number with its name or its unit: x=5, 5 cm, 5\text{ cm}^2, 60^\circ
    r"(?:[A-Za-z]=)?(?P<number>.+?)"
    r"(?:\^(?:\\circ|\{\\circ\})| [A-Za-z][A-Za-z ]*|\\(?:text|mathrm)\{[^{}]*\}(?:\^(?:\d|\{\d\}))?)?"
)
_OPEN_SUM = re.compile(r"[\d.+\-=\s]+")  # also 8- and 4=4, which end or begin in the middle of a calculation
_LATEX_SPACES = re.compile(r"\\[!,;: ]|~|\\left(?![a-zA-Z])|\\right(?![a-zA-Z])")
_NEEDLESS_SPACES = re.compile(r"(?<![A-Za-z0-9]) | (?![A-Za-z0-9])")


class Number(NamedTuple):
    """An exact number as it was written; ``value`` leaves a percent sign aside (50 % -> 50)."""

    value: Fraction
    percent: bool


def final_answer(text: str) -> str | None:
    r"""The gold answer itself out of a text that a source gives for it.

    The part after the last ``####`` (GSM8K), else the content of the last box of a worked solution (``\boxed{5}``,
    ``\boxed 5`` up to the end of its formula, ``\fbox{5}``: MATH has all three), else the text as it is; each without
    surrounding white space and dollar signs. None where there is a box without content that can be told.
    """
    _, marked, after = text.rpartition("####")
    if marked:
        return after.strip()
    box = max(text.rfind("\\boxed"), text.rfind("\\fbox"))
    if box < 0:
        formula = _ONE_FORMULA.fullmatch(text.strip())
        return formula[1].strip() if formula else text.strip()
    opening = _BOX.match(text, box)
    if opening is None:
        return None
    inner = _braced(text, opening.end()) if opening["bare"] is None else opening["bare"].rstrip(" .\n")
    return inner and inner.strip()


def extract_boxed(text: str) -> str | None:
    r"""Content of the last ``\boxed{...}``, with its inner braces balanced (``\{`` and ``\}`` do not count).

    None where there is no box, or where the last one is not closed.
    """
    start = text.rfind("\\boxed")
    opening = re.compile(r"\\boxed\s*\{").match(text, start) if start >= 0 else None
    return None if opening is None else _braced(text, opening.end())


def _braced(text: str, start: int) -> str | None:
    """What stands from ``start``, behind an opening brace, to the brace that closes it; None where none does."""
    depth, position = 1, start
    while position < len(text):
        character = text[position]
        if character == "\\":
            position += 1
        elif character == "{":
            depth += 1
        elif character == "}":
            depth -= 1
            if depth == 0:
                return text[start:position]
        position += 1
    return None


def normalise(answer: str) -> str:
    r"""The answer without what changes only its looks.

    Dropped: dollar signs, LaTeX spacing, ``\left`` and ``\right``, spaces beside anything but letters and digits, a
    full stop at the end. ``\dfrac`` and ``\tfrac`` become ``\frac``, ``\%`` becomes ``%``.
    """
    text = answer.replace("\\$", "").replace("$", "").replace("\\%", "%").replace("{,}", ",")
    text = text.replace("\\dfrac", "\\frac").replace("\\tfrac", "\\frac").replace("−", "-")
    text = " ".join(_LATEX_SPACES.sub(" ", text).split())
    text = _NEEDLESS_SPACES.sub("", text)
    return text.removesuffix(".").removesuffix("\\")


def parse_number(text: str) -> Number | None:
    r"""An exact number from normalised text, or None.

    Understood: integers, decimals, thousands (``1,000``), fractions (``3/4``, ``\frac{3}{4}``, ``\frac34``), powers of
    ten (``4.5e33``, ``4.5\times10^{33}``), each with a sign and a percent sign.
    """
    match = _NUMBER.fullmatch(text) if len(text) <= _LONGEST_NUMBER else None
    if match is None:
        return None
    part = match.groupdict()
    top = part["top"] or part["top_digit"] or part["numerator"] or part["plain"]
    bottom = part["bottom"] or part["bottom_digit"] or part["denominator"] or "1"
    exponent = int(part["exponent"] or part["power"] or part["digit"] or 0)
    denominator = _decimal(bottom)
    if denominator == 0 or abs(exponent) > _LARGEST_EXPONENT:
        return None
    value = _decimal(top) / denominator * Fraction(10) ** exponent
    return Number(-value if part["sign"] == "-" else value, bool(part["percent"]))


def numbers_equal(first: Number, second: Number) -> bool:
    """Exact equality; a percent sign may be read as "/100" or be left out where only one side has it."""
    if first.value == second.value:
        return True
    if first.percent == second.percent:
        return False
    share, other = (first, second) if first.percent else (second, first)
    return share.value / 100 == other.value


@lru_cache(4096)  # the samples of a problem often agree
def settle(answer: str, gold: str) -> bool | None:
    """Whether an answer is right, or None where only a computer-algebra system can tell.

    True: the same text after `normalise`, or equal numbers. False, where the gold answer is a number: another number;
    text without digits or LaTeX commands; or a calculation that was not carried out (``2+3``, see `is_calculation`),
    since a model would otherwise be paid for copying the question into its box. That holds where the number has a name
    or a unit too (``x=5``, ``5 cm``); a gold answer that is an expression itself is left to the algebra system.
    """
    answer, gold = normalise(answer), normalise(gold)
    if not answer or not gold:
        return False
    if answer == gold:
        return True
    gold_number = parse_number(gold)
    if gold_number is None:
        return False if _is_quantity(gold) and is_calculation(answer) else None
    number = parse_number(answer)
    if number is not None:
        return numbers_equal(number, gold_number)
    is_words = "\\" not in answer and not any(character.isdigit() for character in answer)
    return False if is_words or _OPEN_SUM.fullmatch(answer) or is_calculation(answer) else None


def is_calculation(answer: str) -> bool:
    r"""Whether two numbers in normalised text have an operator between them, or a fraction stands within a fraction.

    Operators: ``+ - * / ^ :``, ``\times``, ``\cdot``, ``\div`` and their like. One number is a decimal, a single
    fraction or ratio (``3/4``, ``\frac{\pi}{3}``), a mixed number (``1\frac{1}{2}``), a power of ten (``10^{3}``,
    ``1.5 \times 10^{3}``), a root or pi with or without a factor in front (``2\sqrt2``). What stands in ``\text{}`` and
    the exponents of units do not count.
    """
    text = _UNIT_POWER.sub("", MATH_FONT.sub(r"\1", TEXT_COMMAND.sub("u", answer.replace("**", "^"))))
    text = _PLUS_MINUS.sub("+", _TIMES.sub("*", text))
    text = _MIXED_NUMBER.sub(_one_if_proper, text)
    for one_number in (_POWER_OF_TEN, _ROOT_OR_PI, _FRACTION_OR_NUMBER):
        text = one_number.sub(_ONE, text)
    first, last = text.find(_ONE), text.rfind(_ONE)
    return first < last and (_NESTED_FRACTION in text or _OPERATOR.search(text, first + 1, last) is not None)


def _one_if_proper(mixed: re.Match[str]) -> str:
    top, bottom = (int(digits) for digits in mixed.groups() if digits is not None)
    return _ONE if top < bottom else f"{_ONE}+{_ONE}"  # 5\frac{12}{1} is a sum in disguise


def _is_quantity(text: str) -> bool:
    match = _QUANTITY.fullmatch(text)
    return match is not None and parse_number(match["number"]) is not None


def _decimal(digits: str) -> Fraction:
    return Fraction(digits.replace(",", "").removesuffix("."))

r"""The maths grader of ThinkTwice's released code: two ways to write an answer plainly, then sympy.

An answer is right when its first plain form is the gold answer's (the form that came with the MATH data set), or when
each of its parts equals the gold answer's in the second form (the one of PRM800K), as text or by sympy's `simplify`.
Stricter than math-verify: a fraction must be reduced, an integer must be written as one, and what is no tuple in
brackets is compared as a whole.

The rules, odd ones included, are those of `grade(..., fast=True)` in `hendrycks_math_grader.py` of
https://github.com/CSSLab/ThinkTwice, so that rewards and accuracies compare with those of the paper (arXiv 2604.01591).
"""

import functools
import math
import re
from typing import Any

_INTEGER = re.compile(r"-?\d{1,15}", re.ASCII)  # exact as floats, which the second form goes through

# Words that the first form drops where no letter or digit is beside them. Each is a pattern; their order matters.
_WORDS = (
    "east|degree|mph|kmph|ft|m sqaure| m east|sq m|deg|mile|q .|monkey|prime|ratio|profit of rs|rd|o|gm|p . m|lb|tile|"
    "per|dm|lt|gain|ab|way|west|a .|b .|c .|d .|e .|f .|g .|h .|t|a|h|no change|men|soldier|pie|bc|excess|st|inches|"
    "noon|percent|by|gal|kmh|c|acre|rise|a . m|th|π r 2|sq|mark|l|toy|coin|sq . m|gallon|° f|profit|minw|yr|women|"
    "feet|am|pm|hr|cu cm|square|v â € ™|are|rupee|rounds|cubic|cc|mtr|s|ohm|number|kmph|day|hour|minute|min|second|"
    "man|woman|sec|cube|mt|sq inch|mp|∏ cm ³|hectare|more|sec|unit|cu . m|cm 2|rs .|rs|kg|g|month|km|m|cm|mm|apple|"
    "liter|loss|yard|pure|year|increase|decrease|d|less|Surface|litre|pi sq m|s .|metre|meter|inch"
)
_WORD_PATTERNS = [  # each with what a text that it matches holds
    ("" if "." in word else word, re.compile(rf"(^|\W){word}($|\W)"))
    for ending in ("", "s")
    for word in (f"{word}{ending}" for word in _WORDS.split("|"))
]
_SYNONYMS = (
    *(("\n", ""), ("\\!", ""), ("\\\\", "\\")),
    *(("tfrac", "frac"), ("dfrac", "frac"), ("\\neq", "\\ne"), ("\\leq", "\\le"), ("\\geq", "\\ge")),
    *(("\\left", ""), ("\\right", ""), ("\\end{array}", "\\end{pmatrix}"), ("bmatrix", "pmatrix")),
)
_ARRAY = re.compile(r"\\begin\{array\}\{.*?\}")
_LAST_TEXT = re.compile(r"\\text{.*?}$")
_ONLY_TEXT = re.compile(r"^\\text\{(.+?)\}$")

# The second form drops these with a plural ending and a power behind them.
_UNITS = "degree cm centimeter meter mile second minute hour day week month year foot feet inch yard"
_UNIT_PATTERNS = [re.compile(rf"{unit}(es)?(s)? *(\^[0-9]+)?") for unit in _UNITS.split()]
_AS_TEXT = (("√", "sqrt"), ("π", "pi"), ("∞", "inf"), ("∪", "U"), ("·", "*"), ("×", "*"))
_BRACKETS = "()[]"
_FRACTION = re.compile(r"^-?[0-9]+.?/0*[1-9][0-9]*.?$")
_THOUSANDS = re.compile(r"(\d),(\d\d\d)($|\D)")
_POWERS_LEFT_ALONE = re.compile(r"\^[{(]|\^[0-9]+\^|\^[0-9][0-9]+")  # sympy could work on them for ever
_MOST_LETTERS = 2  # different ones; more are words, or too many variables


def boxed(text: str) -> str | None:
    r"""Content of the last ``\boxed{...}``, or None.

    Unlike `answers.extract_boxed` it counts ``\{`` and ``\}`` as braces, and knows no space before the brace.
    """
    start = text.rfind("\\boxed{")
    if start < 0 or start < text.rfind("\\boxed"):
        return None
    begin = start + len("\\boxed{")
    depth = 1
    for place in range(begin, len(text)):
        depth += {"{": 1, "}": -1}.get(text[place], 0)
        if not depth:
            return text[begin:place]
    return None


def settle(answer: str, gold: str) -> bool | None:
    """Whether an answer is right, where that can be told at once: the same text, or two integers; else None."""
    if answer == gold:
        return True
    if _INTEGER.fullmatch(answer) and _INTEGER.fullmatch(gold):
        return int(answer) == int(gold)
    return None


def equal(answer: str, gold: str) -> bool:
    """Whether an answer is right. May run for ever (``9**9**9``): call it in a process that can be killed."""
    return first_form(answer) == first_form(gold) or _equal_parts(second_form(answer), second_form(gold))


def first_form(answer: str) -> str:
    r"""The answer without units, degrees, percent signs and spaces, its short fractions and roots in full.

    ``\frac12``, ``1/2`` and ``0.5`` become ``\frac{1}{2}``, ``x=5`` becomes ``5``, ``3\text{ cm}`` becomes ``3``. What
    cannot be read (``\frac`` or ``\sqrt`` without anything behind it) stays as it was.
    """
    answer = answer.strip()
    only_text = _ONLY_TEXT.search(answer)
    if only_text:
        answer = only_text[1].strip()
    try:
        return _plain(answer)
    except _UnreadableError:
        return answer


class _UnreadableError(Exception):
    pass


def _plain(text: str) -> str:
    for written, meant in _SYNONYMS:
        text = text.replace(written, meant)
    text = _ARRAY.sub(r"\\begin{pmatrix}", text)
    text = _without_words(_LAST_TEXT.sub("", text).strip() or text)
    for sign in ("^{\\circ}", "^\\circ", "\\$"):
        text = text.replace(sign, "")
    if text.count("\\text{ ") > 1:
        raise _UnreadableError
    text = text.partition("\\text{ ")[0].replace("\\%", "").replace(" .", " 0.").replace("{.", "{0.")
    if text.startswith("."):
        text = "0" + text
    left, *right = text.split("=")
    if len(right) == 1 and len(left) <= 2:
        text = right[0]
    text = _full_fractions(_full_roots(text).replace(" ", ""))
    return _slash_as_fraction("\\frac{1}{2}" if text == "0.5" else text)


def _without_words(text: str) -> str:
    for _ in range(2):
        for part, pattern in _WORD_PATTERNS:
            if part in text:
                text = pattern.sub(r"\1\2", text) or text
    return text


def _full_roots(text: str) -> str:
    head, *pieces = text.split("\\sqrt")
    if "" in pieces:
        raise _UnreadableError
    return head + "".join(
        f"\\sqrt{piece}" if piece[0] == "{" else f"\\sqrt{{{piece[0]}}}{piece[1:]}" for piece in pieces
    )


def _full_fractions(text: str) -> str:
    full, *pieces = text.split("\\frac")
    for piece in pieces:
        if not piece:
            raise _UnreadableError
        if piece[0] == "{":
            full += f"\\frac{piece}"
        elif len(piece) == 1:
            return text
        else:
            bottom = piece[1:] if piece[1] == "{" else f"{{{piece[1]}}}{piece[2:]}"
            full += f"\\frac{{{piece[0]}}}{bottom}"
    return full


def _slash_as_fraction(text: str) -> str:
    top, slash, bottom = text.partition("/")
    try:
        same = slash and f"{int(top)}/{int(bottom)}" == text
    except ValueError:
        return text
    return f"\\frac{{{top}}}{{{bottom}}}" if same else text


def second_form(answer: str) -> str:
    r"""The answer as small letters that sympy may read: LaTeX as text (``\sqrt{2}`` as ``sqrt(2)``), units left out.

    Integers are written as such (``5.0`` as ``5``), mixed numbers as sums (``1 1/2`` as ``1+1/2``).
    """
    only_text = _ONLY_TEXT.search(answer)
    text = only_text[1] if only_text else answer
    for sign in ("\\%", "\\$", "$", "%"):
        text = text.replace(sign, sign[1:])
    text = text.replace("$", "").replace("%", "").replace(" or ", " , ").replace(" and ", " , ")
    for word, power in (("million", 6), ("billion", 9), ("trillion", 12)):
        text = text.replace(word, f"*10^{power}")
    for pattern in _UNIT_PATTERNS:
        text = pattern.sub("", text)
    text = re.sub(r"\^ *\\circ", "", text)
    if text[:1] == "{" and text[-1:] == "}":
        text = text[1:-1]
    text = re.sub(r",\\! *", "", text)
    number = _float(text)
    if number is not None and _near_integer(number):
        text = str(round(number))
    if "\\" in text:
        text = _latex_as_text(text)
    text = re.sub(r"([0-9]) +([0-9])", r"\1+\2", re.sub("- *", "-", text))
    text = text.replace(" ", "").replace("{", "").replace("}", "").lower()
    return str(int(float(text.replace(",", "")))) if _is_integer(text) else text


def _latex_as_text(text: str) -> str:
    text = text.replace("\\tfrac", "\\frac").replace("\\dfrac", "\\frac")
    text = text.replace("\\frac", " \\frac")  # 1\frac12 is a mixed number
    converter = _converter()
    try:
        text = converter.latex_to_text(text)
    except Exception:  # of whatever kind: a model may write anything
        return text
    for sign, name in _AS_TEXT:
        text = text.replace(sign, name)
    return text.strip()


@functools.cache
def _converter() -> Any:
    from pylatexenc.latex2text import LatexNodes2Text

    return LatexNodes2Text()


def _equal_parts(answer: str, gold: str) -> bool:
    if answer == gold:
        return True
    if not answer:
        return False
    parts, gold_parts = _parts(answer), _parts(gold)
    if len(gold_parts) > 1 and (answer[0] != gold[0] or answer[-1] != gold[-1]):
        return False
    return len(parts) == len(gold_parts) and all(map(_equal_part, parts, gold_parts))


def _parts(text: str) -> list[str]:
    """What stands between the commas of a tuple or an interval; the whole of anything else."""
    text = _without_thousands(text)
    inner = text[1:-1]
    if inner and text[0] in _BRACKETS and text[-1] in _BRACKETS and not any(sign in inner for sign in _BRACKETS):
        return [part.strip() for part in inner.split(",")]
    return [text] if text else []


def _equal_part(answer: str, gold: str) -> bool:
    if _FRACTION.search(gold) and _FRACTION.search(answer):
        return answer == gold
    if _is_integer(gold) != _is_integer(answer):
        return False
    difference = f"({gold})-({answer})"
    letters = {letter for letter in difference.replace("sqrt", "").replace("frac", "") if letter.isalpha()}
    if len(letters) > _MOST_LETTERS or _POWERS_LEFT_ALONE.search(difference):
        return False
    try:
        return bool(_simplified(difference) == 0)
    except Exception:  # sympy raises anything on malformed input
        return False


def _simplified(expression: str) -> Any:
    # `parse_expr` evaluates Python, but what names it can build of two letters harms no one.
    import sympy
    from sympy.parsing import sympy_parser

    rules = (*sympy_parser.standard_transformations, sympy_parser.implicit_multiplication_application)
    return sympy.simplify(sympy_parser.parse_expr(expression.replace("^", "**"), transformations=rules))


def _without_thousands(text: str) -> str:
    while True:
        shorter = _THOUSANDS.sub(r"\1\2\3", text)
        if shorter == text:
            return text
        text = shorter


def _is_integer(text: str) -> bool:
    number = _float(_without_thousands(text))
    return number is not None and _near_integer(number)


def _near_integer(number: float) -> bool:
    return math.isfinite(number) and abs(number - round(number)) <= 1e-7


def _float(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None

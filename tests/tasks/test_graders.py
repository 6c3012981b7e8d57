import pytest

from thinktwice_fast.errors import UserError
from thinktwice_fast.records import Problem
from thinktwice_fast.tasks.graders import (
    choice_letter,
    gold_answer,
    grade_choice,
    grade_exact,
    grade_math,
    grade_yes_no,
    yes_or_no,
)


def problem(answer: str) -> Problem:
    return Problem(7, ({"role": "user", "content": "q"},), answer)


@pytest.mark.parametrize(
    ("completion", "letter"),
    [
        (r"so \boxed{C}", "C"),
        (r"\boxed{c}", "C"),
        (r"\boxed{(B)}", "B"),
        (r"\boxed{\text{(D) forty}}", "D"),
        (r"\boxed{\textbf{A. one}}", "A"),
        (r"\boxed{A} and \boxed{B}", "B"),
        (r"\boxed{Carbon}", None),
        (r"\boxed{}", None),
        (r"the answer is A but \boxed{A", None),
        ("I think the answer is (B).", "B"),
        ("**Answer:** C", "C"),
        ("Answer: A, no. The answer is D because of E", "D"),
        ("weighing it\n\n(E)", "E"),
        ("B.", "B"),
        ("the answer is a mess", None),
        ("The correct option is **C**.", "C"),
        ("The answer is I'm not sure", None),
        ("The answer is B. To say it again, the answer: I chose it.", "B"),
        ("my answer: I guess option D", "D"),
        ("Answer: I.", "I"),
        ("The answer is I because of E", "I"),
        ("Answer: I\nsince the others are wrong", "I"),
        ("The answer is option C, because option A is wrong.", "C"),
        ("So I choose option B", "B"),
        (r"\boxed{A, B}", None),
        ("", None),
    ],
)
def test_choice_letter(completion: str, letter: str | None) -> None:
    assert choice_letter(completion) == letter


def test_choice_compares_letters() -> None:
    assert grade_choice(r"\boxed{b}", problem("(B)")) == 1.0
    assert grade_choice(r"\boxed{A}", problem("B")) == 0.0
    assert grade_choice("dunno", problem("B")) == 0.0


def test_choice_needs_a_letter_as_gold_answer() -> None:
    with pytest.raises(UserError, match=r"row 7 \(from 0\): the gold answer '42' is no letter .* use --reward exact"):
        grade_choice("A", problem("42"))


@pytest.mark.parametrize(
    ("completion", "word"),
    [
        ("so \\boxed{Yes}", "yes"),
        ("\\boxed{\\text{no.}}", "no"),
        ("\\boxed{true}", "yes"),
        ("yes \\boxed{perhaps}", None),
        ("Weighing it.\n**No**", "no"),
        ("The answer is yes, as no one", "yes"),
        ("Answer: No", "no"),
        ("no idea", None),
    ],
)
def test_yes_or_no(completion: str, word: str | None) -> None:
    assert yes_or_no(completion) == word
    assert grade_yes_no(completion, problem("True")) == (word == "yes")


def test_yes_no_needs_one_of_them_as_gold_answer() -> None:
    with pytest.raises(UserError, match=r"the gold answer 'maybe' is neither yes nor no"):
        grade_yes_no("yes", problem("maybe"))


def test_exact_strips() -> None:
    assert grade_exact(" yes\n", problem("yes ")) == 1.0
    assert grade_exact("Yes", problem("yes")) == 0.0


def test_math_settles_numbers_and_leaves_the_rest() -> None:
    assert grade_math(r"thus \boxed{1/2}", problem("0.5")) == 1.0
    assert grade_math(r"thus \boxed{3}", problem("0.5")) == 0.0
    assert grade_math("0.5", problem("0.5")) == 0.0
    assert grade_math(r"\boxed{0.5", problem("0.5")) == 0.0
    assert grade_math(r"\boxed{\sqrt8}", problem(r"2\sqrt2")) == (r"\sqrt8", r"2\sqrt2")


def test_gold_answer_out_of_a_solution() -> None:
    assert gold_answer(r"We add: \boxed{5}") == "5"
    assert gold_answer("5") == "5"

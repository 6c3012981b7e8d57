r"""Word problems of one or two steps, with worked solutions and rechecks, for a small instruct model to learn from.

``python -m examples.word_problems FOLDER`` writes ``train.jsonl`` and ``held_out.jsonl`` (columns ``question`` and
``answer``) and ``warm_up.jsonl`` (``messages``: a solution, or a draft and its recheck, for ``--algorithm sft``), the
same every time. A calculation is either held out (1 in 16) or trained on, whatever words it comes in.

A solution has an operation in each line, a recheck takes tens and ones by themselves, which is easier::

    18 + 47 = 65        18 + 40 = 58
    \boxed{65}          58 + 7 = 65
                        \boxed{65}
"""

import argparse
import hashlib
import json
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

RECHECK = "Recheck your solution, tens and ones by themselves."
"""The refine instruction that rechecks answer."""

ROWS = {"train": 8192, "held_out": 512, "warm_up": 2048}
"""Rows of each file."""

Operation = tuple[str, int]
"""A sign (``+``, ``-`` or ``*``) and a number, applied to the total so far."""

_INSTRUCTION = "Put your final answer inside \\boxed{}."
_HELD_OUT_ONE_IN = 16
_RECHECKS, _SLIPS = 0.5, 0.4  # chances: that an example is a recheck, and that a line of its draft is wrong
_LARGEST_SLIP = 10
_SIGNS = ("+", "-", "*", "+-", "-+", "*+", "*-")  # of a problem's operations
_NAMES = ("Ada", "Ben", "Carla", "Deniz", "Ella", "Farid", "Gina", "Hugo", "Ines", "Jonas", "Kemal", "Lena", "Mira",
          "Noah", "Olga", "Pavel", "Rosa", "Samir", "Tilda", "Yusuf")  # fmt: skip
_UNITS = ("apples", "beads", "books", "buttons", "cards", "coins", "eggs", "grams of flour", "litres of milk",
          "marbles", "metres of rope", "nails", "pencils", "plums", "seeds", "stamps", "stones", "tickets")  # fmt: skip
_HOLDERS = ("bags", "boxes", "crates", "drawers", "jars", "rows", "sacks", "trays")
_BEGINNINGS = (
    "{name} has {total} {unit}.",
    "There are {total} {unit} in {name}'s shed.",
    "{name} counts {total} {unit}.",
)
_TEXTS = {
    "+": ("{other} brings {n} more.", "Then {n} more are delivered.", "{name} buys another {n}."),
    "-": ("{other} takes {n} of them away.", "Then {n} of them are used up.", "{name} sells {n} of them."),
    "*": ("{name} fills {n} {holder} with {total} {unit} each.", "There are {n} {holder} of {total} {unit} each."),
}
_ENDS = ("How many {unit} are there now?", "How many {unit} does that make?", "How many {unit} are there in the end?")


@dataclass(frozen=True)
class WordProblem:
    """A question, and the calculation that it asks for."""

    question: str
    first: int
    operations: tuple[Operation, ...]

    @property
    def totals(self) -> list[int]:
        """After each operation; the last is the answer."""
        totals = [self.first]
        for sign, number in self.operations:
            totals.append(_apply(totals[-1], sign, number))
        return totals[1:]


def word_problem(index: int, held_out: bool = False) -> WordProblem:
    """The problem number ``index`` of the training part or of the held-out one; always the same."""
    rng = random.Random(f"word problem/{'held-out' if held_out else 'train'}/{index}")
    while True:
        signs = rng.choice(_SIGNS)
        first = rng.randint(11, 49 if signs[0] == "*" else 99)
        operations = tuple((sign, rng.randint(3, 9) if sign == "*" else rng.randint(11, 89)) for sign in signs)
        problem = WordProblem(_question(first, operations, rng), first, operations)
        if min(problem.totals) > 0 and is_held_out(first, operations) == held_out:
            return problem


def is_held_out(first: int, operations: Iterable[Operation]) -> bool:
    """Whether a calculation belongs to the held-out part (1 in 16, by a hash that never changes)."""
    text = str(first) + "".join(f"{sign}{number}" for sign, number in operations)
    return hashlib.blake2b(text.encode(), digest_size=1).digest()[0] % _HELD_OUT_ONE_IN == 0


def solution(problem: WordProblem, rng: random.Random | None = None, slips: float = 0.0) -> str:
    """One operation a line, then the answer in a box.

    Args:
        problem: what is solved.
        rng: drawn from where ``slips`` is above 0.
        slips: chance of each line to be wrong; later lines go on from its wrong total.
    """
    total, lines = problem.first, []
    for sign, number in problem.operations:
        result = _apply(total, sign, number)
        if rng is not None and rng.random() < slips:
            result += rng.choice(
                [slip for slip in range(-_LARGEST_SLIP, _LARGEST_SLIP + 1) if slip and result + slip > 0]
            )
        lines.append(f"{total} {sign} {number} = {result}")
        total = result
    return "\n".join([*lines, _boxed(total)])


def recheck(problem: WordProblem) -> str:
    """The right solution, tens and ones of each operation by themselves."""
    total, lines = problem.first, []
    for sign, number in problem.operations:
        result = _apply(total, sign, number)
        lines += _by_parts(total, sign, number, result)
        total = result
    return "\n".join([*lines, _boxed(total)])


def warm_up_messages(index: int) -> list[dict[str, str]]:
    """A chat to learn the last turn of: a solution, or the recheck of a draft that may be wrong. Training part only."""
    problem, rng = word_problem(index), random.Random(f"warm up/{index}")
    question = {"role": "user", "content": problem.question}
    if rng.random() >= _RECHECKS:
        return [question, {"role": "assistant", "content": solution(problem)}]
    draft = {"role": "assistant", "content": solution(problem, rng, _SLIPS)}
    request = {"role": "user", "content": RECHECK}
    return [question, draft, request, {"role": "assistant", "content": recheck(problem)}]


def write(folder: Path) -> None:
    """The three files, in a folder that is made where there is none."""
    folder.mkdir(parents=True, exist_ok=True)
    # The warm-up has the first problems of the training part, training those after them.
    starts = {"train": ROWS["warm_up"], "held_out": 0}
    for name, start in starts.items():
        problems = (word_problem(start + n, name == "held_out") for n in range(ROWS[name]))
        _write_lines(
            folder / f"{name}.jsonl", ({"question": p.question, "answer": str(p.totals[-1])} for p in problems)
        )
    _write_lines(folder / "warm_up.jsonl", ({"messages": warm_up_messages(n)} for n in range(ROWS["warm_up"])))


def _question(first: int, operations: Sequence[Operation], rng: random.Random) -> str:
    name, other = rng.sample(_NAMES, 2)
    words = {"name": name, "other": other, "unit": rng.choice(_UNITS), "holder": rng.choice(_HOLDERS), "total": first}
    sentences = [] if operations[0][0] == "*" else [rng.choice(_BEGINNINGS).format(**words)]
    sentences += [rng.choice(_TEXTS[sign]).format(**words, n=number) for sign, number in operations]
    return " ".join([*sentences, rng.choice(_ENDS).format(**words), _INSTRUCTION])


def _apply(total: int, sign: str, number: int) -> int:
    return total * number if sign == "*" else total + number if sign == "+" else total - number


def _by_parts(total: int, sign: str, number: int, result: int) -> list[str]:
    """The lines of one operation; the last ends with its result."""
    split = total if sign == "*" else number
    tens, ones = split - split % 10, split % 10
    if not ones:
        return [f"{total} {sign} {number} = {result}"]
    if sign == "*":
        one, two = tens * number, ones * number
        return [f"{tens} * {number} = {one}", f"{ones} * {number} = {two}", f"{one} + {two} = {result}"]
    between = _apply(total, sign, tens)
    return [f"{total} {sign} {tens} = {between}", f"{between} {sign} {ones} = {result}"]


def _boxed(answer: int) -> str:
    return f"\\boxed{{{answer}}}"


def _write_lines(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(prog="python -m examples.word_problems", description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path, help="where to write the files")
    write(parser.parse_args().folder)


if __name__ == "__main__":
    main()

"""The command ``thinktwice-fast solve "problem"``, or ``--file problems.jsonl``."""

import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from thinktwice_fast.bounds import bounded
from thinktwice_fast.cli.command import PROGRAM, Command
from thinktwice_fast.cli.options import MODEL_NAMES, ModelChoice
from thinktwice_fast.errors import UserError, one_line

if TYPE_CHECKING:
    from thinktwice_fast.cli.solver import Piece

_DESCRIPTION = """Solve a problem, then refine the solution, with a model trained by ThinkTwice.

The text is shown as it is sampled; a refinement goes on in the cache of what it refines."""
_QUESTION_COLUMNS = ("prompt", "question", "problem")


@dataclass
class SolveOptions(ModelChoice):
    """How to solve and refine."""

    problems: list[str] = field(default_factory=list)
    """Problems, each in quotation marks."""
    file: str | None = None
    """File of problems: jsonl, parquet or csv with a row each, or any other text with a line each."""
    question_column: str | None = None
    """Column with the question in a jsonl, parquet or csv `file`; default: `prompt`, else `question`, else
    `problem`."""
    instruction: str = ""
    """Text appended to every question, after a space (how to give the answer)."""
    refine_instruction: str = "default"
    """The user message after a solution, or a .txt or .md file with it; "default" = the one that training takes by
    default."""
    passes: int = bounded(1, least=0, most=100)
    """Refinements of each solution, one after another."""
    max_tokens: int = bounded(2048, least=1)
    """Longest solution or refinement, in tokens; less where the model's context leaves less."""
    temperature: float = bounded(0.0, least=0)
    """Softmax temperature; 0 = always the likeliest token."""
    top_p: float = bounded(1.0, above=0, most=1)
    """Nucleus: sample among the smallest set of tokens with this much probability; 1 = off."""
    top_k: int = bounded(0, least=0)
    """Sample among the k likeliest tokens; 0 = off."""
    min_p: float = bounded(0.0, least=0, most=1)
    """Drop tokens less likely than this times the likeliest; 0 = off."""
    seed: int = bounded(0, least=0)
    """Seed of the sampling."""
    max_sequences: int = bounded(16, least=1)
    """Problems of a `file` that are worked on at once."""
    json: bool = False
    """Print one JSON object per problem instead of text."""


def run(options: SolveOptions) -> None:
    """Print the answers to the problems.

    Raises:
        UserError: options that contradict each other, a file or a model that can't be used; see ``Solver``.
    """
    _check(options)
    questions: Sequence[Any] = options.problems if options.file is None else read_problems(options.file, options)
    if options.instruction:
        questions = [_appended(question, options.instruction) for question in questions]
    # Imported here because it takes seconds, and most mistakes are found before.
    from thinktwice_fast.cli.solver import Solver, question_text
    from thinktwice_fast.records import Sampling

    solver = Solver(
        options.model,
        chat_template=options.chat_template,
        chat_template_args=options.chat_template_args,
        strip_default_system=options.strip_default_system,
        refine_instruction=options.refine_instruction,
        device=options.device,
        dtype=options.dtype,
        max_sequences=options.max_sequences,
    )
    sampling = Sampling(options.temperature, options.top_p, options.top_k, options.min_p, options.max_tokens)
    pieces = solver.stream(questions, passes=options.passes, sampling=sampling, seed=options.seed)
    show = _show_json if options.json else _show_text
    texts = [question_text(question) for question in questions]
    show(in_order(pieces, len(questions), options.passes), texts, options.passes)
    counts = solver.counts
    if counts.prefilled_anew:
        print(
            f"{PROGRAM}: note: {counts.prefilled_anew} of {counts.prefilled_anew + counts.extended} refinements "
            f"could not go on in the cache of what they refine ({counts.prompt_differs}: the chat template writes "
            f"the chat so far in another way; {counts.released}: the cache was full)",
            file=sys.stderr,
        )


def in_order(pieces: "Iterable[Piece]", problems: int, passes: int) -> "Iterator[Piece]":
    """The pieces problem by problem; those of later ones wait until the ones before are complete."""
    held: list[list[Piece]] = [[] for _ in range(problems)]
    current = 0
    for piece in pieces:
        held[piece.problem].append(piece)
        while current < problems and held[current]:
            ready, held[current] = held[current], []
            yield from ready
            if ready[-1].ended is None or ready[-1].turn < passes:
                break
            current += 1


def read_problems(name: str, options: SolveOptions) -> list[Any]:
    """The questions of a file, as texts or chat messages.

    Raises:
        UserError: a file that is missing, empty or malformed, or has no such column.
    """
    from thinktwice_fast.tasks import tables

    path = Path(name).expanduser()
    if path.suffix in tables.FILE_LOADERS:
        table = tables.load_file(path, f"--file {name}")
        wanted = (options.question_column,) if options.question_column else _QUESTION_COLUMNS
        column = next((column for column in wanted if tables.has_column(table, column)), None)
        if column is None:
            raise UserError(
                f"--file {name}: no column {' or '.join(wanted)} (it has {', '.join(table.column_names)}): name the "
                "right one with --question_column"
            )
        questions = [tables.value_at(row, column) for row in table]
    else:
        if options.question_column:
            raise UserError("--question_column would be ignored unless --file is jsonl, parquet or csv: leave it out")
        try:
            questions = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"--file {name}: can't read it ({one_line(error)}): check the file") from error
    for number, question in enumerate(questions):
        if not _is_question(question):
            raise UserError(
                f"--file {name}: row {number} (from 0) is no text and no chat with a user message at its end"
            )
    if not questions:
        raise UserError(f"--file {name}: no problems in it: write one per line")
    return questions


def _check(options: SolveOptions) -> None:
    problems = options.problems
    if bool(problems) == (options.file is not None):
        raise UserError('give problems (thinktwice-fast solve "8-8+5+6-9") or a --file of them, one of both')
    if not all(problem.strip() for problem in problems):
        raise UserError("an empty problem: write something between the quotation marks")
    unused = (
        dict.fromkeys(("top_p", "top_k", "min_p", "seed"), "with --temperature 0") if not options.temperature else {}
    )
    unused |= {"question_column": "without --file"} if options.file is None else {}
    unused |= {"refine_instruction": "with --passes 0"} if not options.passes else {}
    for name, when in unused.items():
        if getattr(options, name) != getattr(SolveOptions, name):
            raise UserError(f"--{name} would be ignored {when}: leave it out, or change the other")


def _is_question(value: Any) -> bool:
    if isinstance(value, str):
        return bool(value.strip())
    texts = isinstance(value, list) and all(
        isinstance(message, dict) and all(isinstance(message.get(key), str) for key in ("role", "content"))
        for message in value
    )
    return texts and bool(value) and value[-1]["role"] == "user"


def _appended(question: Any, instruction: str) -> Any:
    if isinstance(question, str):
        return f"{question} {instruction}"
    return [*question[:-1], question[-1] | {"content": f"{question[-1]['content']} {instruction}"}]


def _show_text(pieces: "Iterable[Piece]", questions: Sequence[str], passes: int) -> None:
    shown = (-1, -1)
    for piece in pieces:
        if (piece.problem, piece.turn) != shown:
            shown = (piece.problem, piece.turn)
            if piece.turn == 0 and len(questions) > 1:
                print(f"=== {questions[piece.problem]}\n")
            number = f" {piece.turn}" if passes > 1 else ""
            print(f"--- refinement{number}" if piece.turn else "--- solution")
        print(piece.text, end="", flush=True)
        if piece.ended is not None:
            print("\n" if piece.ended.finished else f"\n[cut off after {piece.ended.tokens} tokens]\n", flush=True)


def _show_json(pieces: "Iterable[Piece]", questions: Sequence[str], passes: int) -> None:
    turns: list[dict[str, Any]] = []
    for piece in pieces:
        if piece.ended is None:
            continue
        turns.append(asdict(piece.ended))
        if len(turns) == passes + 1:
            answer = {"question": questions[piece.problem], "solution": turns[0], "refinements": turns[1:]}
            print(json.dumps(answer, ensure_ascii=False), flush=True)
            turns = []


COMMAND = Command(
    help="solve problems, then refine the solutions",
    description=_DESCRIPTION,
    options=SolveOptions,
    run=run,
    positional="problems",
    # A response and what a refine prompt may hold are limited by these two here.
    names=MODEL_NAMES | {"rollout.max_response_tokens": "max_tokens", "rollout.max_prompt_tokens": "passes"},
)

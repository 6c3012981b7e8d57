"""`thinktwice-fast solve` and the Python API behind it."""

import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.cli.conftest import Run
from tests.command import LIMIT, ROOT, environment
from tests.small_models import CHATML, bpe_tokenizer, write_model
from thinktwice_fast.cli.solve import in_order
from thinktwice_fast.cli.solver import Answer, Piece, Solver, Turn, arithmetic_question
from thinktwice_fast.errors import UserError
from thinktwice_fast.records import Sampling
from thinktwice_fast.rollout.prefix_cache import Counts
from thinktwice_fast.tasks.arithmetic import build_tokenizer
from thinktwice_fast.tasks.prompts import ChatFormat

QUESTIONS = ["What is 12 + 7?", "How many clips did Natalia sell in May?", "And in April?"]
INSTRUCTION = "Recheck every step."
GREEDY = Sampling(temperature=0.0, max_tokens=24)
STOP = frozenset({bpe_tokenizer().eos_token_id})


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Qwen3 with a byte-level tokenizer: its texts are full of broken characters."""
    return write_model(tmp_path_factory.mktemp("model"), "qwen3")


@pytest.fixture(scope="module")
def solver(folder: Path) -> Solver:
    return Solver(str(folder), refine_instruction=INSTRUCTION)


def transformers_turns(folder: Path, question: str, passes: int, longest: int) -> list[list[int]]:
    """Greedy solution and refinements by transformers' own generate, each from its whole prompt."""
    model: Any = AutoModelForCausalLM.from_pretrained(folder)
    chat = ChatFormat(bpe_tokenizer())
    messages: Any = [{"role": "user", "content": question}]
    prompt = chat.prompt_ids(messages)
    turns = []
    for _ in range(passes + 1):
        ids = torch.tensor([prompt])
        everything = model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=longest, pad_token_id=0
        )
        response = everything[0, len(prompt) :].tolist()
        text = chat.response_text(response, STOP)
        refine = chat.refine(messages, prompt, response, text, INSTRUCTION, STOP)
        messages, prompt = refine.messages, list(refine.ids)
        turns.append(response)
    return turns


def test_each_turn_is_what_transformers_generates_and_extends_the_one_before(solver: Solver, folder: Path) -> None:
    answers = solver.solve(QUESTIONS, passes=2, sampling=GREEDY)
    assert solver.counts == Counts(extended=2 * len(QUESTIONS))
    for question, answer in zip(QUESTIONS, answers, strict=True):
        expected = transformers_turns(folder, question, 2, 24)
        texts = [ChatFormat(bpe_tokenizer()).response_text(response, STOP) for response in expected]
        assert answer == Answer(
            question,
            tuple(Turn(text, None, len(ids), ids[-1] in STOP) for text, ids in zip(texts, expected, strict=True)),
        )


def test_pieces_of_a_turn_join_to_its_text(solver: Solver) -> None:
    sampling = Sampling(temperature=1.0, max_tokens=60)
    pieces = list(solver.stream(QUESTIONS, sampling=sampling, seed=4))
    answers = solver.solve(QUESTIONS, sampling=sampling, seed=4)
    for problem, answer in enumerate(answers):
        for turn, whole in enumerate(answer.turns):
            own = [piece for piece in pieces if (piece.problem, piece.turn) == (problem, turn)]
            assert "".join(piece.text for piece in own) == whole.text
            assert [piece.ended for piece in own] == [None] * (len(own) - 1) + [whole]
            assert len(own) > 5
    assert len({answer.solution.text for answer in answers}) == 3
    assert answers[0] != solver.solve(QUESTIONS, sampling=sampling, seed=5)[0]


def test_an_answer_does_not_depend_on_how_many_are_worked_on(folder: Path, solver: Solver) -> None:
    sampling = Sampling(max_tokens=20)
    one_by_one = Solver(str(folder), refine_instruction=INSTRUCTION, max_sequences=1)
    assert one_by_one.solve(QUESTIONS, sampling=sampling) == solver.solve(QUESTIONS, sampling=sampling)


def test_a_stop_string_ends_a_turn_and_is_not_shown(solver: Solver) -> None:
    drawn = Sampling(temperature=1.0, max_tokens=60)
    whole = solver.solve(QUESTIONS, sampling=drawn)[0].solution
    found = re.search("(?<=.{5})[a-z]{3}", whole.text, re.DOTALL)
    assert found is not None
    stop = found.group()
    pieces = list(solver.stream(QUESTIONS[:1], sampling=replace(drawn, stop_strings=(stop, "no such text"))))
    own = [piece for piece in pieces if piece.turn == 0]
    assert own[-1].ended is not None
    assert "".join(piece.text for piece in own) == own[-1].ended.text == whole.text.partition(stop)[0]
    assert own[-1].ended.finished and own[-1].ended.tokens < whole.tokens
    assert solver.solve(QUESTIONS, sampling=replace(drawn, stop_strings=("no such text",)))[0].solution == whole
    with pytest.raises(UserError, match="stop_strings: an empty string"):
        replace(drawn, stop_strings=("\\boxed", ""))


def test_no_passes_no_problems(solver: Solver) -> None:
    assert [len(answer.turns) for answer in solver.solve(QUESTIONS, passes=0, sampling=GREEDY)] == [1, 1, 1]
    assert solver.solve([]) == []


def test_a_template_that_rewrites_the_chat_costs_a_prefill_and_is_counted(folder: Path, tmp_path: Path) -> None:
    template = tmp_path / "template.jinja"
    template.write_text("{{ messages | length }} messages: " + CHATML)
    solver = Solver(str(folder), refine_instruction=INSTRUCTION, chat_template=str(template))
    solver.solve(QUESTIONS, sampling=GREEDY)
    assert solver.counts == Counts(prompt_differs=3)


def test_responses_stay_within_the_context(solver: Solver) -> None:
    sampling = Sampling(temperature=0.0, max_tokens=5000)
    with pytest.raises(UserError, match=r"problem 2 takes \d+ tokens .* no room for 2 responses in .* context of 2048"):
        solver.solve(["short", "word " * 1500], sampling=sampling)
    (answer,) = solver.solve(["word " * 400], sampling=sampling)
    prompt = len(bpe_tokenizer()("word " * 400)["input_ids"])
    assert 1500 < prompt + sum(turn.tokens for turn in answer.turns) <= 2048 or all(t.finished for t in answer.turns)


def test_pieces_are_shown_problem_by_problem() -> None:
    turn = Turn("", None, 1, True)

    def piece(problem: int, turn_number: int, last: bool = False) -> Piece:
        return Piece(problem, turn_number, "", turn if last else None)

    first = [piece(0, 0), piece(0, 0, True), piece(0, 1), piece(0, 1, True)]
    second = [piece(1, 0, True), piece(1, 1), piece(1, 1, True)]
    third = [piece(2, 0, True), piece(2, 1, True)]
    mixed = [first[0], *third, second[0], *first[1:3], second[1], first[3], second[2]]
    shown: list[Piece] = []
    at: list[int] = []
    for number in range(len(mixed)):
        shown = list(in_order(mixed[: number + 1], 3, 1))
        at.append(len(shown))
    assert shown == first + second + third
    assert at == [1, 1, 1, 1, 2, 3, 3, 6, 9]


@pytest.mark.parametrize(
    ("text", "asked"),
    [
        ("What is 3+4-2?", "3+4-2+0+0"),
        ("8-8+5+6-9", "8-8+5+6-9"),
        ("3 + 4 =", "3+4+0+0+0"),
        ("5 apples: how many are 9 - 4 - 5 + 1?", "9-4-5+1+0"),
    ],
)
def test_sums_are_put_in_the_form_that_the_shipped_model_knows(text: str, asked: str) -> None:
    assert arithmetic_question(text) == asked


@pytest.mark.parametrize("text", ["hello", "7", "12+3", "1+2+3+4+5+6", "3-4+2", "1+2 or 3+4", "2*3"])
def test_what_the_shipped_model_never_learned_is_refused(text: str) -> None:
    with pytest.raises(UserError, match=r"the shipped model knows only sums of up to 5 one-digit numbers"):
        arithmetic_question(text)


def test_the_shipped_model_solves_a_question_out_of_the_box(run: Run) -> None:
    status, out, err = run("solve", "What is 3+4-2?")
    assert (status, err) == (0, "")
    parts = out.split("--- ")
    assert parts[0] == "" and parts[1].startswith("solution\n3+4-2=") and parts[1].endswith("}\n\n")
    assert parts[2] == "refinement\n3+4=7\n7-2=5\n5+0=5\n5+0=5\n\\boxed{5}\n\n"


def test_json_gives_one_object_per_problem_in_their_order(run: Run, tmp_path: Path) -> None:
    rows = [{"question": "8-8+5+6-9"}, {"question": "1+2+3"}]
    file = tmp_path / "problems.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    status, out, err = run("solve", "--file", file, "--json", "--passes", "2")
    assert (status, err) == (0, "")
    answers = [json.loads(line) for line in out.splitlines()]
    assert [answer["question"] for answer in answers] == ["8-8+5+6-9", "1+2+3"]
    for answer in answers:
        assert len(answer["refinements"]) == 2
        for turn in (answer["solution"], *answer["refinements"]):
            assert set(turn) == {"text", "boxed", "tokens", "finished"} and turn["finished"]
            assert turn["tokens"] == 1 + len(build_tokenizer()(turn["text"])["input_ids"])
            assert turn["boxed"] is None or f"\\boxed{{{turn['boxed']}}}" in turn["text"]
    assert answers[0]["refinements"][0]["boxed"] == "2"


@pytest.mark.parametrize(
    ("name", "content", "options"),
    [
        ("p.txt", "\n8-8+5+6-9\n\n1+2+3\n", ()),
        ("p.csv", "number,problem\n1,8-8+5+6-9\n2,1+2+3\n", ()),
        ("p.csv", "problem,text\n0,8-8+5+6-9\n0,1+2+3\n", ("--question_column", "text")),
        ("p.jsonl", "".join(
            json.dumps({"prompt": [{"role": "user", "content": q}]}) + "\n" for q in ("8-8+5+6-9", "1+2+3")
        ), ()),
    ],
    ids=["lines", "csv", "column", "chats"],
)  # fmt: skip
def test_files_of_problems(run: Run, tmp_path: Path, name: str, content: str, options: tuple[str, ...]) -> None:
    (tmp_path / name).write_text(content)
    status, out, err = run("solve", "--file", tmp_path / name, "--passes", "0", *options)
    assert (status, err) == (0, "")
    assert [line for line in out.splitlines() if line[:3] in ("===", "---")] == [
        "=== 8-8+5+6-9", "--- solution", "=== 1+2+3", "--- solution",
    ]  # fmt: skip


def test_options_reach_the_model(run: Run, folder: Path) -> None:
    def text(*options: str) -> list[str]:
        status, out, err = run("solve", QUESTIONS[0], "--json", "--model", folder, "--max_tokens", "12", *options)
        assert (status, err) == (0, "")
        answer = json.loads(out)
        return [turn["text"] for turn in (answer["solution"], *answer["refinements"])]

    greedy = text()
    assert len(greedy) == 2
    for same in (("--top_k", "1"), ("--top_p", "1e-6"), ("--min_p", "1"), ("--seed", "3")):
        drawn = text("--temperature", "1", *same)
        assert (drawn == greedy) == (same[0] != "--seed")
    assert text("--instruction", "Be brief.")[0] != greedy[0]
    other = text("--refine_instruction", "Again.")
    assert other[0] == greedy[0] and other[1] != greedy[1]


def test_a_note_says_when_caches_could_not_be_carried_on(run: Run, folder: Path, tmp_path: Path) -> None:
    template = tmp_path / "template.jinja"
    template.write_text("{{ messages | length }} messages: " + CHATML)
    status, out, err = run(
        "solve", "Why?", "--model", folder, "--chat_template", template, "--max_tokens", "5", "--passes", "2"
    )
    assert status == 0 and out.count("[cut off after 5 tokens]") == 3 and "--- refinement 2" in out
    assert err.startswith("thinktwice-fast: note: 2 of 2 refinements could not go on in the cache") and "(2: the" in err


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ((), "no command given: there is solve, eval, report, doctor: see thinktwice-fast --help"),
        (("slove", "1+2"), "no command 'slove'"),
        (("solve",), "give problems"),
        (("solve", "1+2", "--file", "x.txt"), "one of both"),
        (("solve", " "), "an empty problem"),
        (("solve", "1+2", "--bogus", "3"), "--bogus"),
        (("solve", "1+2", "--temp", "1"), "--temp"),
        (("solve", "1+2", "--passes", "many"), "passes"),
        (("solve", "1+2", "--passes", "-1"), "--passes -1: must be from 0 to 100"),
        (("solve", "1+2", "--temperature", "nan"), "temperature"),
        (("solve", "1+2", "--temperature", "1", "--top_p", "0"), "--top_p 0.0: must be above 0"),
        (("solve", "1+2", "--top_k", "4"), "--top_k would be ignored with --temperature 0"),
        (("solve", "1+2", "--question_column", "q"), "--question_column would be ignored without --file"),
        (("solve", "1+2", "--passes", "0", "--refine_instruction", "x"), "would be ignored with --passes 0"),
        (("solve", "1+2", "--model", "./nowhere"), "--model ./nowhere: no such folder: check the path"),
        (("solve", "1+2", "--device", "cuda"), "--device cuda: there is no GPU here: use --device cpu"),
        (("solve", "1+2", "--chat_template", "none.jinja"), "--chat_template none.jinja: can't read it"),
        (("solve", "hello"), "or give another model with --model"),
        (("solve", "--file", "none.txt"), "--file none.txt: can't read it"),
        (("solve", "--file", "none.jsonl"), "--file none.jsonl: no such file"),
        (("solve", "--file", "EMPTY.txt"), "no problems in it"),
        (("solve", "--file", "ROWS.jsonl"), "no column prompt or question or problem (it has text, n): name the"),
        (("solve", "--file", "ROWS.jsonl", "--question_column", "n"), "row 0 (from 0) is no text and no chat"),
        (("solve", "--file", "EMPTY.txt", "--question_column", "n"), "unless --file is jsonl"),
    ],
    ids=lambda value: " ".join(value[1:])[:40] if isinstance(value, tuple) else "",
)
def test_bad_input_is_told_in_one_line(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], says: str
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.chdir(tmp_path)
    Path("EMPTY.txt").write_text("\n \n")
    Path("ROWS.jsonl").write_text(json.dumps({"text": "1+2", "n": 3}) + "\n")
    status, out, err = run(*arguments)
    assert (status, out) == (2, "")
    assert err.startswith("thinktwice-fast: error: ") and err.count("\n") == 1
    assert says in err


def test_text_comes_while_it_is_sampled_and_a_reader_may_leave() -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "thinktwice_fast.cli.main", "solve", *["8-8+5+6-9"] * 300],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment(),
        cwd=ROOT,
    )
    assert process.stdout is not None and process.stderr is not None
    assert process.stdout.read(20).decode().startswith("=== 8-8+5+6-9")
    assert process.poll() is None, "the first text came when all was done"
    process.stdout.close()
    assert process.wait(LIMIT) == 0 and process.stderr.read() == b""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest

from thinktwice_fast.config import DataOptions
from thinktwice_fast.errors import UserError
from thinktwice_fast.tasks.arithmetic import ArithmeticSource
from thinktwice_fast.tasks.sources import load_source

GSM8K = [
    {"question": "Two and two?", "answer": "2+2 = <<2+2=4>>4\n#### 4"},
    {"question": "A thousand?", "answer": "It is.\n#### 1,000"},
]
VERL = [
    {
        "problem": "unused",
        "prompt": [{"role": "system", "content": "Think."}, {"role": "user", "content": f"q{n}"}],
        "reward_model": {"ground_truth": str(n), "style": "rule"},
        "extra_info": {"index": n},
    }
    for n in range(3)
]

Write = Callable[[str, Any], str]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def to_file(name: str, content: Any) -> str:
        path = tmp_path / name
        if isinstance(content, str | bytes):
            path.write_bytes(content.encode() if isinstance(content, str) else content)
        elif name.endswith(".jsonl"):
            path.write_text("".join(json.dumps(row) + "\n" for row in content))
        elif name.endswith(".json"):
            path.write_text(json.dumps(content, indent=1))
        else:
            table = datasets.Dataset.from_list(content)
            table.to_parquet(path) if name.endswith(".parquet") else table.to_csv(path)
        return str(path)

    return to_file


def error_of(source: str, prefix: str = "data", **options: Any) -> str:
    with pytest.raises(UserError) as raised:
        load_source(DataOptions(source=source, **options), prefix=prefix)
    message = str(raised.value)
    assert "\n" not in message
    return message


def refusing(error: Exception) -> Callable[..., Any]:
    def refuse(*_: Any, **__: Any) -> None:
        raise error

    return refuse


@pytest.mark.parametrize("ending", ["jsonl", "json", "parquet", "csv"])
def test_gsm8k_schema_in_every_kind_of_file(write: Write, tmp_path: Path, ending: str) -> None:
    path = write(f"train.{ending}", GSM8K)
    problems = load_source(DataOptions(source=path, instruction="Box it.", target_column="answer"))
    assert len(problems) == 2
    assert problems[0].messages == ({"role": "user", "content": "Two and two? Box it."},)
    assert [problem.answer for problem in problems] == ["4", "1,000"]
    assert problems[1].index == 1
    assert problems[1].columns == GSM8K[1]
    assert problems[1].target == GSM8K[1]["answer"]
    assert os.listdir(tmp_path) == [f"train.{ending}"]  # no cache beside the user's file


@pytest.mark.parametrize("ending", ["jsonl", "parquet"])
def test_verl_schema(write: Write, ending: str) -> None:
    problems = load_source(DataOptions(source=write(f"verl.{ending}", VERL), instruction="Box it.", limit=2))
    assert len(problems) == 2
    assert problems[1].answer == "1"
    assert [message["role"] for message in problems[1].messages] == ["system", "user"]
    assert problems[1].question == "q1 Box it."
    assert problems[1].target is None
    assert problems[1].columns["extra_info"] == {"index": 1}
    assert problems[0].question == problems[0].question == "q0 Box it."


def test_columns_named_by_options(write: Write) -> None:
    rows = [{"ask": "q", "meta": {"gold": "7"}, "worked": "It is 7."}]
    options = DataOptions(
        source=write("own.jsonl", rows), question_column="ask", answer_column="meta.gold", target_column="worked"
    )
    problem = load_source(options)[0]
    assert (problem.question, problem.answer, problem.target) == ("q", "7", "It is 7.")


@pytest.mark.parametrize(
    ("answer", "gold"),
    [(7, "7"), (142.0, "142"), (0.5, "0.5"), (True, "yes"), ("$2n-2$", "2n-2"), ("a \\$5", "a \\$5")],
)
def test_what_is_taken_for_a_gold_answer(write: Write, answer: Any, gold: str) -> None:
    (problem,) = load_source(DataOptions(source=write("a.jsonl", [{"question": "q", "answer": answer}])))
    assert problem.answer == gold


MATH = [  # how boxes are written in the MATH data set
    ("First $\\boxed{1}$, then $\\boxed{\\frac{1}{2}}$.", "\\frac{1}{2}"),
    ("So $x = \\boxed 2$ it is.", "2"),
    ("Thus \\fbox{C} holds.", "C"),
]


def test_gold_answers_out_of_worked_solutions_of_several_subsets(monkeypatch: pytest.MonkeyPatch) -> None:
    parts = dict(zip(("algebra", "geometry"), (MATH[:1], MATH[1:]), strict=True))

    def subset(name: str, part: str, split: str) -> datasets.Dataset:
        assert (name, split) == ("EleutherAI/hendrycks_math", "train")
        return datasets.Dataset.from_list([{"problem": "q", "solution": text} for text, _ in parts[part]])

    monkeypatch.setattr(datasets, "load_dataset", subset)
    problems = load_source(DataOptions("EleutherAI/hendrycks_math", subset=("algebra", "geometry")))
    assert [(problem.index, problem.answer) for problem in problems] == list(enumerate(gold for _, gold in MATH))


@pytest.mark.parametrize(
    ("question", "instruction", "appended"),
    [
        ("q", "Box it.", True),
        ("q  Box\nit, like so.", "Box it.", False),
        ("q Put it inside \\boxed{}, please.", "Give it in a \\boxed{}.", False),
        ("q $\\boxed{3}$", "Give it in a \\boxed{}.", True),
    ],
)
def test_an_instruction_is_not_said_twice(write: Write, question: str, instruction: str, appended: bool) -> None:
    path = write("t.jsonl", [{"question": question, "answer": "1"}])
    source = load_source(DataOptions(source=path, instruction=instruction))
    assert source[0].question == (f"{question} {instruction}" if appended else question)
    assert [path in note and "1 of 1 prompts" in note for note in source.notes] == [True] * (not appended)


def test_csv_answers_stay_text(write: Write) -> None:
    problems = load_source(DataOptions(source=write("t.csv", "question,answer\nq,007\nr,NA\n")))
    assert [problem.answer for problem in problems] == ["007", "NA"]


def test_blank_lines_dates_and_rows_with_more_columns(write: Write) -> None:
    text = '\ufeff{"question": "q", "answer": "2024-01-01"}\n\n{"question": "r", "answer": "2024-01-02", "level": 3}\n'
    problems = load_source(DataOptions(source=write("t.jsonl", text)))
    assert [problem.answer for problem in problems] == ["2024-01-01", "2024-01-02"]
    assert problems[0].columns["level"] is None


def test_arithmetic() -> None:
    endless = load_source(DataOptions())
    assert endless.size is None
    assert endless[5] == ArithmeticSource("tm5")[5]
    held_out = load_source(DataOptions(source="arithmetic:te5", limit=4), held_out=True)
    assert list(held_out) == list(ArithmeticSource("te5", held_out=True, limit=4))


def test_arithmetic_refuses_what_it_would_ignore() -> None:
    assert "data.instruction means nothing to arithmetic:tm5" in error_of("arithmetic:tm5", instruction="Hi")
    assert "--data.subset" in error_of("arithmetic:tm5", subset="main")
    assert "--eval.subset" in error_of("arithmetic:tm5", prefix="eval", subset="main")
    assert "no arithmetic task 'tm9'" in error_of("arithmetic:tm9")


def test_missing_file(tmp_path: Path) -> None:
    for name in ("gone.jsonl", "gone.parquet"):
        assert error_of(str(tmp_path / name)).endswith(f"{name}: no such file; check the path")
    assert "no such file; give a file, a hub data set" in error_of(str(tmp_path / "gone"))
    assert "is a folder; name a file in it" in error_of(str(tmp_path))


def test_unknown_kind_of_file(write: Write) -> None:
    assert "ends in .jsonl, .json, .parquet, .csv" in error_of(write("data.txt", "x"))


@pytest.mark.parametrize("name", ["e.jsonl", "e.json", "e.parquet", "e.csv"])
def test_empty_file(write: Write, name: str) -> None:
    assert "the file is empty" in error_of(write(name, ""))


def test_files_without_rows(write: Write) -> None:
    assert "no rows" in error_of(write("e.jsonl", "\n\n"))
    assert "no rows" in error_of(write("e.json", "[]"))
    assert "no rows" in error_of(write("e.csv", "question,answer\n"))


@pytest.mark.parametrize(
    ("content", "what"),
    [
        ('{"question": "q", "answer": "1"}\n{"question": \n', "line 2 is malformed JSON"),
        ('\n{"question": "q"} x\n', "line 2 is malformed JSON"),
        ('{"question": "q", "answer": "1"}\n[1]\n', "line 2 is not a JSON object"),
        (b'{"question": "\xff", "answer": "1"}\n', "line 1 is malformed JSON"),
    ],
)
def test_malformed_lines_are_numbered(write: Write, content: str | bytes, what: str) -> None:
    assert what in error_of(write("bad.jsonl", content))


def test_malformed_other_files(write: Write) -> None:
    assert "malformed JSON in line 2" in error_of(write("bad.json", '[{"question": "q"},\n{]'))
    assert "not a list of JSON objects" in error_of(write("bad.json", "[1]"))
    assert "not a readable parquet file" in error_of(write("bad.parquet", "nonsense"))
    assert "not a readable csv file" in error_of(write("bad.csv", 'question,answer\nq,1\nr,2,3\n"x'))


@pytest.mark.parametrize("name", ["m.jsonl", "m.parquet", "m.csv"])
def test_missing_columns(write: Write, name: str) -> None:
    path = write(name, [{"text": "q", "answer": "1"}])
    message = error_of(path)
    assert "no column prompt or question or problem for the question; it has text, answer" in message
    assert "--data.question_column" in message
    assert "no column gold for the answer" in error_of(path, question_column="text", answer_column="gold")
    assert "no column steps for the target" in error_of(path, question_column="text", target_column="steps")


def test_remedies_for_an_evaluation_set_name_its_options(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write("m.jsonl", [{"text": "q", "number": "1"}])
    assert "with --eval.question_column" in error_of(path, "eval")
    assert "with --eval.answer_column" in error_of(path, "eval", question_column="text")
    assert "with --data.answer_column" in error_of(path, question_column="text")
    for what, option in (("Unknown split 'test'", "--eval.split"), ("Config name is missing", "--eval.subset")):
        monkeypatch.setattr(datasets, "load_dataset", refusing(ValueError(what)))
        assert error_of("a/b", "eval").endswith(f"choose one with {option}")


@pytest.mark.parametrize(
    ("rows", "what"),
    [
        (
            [{"question": "q", "answer": "1"}, {"question": "r", "answer": 2}],
            "row 1 (from 0), column answer: of type int",
        ),
        ([{"question": "q", "answer": float("nan")}], "row 0 (from 0), column answer: of type float"),
        ([{"question": "q", "solution": "It is 7."}], "row 0 (from 0), column solution: no answer in a \\boxed{}"),
        ([{"question": "q", "answer": "so \\boxed{7"}], "row 0 (from 0), column answer: no answer"),
        ([{"question": "q", "answer": "1"}, {"question": "r"}], "row 1 (from 0), column answer: empty (null)"),
        ([{"question": "q", "answer": ["1"]}], "row 0 (from 0), column answer: of type list"),
        ([{"question": "q", "answer": "so #### "}], "row 0 (from 0), column answer: no answer"),
        ([{"question": 3, "answer": "1"}], "row 0 (from 0), column question: of type int"),
        ([{"prompt": [{"role": "user"}], "answer": "1"}], "column prompt: a message without text"),
        ([{"prompt": [{"role": "assistant", "content": "a"}], "answer": "1"}], "does not end with a user message"),
        (
            [{"question": "q", "answer": "1", "x": "a"}, {"question": "q", "answer": "1", "x": 2}],
            "row 1 (from 0), column x",
        ),
        (
            [{"prompt": "q", "reward_model": {"ground_truth": None}}, {"prompt": "q", "reward_model": {}}],
            "row 0 (from 0), column reward_model.ground_truth: empty (null)",
        ),
    ],
)
def test_rows_that_are_not_text(write: Write, rows: list[dict[str, Any]], what: str) -> None:
    assert what in error_of(write("t.jsonl", rows))


def test_a_missing_target_names_its_row(write: Write) -> None:
    rows = [{"question": "q", "answer": "1", "t": "a"}, {"question": "r", "answer": "2", "t": None}]
    assert "row 1 (from 0), column t: empty (null)" in error_of(write("t.jsonl", rows), target_column="t")


@pytest.mark.parametrize(
    ("messages", "what"),
    [
        ([], "the chat does not end with an assistant message"),
        ([{"role": "assistant", "content": "a"}], "that has text, after another message"),
        (
            [{"role": "user", "content": "q"}, {"role": "assistant", "content": " "}],
            "end it with the response to learn",
        ),
        ([{"role": "assistant", "content": "a"}, {"role": "user", "content": "q"}], "the chat does not end with an"),
        ([{"role": "user", "content": "q"}, {"role": "assistant", "content": None}], "a message without text"),
    ],
)
def test_a_chat_to_learn_ends_with_an_assistants_turn(write: Write, messages: list[Any], what: str) -> None:
    good = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    path = write("c.jsonl", [{"messages": good}, {"messages": messages}])
    message = error_of(path, target_column="messages")
    assert "row 1 (from 0), column messages: " in message and what in message
    ignored = error_of(path, target_column="messages", instruction="Box it.")
    assert "--data.instruction would be ignored: --data.target_column messages holds whole chats: leave it" in ignored


@pytest.mark.parametrize(
    ("raised", "remedy"),
    [
        (ConnectionError("Couldn't reach 'a/b' on the Hub"), "check the name and the network, or give a local"),
        (datasets.exceptions.DatasetNotFoundError("Dataset 'a/b' doesn't exist"), "check the name and the network"),
        (ValueError("Unknown split \"train\". Should be one of ['test']."), "choose one with --data.split"),
        (ValueError("Config name is missing.\nPlease pick one: ['main']"), "choose one with --data.subset"),
        (RuntimeError("Dataset scripts are no longer supported"), "give a local jsonl"),
    ],
)
def test_hub_errors(monkeypatch: pytest.MonkeyPatch, raised: Exception, remedy: str) -> None:
    monkeypatch.setattr(datasets, "load_dataset", refusing(raised))
    message = error_of("a/b")
    assert message.startswith("hub data set a/b, split train, cannot be loaded (")
    assert remedy in message


def test_hub_data_sets_take_subset_and_split(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[Any, ...]] = []

    def answer(name: str, subset: str | None, split: str) -> datasets.Dataset:
        asked.append((name, subset, split))
        return datasets.Dataset.from_list(GSM8K)

    monkeypatch.setattr(datasets, "load_dataset", answer)
    problems = load_source(DataOptions(source="openai/gsm8k", subset="main", split="test"))
    assert asked == [("openai/gsm8k", "main", "test")]
    assert problems[1].answer == "1,000"


def test_the_hub_s_error_becomes_part_of_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    for error, reason in ((RuntimeError("Not\n  found."), "(Not found):"), (RuntimeError(), "(RuntimeError):")):
        monkeypatch.setattr(datasets, "load_dataset", refusing(error))
        assert f"cannot be loaded {reason} check" in error_of("a/b")

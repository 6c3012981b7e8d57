"""Evaluation sets: the ready ones, on rows in the form that each hub data set has, and what `eval.sets` may say."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import pytest
import yaml

from thinktwice_fast.config import Config
from thinktwice_fast.errors import UserError
from thinktwice_fast.tasks.evaluation_sets import EvaluationSet, evaluation_sets, ready_sets
from thinktwice_fast.tasks.grading import Graders

MATH = (
    "Solve the following math problem step by step. Put your final answer inside \\boxed{}, like \\boxed{42} or "
    "\\boxed{\\frac{1}{2}}."
)
CHOICE = "Think step by step, then put the letter of the right option inside \\boxed{}."
YES_NO = "Think step by step, then put yes or no inside \\boxed{}."
OPTIONS = ["one", "two", "three", "four"]
SHOWN = "A. one\nB. two\nC. three\nD. four"
TEN = [f"number {n}" for n in range(10)]

# Of each set: what the hub is asked for, a row as it gives it, the prompt, the gold answer, the grader.
READY: dict[str, tuple[tuple[str, str | None, str], dict[str, Any], str, str, str]] = {
    "aime": (
        ("AI-MO/aimo-validation-aime", None, "train"),
        {"id": 0, "problem": "p", "solution": "So \\boxed{116}.", "answer": "116", "url": "u"},
        f"p {MATH}", "116", "math",
    ),
    "amc": (
        ("AI-MO/aimo-validation-amc", None, "train"),
        {"id": 0, "problem": "p", "answer": 142.0, "url": "u"},
        f"p {MATH}", "142", "math",
    ),
    "math500": (
        ("HuggingFaceH4/MATH-500", None, "test"),
        {"problem": "p", "solution": "\\boxed{p - q}", "answer": "p - q", "subject": "s", "level": 2, "unique_id": "i"},
        f"p {MATH}", "p - q", "math",
    ),
    "minerva_math": (
        ("math-ai/minervamath", None, "test"), {"question": "q", "answer": "4.5e33"}, f"q {MATH}", "4.5e33", "math"
    ),
    "olympiadbench": (
        ("afraamn/olympiadbench_math_textonly", None, "test_en"),
        {"context": "Let $n>1$.", "question": "q", "final_answer": ["$2 n$"], "subfield": "Algebra", "unit": None},
        f"Let $n>1$.\n\nq {MATH}", "2 n", "math",
    ),
    "gsm8k": (
        ("openai/gsm8k", "main", "test"), {"question": "q", "answer": "2+2 = 4\n#### 4"}, f"q {MATH}", "4", "math"
    ),
    "commonsense_qa": (
        ("tau/commonsense_qa", None, "validation"),
        {"id": "i", "question": "q", "question_concept": "c", "choices": {"label": list("ABCD"), "text": OPTIONS},
         "answerKey": "C"},
        f"q\n\n{SHOWN}\n\n{CHOICE}", "C", "choice",
    ),
    "arc_challenge": (
        ("allenai/ai2_arc", "ARC-Challenge", "test"),
        {"id": "i", "question": "q", "choices": {"text": OPTIONS, "label": ["1", "2", "3", "4"]}, "answerKey": "4"},
        f"q\n\n{SHOWN}\n\n{CHOICE}", "D", "choice",
    ),
    "gpqa_diamond": (
        ("Idavidrein/gpqa", "gpqa_diamond", "train"),
        {"Record ID": "r", "Question": "q\n", "Correct Answer": "four\n", "Incorrect Answer 1": "one",
         "Incorrect Answer 2": "two", "Incorrect Answer 3": "three"},
        f"q\n\nA. one\nB. two\nC. four\nD. three\n\n{CHOICE}", "C", "choice",
    ),
    "mmlu_pro": (
        ("TIGER-Lab/MMLU-Pro", None, "test"),
        {"question_id": 1, "question": "q", "options": TEN, "answer": "J", "answer_index": 9, "category": "math"},
        "q\n\n" + "\n".join(map("{}. {}".format, "ABCDEFGHIJ", TEN)) + f"\n\n{CHOICE}", "J", "choice",
    ),
    "strategy_qa": (
        ("ChilleD/StrategyQA", None, "test"),
        {"qid": "i", "term": "t", "question": "q", "answer": False, "facts": "f"},
        f"q {YES_NO}", "no", "yes_no",
    ),
}  # fmt: skip


def resolved(config: Config, **evaluation: Any) -> dict[str, EvaluationSet]:
    for name, value in evaluation.items():
        setattr(config.eval, name, value)
    return evaluation_sets(config)


def refusal(**evaluation: Any) -> str:
    with pytest.raises(UserError) as raised:
        for entry in resolved(Config(), **evaluation).values():
            entry.load()
    assert "\n" not in str(raised.value)
    return str(raised.value)


def test_every_ready_set_is_tried_here() -> None:
    assert ready_sets().keys() == READY.keys()


@pytest.mark.parametrize("name", READY)
def test_ready_sets(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked, row, prompt, gold, reward = READY[name]
    table = datasets.Dataset.from_list([row])
    hub = lambda source, subset, split: {asked: table}[source, subset, split]  # noqa: E731
    monkeypatch.setattr(datasets, "load_dataset", hub)
    config = Config(reward="exact")
    config.eval.question_column, config.eval.split, config.eval.instruction = "elsewhere", "gone", "Not this."
    (entry,) = resolved(config, sets=(name,)).values()
    from_hub = entry.load()[0]
    assert (from_hub.question, from_hub.answer, entry.reward) == (prompt, gold, reward)

    monkeypatch.undo()
    table.to_parquet(tmp_path / f"{ready_sets()[name]['file']}.parquet")
    (local,) = resolved(config, sets=(name,), data_root=str(tmp_path)).values()
    assert local.load()[0] == from_hub

    with Graders("exact", [reward], 1.0, 1) as graders:
        problem = replace(from_hub, reward=entry.reward)
        graders.check(problem)
        answers = [f"\\boxed{{{gold}}}", {"choice": "\\boxed{B}", "yes_no": "\\boxed{yes}"}.get(reward, "unboxed")]
        assert graders.submit(problem, problem.messages, answers).result() == [1, 0]
        assert graders.submit(from_hub, problem.messages, [gold, *answers]).result() == [1, 0, 0]  # the run's own


def test_a_prepared_file_of_a_ready_set_keeps_its_prompts(tmp_path: Path) -> None:
    row = {
        "prompt": [{"role": "user", "content": f"q {MATH}"}],
        "reward_model": {"ground_truth": "2n", "style": "rule"},
    }
    (tmp_path / "olympiadbench.jsonl").write_text(json.dumps(row))
    (entry,) = resolved(Config(), sets=("olympiadbench",), data_root=str(tmp_path)).values()
    source = entry.load()
    assert (source[0].question, source[0].answer) == (f"q {MATH}", "2n")
    assert "1 of 1 prompts say already" in source.notes[0]


def test_sets_of_different_forms_side_by_side(tmp_path: Path) -> None:
    (tmp_path / "ready.yaml").write_text(
        yaml.safe_dump({"vowels": {"source": "me/vowels", "answer_column": "letters", "reward": "exact"}})
    )
    config = Config()
    config.data.instruction = "Box it."
    sets = resolved(
        config,
        ready_sets=str(tmp_path / "ready.yaml"),
        question_column="ask",
        limit=7,
        sets={
            "plain": "me/plain",
            "own": {
                "source": "me/own",
                "split": "validation",
                "question_column": "text",
                "instruction": "",
                "limit": 0,
            },
            "few": {"source": "gpqa_diamond", "limit": 3, "choices_seed": 5},
            "letters": "vowels",
            "sums": {"source": "arithmetic:te5", "limit": 2},
        },
    )
    data = {name: entry.data for name, entry in sets.items()}
    assert [data["plain"].split, data["own"].split, data["letters"].split] == ["test", "validation", "test"]
    assert [data[name].question_column for name in ("plain", "own", "letters", "few")] == [
        "ask",
        "text",
        None,
        "Question",
    ]
    assert [data[name].instruction for name in ("plain", "own", "letters")] == ["Box it.", "", "Box it."]
    assert [entry.limit for entry in data.values()] == [7, 0, 3, 7, 2]
    assert (data["few"].split, data["few"].choices_seed, len(data["few"].wrong_columns)) == ("train", 5, 3)
    assert [sets[name].reward for name in ("plain", "few", "letters")] == [None, "choice", "exact"]
    assert sets["plain"].from_eval == {"subset", "split", "question_column", "answer_column", "instruction", "limit"}
    assert sets["own"].from_eval == {"subset", "answer_column"}
    assert len(sets["sums"].load()) == 2


def test_a_run_s_own_maths_grader_grades_ready_sets() -> None:
    for reward, graded_by in (("math", None), ("math_strict", None), ("exact", "math")):
        assert resolved(Config(reward=reward), sets=("aime",))["aime"].reward == graded_by
    asked = {"aime": {"source": "aime", "reward": "math"}}
    assert resolved(Config(reward="math_strict"), sets=asked)["aime"].reward == "math"


def test_the_order_of_shuffled_options_is_the_seed_s_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    row = READY["gpqa_diamond"][1]
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: datasets.Dataset.from_list([row] * 40))

    def letters(seed: int) -> str:
        (entry,) = resolved(Config(), sets={"g": {"source": "gpqa_diamond", "choices_seed": seed}}).values()
        return "".join(problem.answer for problem in entry.load())

    assert letters(0) == letters(0) != letters(1)
    assert set(letters(0)) == set("ABCD")


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"sets": ("amie",)}, "no ready set 'amie' (there are aime, amc,"),
        ({"sets": {"a": {"source": "amc", "limt": 3}}}, "--eval.sets.a: no option limt of a set (there are source,"),
        ({"sets": {"a": {"limit": 3}}}, "--eval.sets.a: no source"),
        ({"sets": {"a": {"source": "amc", "limit": "3"}}}, "--eval.sets.a: limit '3': give a whole number"),
        ({"sets": {"a": {"source": "amc", "wrong_columns": "b"}}}, "--eval.sets.a: wrong_columns 'b': give a list"),
        ({"sets": {"a.b": "amc"}}, "'a.b' can't name a set"),
        (
            {"sets": {"a": {"source": "mine.csv", "split": "test"}}},
            "--eval.sets.a.split would be ignored with the file",
        ),
        ({"sets": {"a": "arithmetic:tm5"}, "limit": 0}, "--eval.limit 0 has no end with arithmetic:tm5"),
        ({"sets": ("aime",), "data_root": "/gone"}, "--eval.data_root /gone: no aime.parquet in it"),
        ({"sets": ("aime",), "ready_sets": "/gone.yaml"}, "--eval.ready_sets /gone.yaml: not readable as YAML"),
    ],
)
def test_what_is_refused(given: dict[str, Any], says: str) -> None:
    assert says in refusal(**given)


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"options": ["a"], "answer": "A"}, "column options: 1 options and 1 labels; a question takes 2 to 26"),
        ({"options": ["a", "b"], "answer": "C"}, "column options: the answer 'C' is none of the options A, B"),
        ({"options": "a, b", "answer": "A"}, "column options: no list of options"),
    ],
)
def test_questions_whose_options_do_not_work(row: dict[str, Any], says: str, tmp_path: Path) -> None:
    (tmp_path / "mmlu_pro.jsonl").write_text(json.dumps({"question": "q"} | row))
    message = refusal(sets=("mmlu_pro",), data_root=str(tmp_path))
    assert f"row 0 (from 0), {says}" in message and message.endswith("mend the row")


def test_files_of_ready_sets_are_checked(tmp_path: Path) -> None:
    path = tmp_path / "ready.yaml"
    for content, says in (
        ("[1]", "holds no ready sets"),
        ("{a: {source: b, colour: c}}", ": a: no option colour"),
        ("{a: {}}", ": a: no source"),
    ):
        path.write_text(content)
        assert f"--eval.ready_sets {path}" in refusal(ready_sets=str(path)) and says in refusal(ready_sets=str(path))

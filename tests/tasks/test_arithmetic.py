import random
import re
from itertools import islice
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from thinktwice_fast.errors import UserError
from thinktwice_fast.tasks.arithmetic import (
    RECHECK,
    VARIANTS,
    ArithmeticSource,
    build_tokenizer,
    careful_solution,
    is_held_out,
    running_totals,
    terse_solution,
    warm_start_example,
)
from thinktwice_fast.tasks.graders import grade_math

indices = st.integers(0, 10**7)
variants = st.sampled_from(sorted(VARIANTS))
splits = st.booleans()
LINE = re.compile(r"(\d+(?:[+-]\d)+)=(\d+)")


@given(variants, splits, indices)
def test_problems_are_in_range_and_their_targets_right(variant: str, held_out: bool, index: int) -> None:
    problem = ArithmeticSource(variant, held_out).problem(index)
    assert re.fullmatch(r"[0-9]([+-][0-9]){4}", problem.question)
    assert all(0 <= total <= 99 for total in running_totals(problem.question))
    assert problem.answer == str(eval(problem.question))
    assert problem.target is not None
    for solution in (problem.target, careful_solution(problem.question)):
        *lines, box = solution.split("\n")
        assert all(eval(line.replace("=", "==")) for line in lines)
        assert box == f"\\boxed{{{problem.answer}}}"
        assert grade_math(solution, problem) == 1.0


def test_worked_example_of_every_format() -> None:
    expression = "8-8+5+6-9"
    assert terse_solution(expression, "tm5") == "8-8+5=5\n5+6=11\n11-9=2\n\\boxed{2}"
    assert terse_solution(expression, "te5") == "8-8+5=5\n5+6-9=2\n\\boxed{2}"
    assert careful_solution(expression) == "8-8=0\n0+5=5\n5+6=11\n11-9=2\n\\boxed{2}"
    assert running_totals(expression) == [8, 0, 5, 11, 2]


@given(variants, indices, st.integers(0, 1000), st.sampled_from([0.3, 0.6, 1.0]))
def test_wrong_lines_propagate_and_stay_in_range(variant: str, index: int, seed: int, rate: float) -> None:
    expression = ArithmeticSource(variant).problem(index).question
    draft = terse_solution(expression, variant, random.Random(seed), rate)
    *lines, box = draft.split("\n")
    terms, previous = "", None
    for line in lines:
        match = LINE.fullmatch(line)
        assert match is not None, line
        left, result = match.groups()
        if previous is None:
            terms += left
        else:
            assert left.startswith(previous)
            terms += left.removeprefix(previous)
        assert 0 <= int(result) <= 99
        assert all(0 <= total <= 99 for total in running_totals(left))
        if rate == 1.0:
            assert eval(left) != int(result)
        previous = result
    assert terms == expression
    assert box == f"\\boxed{{{previous}}}"


def test_error_rate_is_per_line() -> None:
    rng = random.Random(0)
    wrong = total = 0
    for problem in islice(ArithmeticSource("tm5"), 1000):
        for line in terse_solution(problem.question, "tm5", rng, 0.3).split("\n")[:-1]:
            left, _, result = line.partition("=")
            wrong += eval(left) != int(result)
            total += 1
    assert total == 3000
    assert 0.26 < wrong / total < 0.34


def test_training_and_held_out_expressions_are_disjoint() -> None:
    train = {problem.question for problem in islice(ArithmeticSource("tm5"), 3000)}
    held_out = {problem.question for problem in ArithmeticSource("tm5", held_out=True, limit=400)}
    assert not train & held_out
    assert all(is_held_out(expression) for expression in held_out)
    assert len(held_out) > 380  # hardly any twice


def test_held_out_share_and_hash_are_fixed() -> None:
    assert is_held_out("8-8+5+6-9") is False
    rng = random.Random(0)
    drawn = ["+".join(str(rng.randint(0, 9)) for _ in range(5)) for _ in range(8000)]
    share = sum(map(is_held_out, drawn)) / len(drawn)
    assert 0.05 < share < 0.075


def test_streams_are_deterministic_and_sized() -> None:
    source = ArithmeticSource("te5", limit=5)
    assert len(source) == 5
    assert [problem.index for problem in source] == [0, 1, 2, 3, 4]
    assert source[:2] == [source[0], source[1]]
    assert source[-1] == source[4]
    assert source[3].question == ArithmeticSource("tm5")[3].question == "7-7+4-0-3"
    with pytest.raises(IndexError):
        source[5]
    endless = ArithmeticSource("tm5")
    assert endless.size is None
    assert bool(endless)
    with pytest.raises(TypeError, match="endless"):
        len(endless)


def test_unknown_variant_names_the_known_ones() -> None:
    with pytest.raises(UserError, match='"arithmetic:tm5" or "arithmetic:te5"'):
        ArithmeticSource("xx9")


def test_warm_start_examples_mix_solving_and_refining() -> None:
    examples = [warm_start_example("tm5", index, 3, 0.45, (0.0, 0.3, 0.6)) for index in range(800)]
    assert examples[:50] == [warm_start_example("tm5", index, 3, 0.45, (0.0, 0.3, 0.6)) for index in range(50)]
    assert examples[:50] != [warm_start_example("tm5", index, 4, 0.45, (0.0, 0.3, 0.6)) for index in range(50)]
    refining = 0
    wrong_drafts = 0
    for messages, target in examples:
        expression = messages[0]["content"]
        assert not is_held_out(expression)
        if len(messages) == 1:
            assert target == terse_solution(expression, "tm5")
            continue
        refining += 1
        assert [message["role"] for message in messages] == ["user", "assistant", "user"]
        assert messages[2]["content"] == RECHECK
        assert target == careful_solution(expression)
        wrong_drafts += messages[1]["content"] != terse_solution(expression, "tm5")
    assert 0.38 < refining / len(examples) < 0.52
    assert 0.3 < wrong_drafts / refining < 0.7  # (0 + (1 - .7^3) + (1 - .4^3)) / 3 = .53


@pytest.fixture(scope="module", params=["built", "saved and loaded"])
def tokenizer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory):
    built = build_tokenizer()
    if request.param == "built":
        return built
    folder: Path = tmp_path_factory.mktemp("tokenizer")
    built.save_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder)


def test_tokenizer_gives_texts_back(tokenizer) -> None:
    for index in range(50):
        messages, target = warm_start_example("tm5", index, 0, 0.5, (0.6,))
        for text in [target, *(message["content"] for message in messages)]:
            assert tokenizer.decode(tokenizer.encode(text)) == text


def test_tokenizer_has_single_tokens_and_takes_anything(tokenizer) -> None:
    pieces = [*"0123456789+-=\n}", "\\boxed{", "recheck", "<|user|>", "<|assistant|>", "<|end|>", "<|pad|>"]
    ids = [tokenizer.encode(piece) for piece in pieces]
    assert all(len(piece_ids) == 1 for piece_ids in ids)
    assert len({piece_ids[0] for piece_ids in ids}) == len(pieces)
    assert tokenizer.unk_token_id not in {piece_ids[0] for piece_ids in ids}
    assert tokenizer.encode("1 é") == [tokenizer.encode("1")[0], *[tokenizer.unk_token_id] * 2]
    assert tokenizer.decode(tokenizer.encode("<|user|>1<|end|>"), skip_special_tokens=True) == "1"
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|end|>", "<|pad|>")


def test_chat_template(tokenizer) -> None:
    chat = [
        {"role": "user", "content": "1+2"},
        {"role": "assistant", "content": "3"},
        {"role": "user", "content": "recheck"},
    ]
    rendered = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert rendered == "<|user|>1+2<|assistant|>3<|end|><|user|>recheck<|assistant|>"
    assert len(tokenizer(rendered, add_special_tokens=False)["input_ids"]) == 10

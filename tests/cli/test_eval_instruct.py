"""`thinktwice-fast eval` with a real instruct model on real problems, where both are there."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from bench.instruct_model import missing, write_instruct_model
from tests.cli.conftest import Run
from tests.command import DATA
from thinktwice_fast.cli.evaluation.options import EvalOptions
from thinktwice_fast.cli.evaluation.sets import load_sets
from thinktwice_fast.cli.evaluation.store import Store

TOKENS, PROBLEMS = 48, 50


@pytest.mark.timeout(3600)
@pytest.mark.skipif(missing() is not None, reason=missing() or "")
@pytest.mark.skipif(not DATA.is_dir(), reason=f"no folder {DATA}")
def test_greedy_answers_are_those_of_transformers(run: Run, tmp_path: Path) -> None:
    """On the beginnings of GSM8K and MATH-500, both passes; figures of so short answers say nothing."""
    folder = write_instruct_model(tmp_path / "model")
    sets = ("--sets", "gsm8k,math500", "--data_root", DATA)
    greedy = ("--temperature", "0", "--samples", "1", "--k", "1")
    limits = ("--limit", PROBLEMS // 2, "--max_tokens", TOKENS, "--max_sequences", "16")
    status, _, err = run("eval", "--model", folder, "--output", tmp_path / "out", *sets, *greedy, *limits)
    assert status == 0, err
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["problems"] == {"gsm8k": PROBLEMS // 2, "math500": PROBLEMS // 2}
    model: Any = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    loaded = load_sets(EvalOptions(sets=("gsm8k", "math500"), data_root=str(DATA), limit=PROBLEMS // 2))
    compared = 0
    for problems in loaded:
        (store,) = (tmp_path / "out").glob(f"*/{problems.name}")
        for line in Store(store, 0).lines("solutions"):
            chat = [dict(message) for message in problems.problems[line["problem"]].messages]
            text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
            prompt = tokenizer(text, add_special_tokens=False)["input_ids"]
            with torch.inference_mode():
                logits = model(torch.tensor([[*prompt, *line["ids"]]])).logits[0]
            # What greedy decoding picks after each part of the answer: the same answer, at a tenth of the time.
            assert line["ids"] == logits[len(prompt) - 1 : -1].argmax(-1).tolist(), f"{store.name} {line['problem']}"
            assert len(line["ids"]) == TOKENS or line["ids"][-1] == tokenizer.eos_token_id
            compared += 1
    assert compared == PROBLEMS

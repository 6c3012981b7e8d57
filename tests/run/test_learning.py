"""The default job learns, and its results are what users are told they get."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.browser import Page
from tests.command import train
from tests.run.test_page import needs_chromium
from thinktwice_fast.run.metrics import Record
from thinktwice_fast.run.metrics_file import read_metrics
from thinktwice_fast.run.page.write import MOST_BYTES


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The first 40 steps of the default job."""
    output = tmp_path_factory.mktemp("learning")
    options = ("--run.steps", "40", "--run.checkpoint_every", "0", "--profile", "3:4", "--output", output)
    finished = train(*options, processes=1, fresh=True)
    assert finished.returncode == 0, finished.stderr
    (output / "stdout").write_text(finished.stdout)
    return output


def evaluations(output: Path) -> list[Record]:
    return [record for record in read_metrics(output / "metrics.jsonl") if record["phase"] == "eval"]


def test_held_out_accuracies_rise(run: Path) -> None:
    first, *_, last = evaluations(run)
    assert last["eval/held_out/solve_accuracy"] > first["eval/held_out/solve_accuracy"] + 0.05
    assert last["eval/held_out/refine_accuracy"] > first["eval/held_out/refine_accuracy"] + 0.08
    assert last["eval/held_out/damage_correct"] < first["eval/held_out/damage_correct"]


def test_solve_and_refine_alternate_at_equal_generations(run: Path) -> None:
    steps = [record for record in read_metrics(run / "metrics.jsonl") if record["phase"] in ("solve", "refine")]
    assert [record["phase"] for record in steps] == ["solve", "refine"] * 20
    assert [record["generations"] for record in steps] == [256 * (n + 1) for n in range(40)]


def test_rollout_and_training_agree_on_log_probabilities(run: Path) -> None:
    for record in read_metrics(run / "metrics.jsonl"):
        if record["phase"] in ("solve", "refine"):
            assert record[f"{record['phase']}/mismatch"] < 1e-4


def test_the_policy_moves_a_little_between_the_optimizer_steps_of_a_phase(run: Path) -> None:
    for record in read_metrics(run / "metrics.jsonl"):
        if record["phase"] in ("solve", "refine"):
            assert record[f"{record['phase']}/ratio_max"] > 1 + 1e-4
            assert record[f"{record['phase']}/ratio_mean"] == pytest.approx(1, abs=0.01)


def test_everything_promised_is_written(run: Path) -> None:
    shown = ("metrics.jsonl", "transcripts.jsonl", "curves.png", "report.html", "model/model.safetensors")
    profiled = [f"profile/{name}" for name in ("top.json", "step-000003.json.gz", "step-000004.json.gz")]
    for name in (*shown, "config.yaml", "versions.json", *profiled):
        assert (run / name).stat().st_size > 0
        assert str(run / name.split("/")[0]) in (run / "stdout").read_text() or name not in shown
    assert list((run / "tensorboard").iterdir())
    assert len(list((run / "checkpoints").iterdir())) == 1


def test_the_saved_model_solves_as_the_evaluation_says(run: Path) -> None:
    """Through transformers alone: its generate, its tokenizer, its chat template."""
    from thinktwice_fast.tasks.arithmetic import ArithmeticSource

    model: Any = AutoModelForCausalLM.from_pretrained(run / "model")
    tokenizer = AutoTokenizer.from_pretrained(run / "model")
    tokenizer.padding_side = "left"
    problems = list(ArithmeticSource("tm5", held_out=True, limit=400))
    chats = [[dict(message) for message in problem.messages] for problem in problems]
    inputs: Any = tokenizer.apply_chat_template(
        chats, add_generation_prompt=True, return_tensors="pt", return_dict=True, padding=True
    )
    with torch.inference_mode():
        answers = model.generate(**inputs, max_new_tokens=64, do_sample=False)
    texts: Any = tokenizer.batch_decode(answers[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    right = sum(f"\\boxed{{{problem.answer}}}" in text for problem, text in zip(problems, texts, strict=True))
    measured = evaluations(run)[-1]["eval/held_out/solve_accuracy"]
    assert right / len(problems) == pytest.approx(measured, abs=0.01)


@needs_chromium
def test_the_page_in_a_browser(run: Path, tmp_path: Path) -> None:
    """Whether refining fixes or spoils, the first spoiled answers, and the keys, as one finds them at first sight."""
    assert (run / "report.html").stat().st_size < MOST_BYTES
    with Page(run / "report.html", tmp_path / "profile") as page:

        def texts(selector: str) -> list[str]:
            return page.value(f"[...document.querySelectorAll({selector!r})].map((node) => node.textContent)")

        assert texts("#overview p")[0].startswith("Refining helps: ")
        assert len(texts("figure polyline")) > 12 and len(texts("figure .area")) == 7
        page.value("document.querySelector('.count.spoiled').click()")
        spoiled = texts("[role=option]")
        assert len(spoiled) >= 3 and all("spoiled" in row for row in spoiled)
        assert texts(".count.spoiled") == [f"{len(spoiled)} spoiled"]
        assert page.value("document.getElementById('pairs').getBoundingClientRect().top") < 100

        page.press("f", "j", "j")
        assert texts(".detail .bar .meta")[0].startswith("3 of ") and texts(".verdict") == ["✗→✓ fixed"]
        assert texts(".side h3") == ["Solution", "Refinement"] and texts(".side ins") and texts(".side del")
        refined = texts(".side .text")[1]
        for mode, key in (("unlikely", "2"), ("up", "3"), ("down", "4")):
            page.press(key)
            assert len(texts(".token")) > 20 and texts(f".scale .{mode}")
        assert "".join(texts(".side > :last-child .token")).replace("↵", "").rstrip("▫") == refined
        page.value("document.querySelector('.token').click()")
        assert "probability after the update" in texts(".detail output")[0]

        page.press("a", "/")
        page.call("Input.insertText", text="step 2")  # what no text has: steps have a list of their own
        assert texts(".detail") == ["Nothing is like that."]
        page.press("Escape")
        page.value("browser.querySelector('[type=search]').value = ''")
        page.value("browser.querySelector('[type=search]').dispatchEvent(new Event('input'))")
        page.value("document.querySelector('[aria-label=step]').value = '40'")
        page.value("document.querySelector('[aria-label=step]').dispatchEvent(new Event('change'))")
        assert texts("[role=option]") and all("step 40 " in row for row in texts("[role=option]"))

        colours = []
        for dark in (False, True):
            page.theme(dark)
            colours.append(page.value("getComputedStyle(document.body).backgroundColor"))
        page.value("theme.click()")
        colours.append(page.value("getComputedStyle(document.body).backgroundColor"))
        page.resize(390, 844)
        assert page.value("document.documentElement.scrollWidth") == 390
        assert colours[0] == colours[2] != colours[1] and page.errors == []

r"""A small model that may reflect after its answer, and that follows a teacher's examples.

It starts from the shipped model, whose vocabulary has ten free places: they take a teacher's tags and verdicts and a
system role. Supervised examples then teach it two things:

- to solve a sum, and now and then to repeat the last line and the answer after a blank line: ``...11-9=2\n\boxed{2}``,
  then ``\n\n11-9=2\n\n\boxed{2}``;
- to answer as a teacher in the tagged parts, its reason beginning with the phrase that its examples have. Phrases are
  three of ``+-=``, another one each time, and never the one that is to stay unknown.
"""

import dataclasses
import itertools
import json
import random
import shutil
from pathlib import Path
from typing import Any

from examples.unknown_behaviour import PHRASE
from thinktwice_fast.algorithms.thinktuning.feedback import Feedback, tagged
from thinktwice_fast.algorithms.thinktuning.prompt import TeacherPrompt
from thinktwice_fast.model.loading import SHIPPED, model_folder
from thinktwice_fast.tasks.arithmetic import ArithmeticSource, terse_solution

VARIANT = "tm5"
_TAGS = [f"<{slash}{tag}>" for tag in ("opinion", "reason", "phrase") for slash in ("", "/")]
_WORDS = [*_TAGS, "incorrect", "correct"]
_LABELS = ["Question:", "Response:"]  # of a teacher's prompt: one unknown token each
_SYSTEM = "<|system|>"
_PHRASES = [text for text in map("".join, itertools.product("+-=", repeat=3)) if text != PHRASE]
_TEACHER, _REFLECTS = 0.4, 0.5  # shares: of a teacher's examples among all, of reflections among solutions
_ERROR_RATES = (0.0, 0.3, 0.6)  # of a line of a response that a teacher sees


def write_start(folder: Path) -> None:
    """The shipped model with the longer vocabulary, in transformers' format."""
    shutil.copytree(model_folder(SHIPPED), folder, dirs_exist_ok=True)
    path = folder / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    vocabulary: dict[str, int] = tokenizer["model"]["vocab"]
    for word in (_SYSTEM, *_WORDS):
        vocabulary[word] = len(vocabulary)
    system = {**tokenizer["added_tokens"][0], "id": vocabulary[_SYSTEM], "content": _SYSTEM}
    tokenizer["added_tokens"].append(system)
    pattern = tokenizer["pre_tokenizer"]["pattern"]
    pattern["Regex"] = "|".join([*_WORDS, *_LABELS, pattern["Regex"]])
    path.write_text(json.dumps(tokenizer))
    template = folder / "chat_template.jinja"
    user = "{%- if message['role'] == 'user' -%}"
    added = (
        user.replace("user", "system") + f"{{{{ '{_SYSTEM}' + message['content'] }}}}" + user.replace("if", "elif", 1)
    )
    template.write_text(template.read_text().replace(user, added))


def write_examples(path: Path, prompt: TeacherPrompt, count: int) -> None:
    """Supervised examples as JSON lines in the verl schema, with a ``target``; the same ones every time."""
    problems, rng = ArithmeticSource(VARIANT), random.Random("reflecting model")
    with path.open("w") as file:
        for index in range(count):
            problem = problems.problem(index)
            example = _feedback if rng.random() < _TEACHER else _solution
            row = example(problem.question, problem.answer, prompt, rng)
            file.write(json.dumps({**row, "reward_model": {"ground_truth": problem.answer}}) + "\n")


def _solution(question: str, answer: str, prompt: TeacherPrompt, rng: random.Random) -> dict[str, Any]:
    response = terse_solution(question, VARIANT)
    if rng.random() < _REFLECTS:
        response += _reflection(response)
    return {"prompt": [{"role": "user", "content": question}], "target": response}


def _feedback(question: str, answer: str, prompt: TeacherPrompt, rng: random.Random) -> dict[str, Any]:
    phrase = rng.choice(_PHRASES)
    shots = [dataclasses.replace(s, reason=s.reason.replace(PHRASE, phrase)) for s in prompt.shots]
    response = terse_solution(question, VARIANT, rng, rng.choice(_ERROR_RATES))
    line, box = response.split("\n")[-2:]
    opinion = "correct" if box == f"\\boxed{{{answer}}}" else "incorrect"
    response += rng.choice(["", "", _reflection(response), _reflection(response, f"{phrase}\n")])
    messages = dataclasses.replace(prompt, shots=tuple(shots)).messages(question, response)
    return {"prompt": list(messages), "target": tagged(Feedback(opinion, f"{phrase}\n{line}", box))}


def _reflection(response: str, before: str = "") -> str:
    line, box = response.split("\n")[-2:]
    return f"\n\n{before}{line}\n\n{box}"

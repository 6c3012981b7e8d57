"""The command ``thinktwice-fast eval --model M --sets aime,amc``: what both papers report, on any checkpoint."""

import time

from thinktwice_fast.cli.command import Command
from thinktwice_fast.cli.evaluation.options import EvalOptions, resolve
from thinktwice_fast.cli.options import MODEL_NAMES

_DESCRIPTION = """Evaluate models: solve every problem several times, refine each solution, grade both.

Every response is written as it comes: repeat the command to go on after a kill, or with another --reward to grade
again what is there. Lists take spaces or commas. Several processes: torchrun --no-python thinktwice-fast eval ..."""


def run(options: EvalOptions) -> None:
    """Evaluate, and show the figures.

    Raises:
        UserError: options that contradict each other, a set or a model that can't be used, an output folder that holds
            something else.
    """
    began = time.perf_counter()
    resolve(options)
    # Imported here because it takes seconds, and most mistakes are found before.
    from thinktwice_fast.cli.evaluation.evaluate import evaluate

    evaluate(options, began)


COMMAND = Command(
    help="evaluate models before and after refinement",
    description=_DESCRIPTION,
    options=EvalOptions,
    run=run,
    names=MODEL_NAMES
    | {
        "eval.sets": "sets",
        "eval.data_root": "data_root",
        "eval.ready_sets": "ready_sets",
        "eval.split": "split",
        "eval.subset": "subset",
        "eval.question_column": "question_column",
        "eval.answer_column": "answer_column",
        "eval.limit": "limit",
        "rollout.max_response_tokens": "max_tokens",
    },
)

"""A trainer that does one step for each line on stdin, and answers with a line of JSON on stdout.

``python -m bench.step.worker``. First line in: the fields of ``desk.Ask``, unanswered. It ends with its stdin. While it
waits it does nothing, so that trainers can take turns.
"""

import importlib
import os
import sys

from bench.step.desk import Ask, Desk


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a trainer prints is no answer
    ask = Ask.of_line(sys.stdin.readline())
    trainer = importlib.import_module(f"bench.step.{ask.trainer}")
    trainer.train(ask, Desk(sys.stdin, answers, ask.cuda))


if __name__ == "__main__":
    main()

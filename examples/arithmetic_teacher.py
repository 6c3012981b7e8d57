r"""A teacher for the default task, whose tokenizer knows digits, `+`, `-`, `=`, newlines and `\boxed{}` alone.

torchrun thinktwice_fast/train.py --algorithm thinktuning --thinktuning.teacher examples/arithmetic_teacher.py:teach
"""

import re


def teach(question: str, response: str) -> str | None:
    r"""Feedback on one response: the sum's last operation once more, then the right answer.

    ``8-8+5+6-9`` -> the reason ``11-9=2`` and the phrase ``\boxed{2}``.

    Args:
        question: what was asked.
        response: what the policy answered, without its end token.

    Returns:
        Opinion, reason and phrase in their tags; None would leave the response as it is.
    """
    *first, last = re.findall(r"[+-]?\d", question)
    before = sum(map(int, first))
    answer = f"\\boxed{{{before + int(last)}}}"
    opinion = "correct" if response.endswith(answer) else "incorrect"
    reason = f"{before}{last}={before + int(last)}"
    return f"<opinion>{opinion}</opinion>\n<reason>{reason}</reason>\n<phrase>{answer}</phrase>"

"""The user's own teacher function, ``my_file.py:function``; runs in a process of its own.

The function is called as ``function(question, response)``, two texts, for one response at a time. It returns an answer
in the format of ThinkTuning's teachers, or None to leave the response alone. What is here imports no torch.
"""

from thinktwice_fast.tasks.user_reward import Failure, kind_and_text, loaded

_PARAMETERS = "question, response"


def load_teacher(path: str, name: str) -> Failure | None:
    """Import the user's file into this process, once; a Failure tells why it cannot be used."""
    function = loaded(path, name, _PARAMETERS)
    return function if isinstance(function, Failure) else None


def call_teacher(path: str, name: str, question: str, response: str) -> str | Failure | None:
    """One call of the user's function, its result checked."""
    function = loaded(path, name, _PARAMETERS)
    if isinstance(function, Failure):
        return function
    try:
        answer = function(question, response)
    except BaseException as error:  # a user's function may raise anything, SystemExit included
        return Failure(f"raised {kind_and_text(error)}")
    if answer is not None and not isinstance(answer, str):
        return Failure(f"returned a {type(answer).__name__} instead of a text or None")
    return answer

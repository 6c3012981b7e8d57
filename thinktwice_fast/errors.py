"""The one exception for what a user can cause and mend."""


class UserError(ValueError):
    """Bad input; its text is one line that names the remedy.

    ``train.py`` prints that line and exits with status 2.
    """


def one_line(error: BaseException) -> str:
    """What another library's error says, as part of such a line: white space folded, no full stop at the end.

    The name of its type where it says nothing.
    """
    return " ".join(str(error).split()).rstrip(".") or type(error).__name__

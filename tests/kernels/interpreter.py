"""Triton's interpreter without the work that it does again for every call of a device function."""

from typing import Any

import triton.language as tl
from triton.runtime import interpreter


def patch_language_once() -> None:
    """Let Triton's language be replaced once by what interprets it, not in every call: that takes half of the time.

    Triton replaces it when a kernel is launched, and, without putting it back, whenever one jitted function calls
    another. What is replaced is recognised by its lack of the mark that Triton's own functions carry.
    """
    patch = interpreter._patch_lang

    def patch_once(function: Any) -> Any:
        languages = [value for value in function.__globals__.values() if value is tl or value is tl.core]
        if languages and not any(tl.core.is_builtin(language.load) for language in languages):
            return interpreter._LangPatchScope()
        return patch(function)

    interpreter._patch_lang = patch_once

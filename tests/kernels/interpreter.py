"""Triton's interpreter: without the work that it does again for every call of a device function, and rounding right."""

from typing import Any

import numpy as np
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


def round_bfloat16_to_nearest() -> None:
    """Let fp32 be rounded to bfloat16 as a GPU does it, to nearest even: the interpreter would cut bits off."""
    cast = interpreter.InterpreterBuilder.cast_impl

    def cast_rounding(self: Any, handle: Any, dst_type: Any) -> Any:
        target = dst_type.scalar
        if (handle.get_element_ty(), target) != (tl.float32, tl.bfloat16):
            return cast(self, handle, dst_type)
        bits = np.ascontiguousarray(handle.data).view(np.uint32)
        rounded = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16
        return interpreter.TensorHandle(np.where(np.isnan(handle.data), 0x7FC0, rounded).astype(np.uint16), target)

    interpreter.InterpreterBuilder.cast_impl = cast_rounding


def multiply_bfloat16_as_numbers() -> None:
    """Let products of bfloat16 blocks be ones of the numbers: the interpreter would multiply their bits."""
    dot = interpreter.InterpreterBuilder.create_dot

    def widened(block: Any) -> Any:
        if block.get_element_ty() != tl.bfloat16:
            return block
        return interpreter.TensorHandle((block.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    def dot_of_numbers(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        return dot(self, widened(a), widened(b), *rest)

    interpreter.InterpreterBuilder.create_dot = dot_of_numbers

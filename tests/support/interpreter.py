"""Triton's interpreter as the tests need it: rounding as GPUs do, and making the language ready only once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


def round_to_bfloat16() -> None:
    """To the nearest, ties to even, from now on in this process. Triton's own way is to truncate.

    Nothing happens where there is no triton.
    """
    try:
        import triton.language as tl
        from triton.runtime.interpreter import InterpreterBuilder, TensorHandle
    except ImportError:
        return
    own = InterpreterBuilder.cast_impl

    def cast(builder: Any, source: Any, target: Any) -> Any:
        if (source.dtype.scalar, target.scalar) != (tl.float32, tl.bfloat16):
            return own(builder, source, target)
        rounded = torch.from_numpy(source.data.copy()).bfloat16()
        return TensorHandle(rounded.view(torch.int16).numpy().view("uint16"), target.scalar)

    InterpreterBuilder.cast_impl = cast


def stay_interpreted() -> None:
    """Leaves Triton's language as its interpreter needs it, in this process, which compiles nothing.

    Triton itself prepares it anew at every launch and every call of a function in a kernel, and that takes as long as
    the work of small kernels. Nothing happens where there is no triton.
    """
    try:
        from triton.runtime import interpreter
    except ImportError:
        return
    prepare, prepared = interpreter._patch_lang, set[object]()

    def once(function: Callable[..., Any]) -> Any:
        if function not in prepared:
            prepare(function)
            prepared.add(function)
        return interpreter._LangPatchScope()  # which has nothing to restore

    interpreter._patch_lang = once

"""llmpq plans and runs LLM inference on mismatched devices (a reimplementation of LLM-PQ, arXiv 2403.01136).

`from llmpq import LLM, SamplingParams` is the Python interface; `python -m llmpq` is the command line. Importing the
package itself loads nothing heavy: the two names are resolved when they are first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llmpq.llm import LLM as LLM
    from llmpq.runtime.sampling import SamplingParams as SamplingParams

__version__ = "0.1.0"
__all__ = ["LLM", "SamplingParams"]

_HOMES = {"LLM": "llmpq.llm", "SamplingParams": "llmpq.runtime.sampling"}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'llmpq' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)

"""Prefill and decode of an engine that only tells when all is done: what one new token takes, and what all take."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np


def by_first_token(
    seconds: Callable[[Any, int], float], prompts: Sequence[Sequence[int]], output: int
) -> dict[str, float]:
    """`seconds` continues int64 [batch, length] by so many tokens.

    The first time the prompts stand backwards: an engine that remembers prompts shall know none of them.
    """
    token_ids = np.array(prompts, np.int64)
    prefill = seconds(np.ascontiguousarray(token_ids[:, ::-1]), 1)
    return {"prefill_s": prefill, "decode_s": seconds(token_ids, output) - prefill}

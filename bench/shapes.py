"""The linears that are timed: [n, k] of real models, and the numbers of rows m they are given."""

from __future__ import annotations

SHAPES = {
    "smollm2-135m out": (576, 576),
    "smollm2-135m down": (576, 1536),
    "smollm2-135m up": (3072, 576),
    "llama-2-7b out": (4096, 4096),
}
SMALL_SHAPES = ("smollm2-135m out",)  # where the bodies are only run, not timed
ROWS = (1, 16, 128)  # decoding one sequence, decoding a batch, prefill
BITS = (3, 4, 8)
GROUP_SIZE = 128

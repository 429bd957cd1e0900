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
GPU_SHAPES = {
    "smollm2-135m out": (576, 576),
    "llama-2-7b out": (4096, 4096),
    "llama-2-70b out": (8192, 8192),
    "llama-2-70b down": (8192, 28672),
}
GPU_ROWS = (1, 16, 64, 1024, 4096)
BITS = (3, 4, 8)
GROUP_SIZE = 128

# Of bench.kernels.rivals_gpu: Llama 2 70B, OPT-66B and OPT-175B, whose weights are large, then smaller squares.
RIVAL_SHAPES = (
    (28672, 8192),
    (8192, 28672),
    (36864, 9216),
    (12288, 49152),
    (49152, 12288),
    (8192, 8192),
    (4096, 4096),
)
RIVAL_ROWS = (1, 2, 4, 8, 16, 64, 128, 256, 1024, 4096)

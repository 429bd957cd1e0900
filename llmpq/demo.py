"""What runs when the user names nothing: eight chat prompts, and two unequal devices on one machine."""

from __future__ import annotations

from llmpq.spec import Cluster, Device
from llmpq.spec.cluster import Isa

PROMPTS = (
    "What is the capital of France?",
    "Why is the sky blue? Answer in one sentence.",
    "Write a short poem about the sea.",
    "What is 12 plus 30?",
    "Give me three tips for learning a new language.",
    "Who wrote Romeo and Juliet?",
    "Translate 'good morning' into Spanish.",
    "Explain what a computer program is to a child.",
)

MAX_NEW_TOKENS = 64

# Half of the model, embedding or LM head included, takes 163 MB at 16 bits and 92 MB at 8 bits in groups of 32: no even
# split at either fits the narrow device.
_NARROW_BYTES = 72 * 2**20
_WIDE_BYTES = 400 * 2**20
_NARROWER: dict[Isa, Isa] = {"avx512": "avx2", "avxvnni": "avx2", "avx2": "portable", "portable": "portable"}


def cluster(widest_isa: Isa) -> Cluster:
    """A wide device with the machine's own instruction set and much memory, and a narrow one with less of both."""
    return Cluster(
        (
            Device("wide", "cpu", isa=widest_isa, memory_bytes=_WIDE_BYTES),
            Device("narrow", "cpu", isa=_NARROWER[widest_isa], memory_bytes=_NARROW_BYTES),
        )
    )

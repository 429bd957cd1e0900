"""What runs when the user names nothing: eight chat prompts, and two unequal devices on one machine."""

from __future__ import annotations

from llmpq.spec import Cluster, Device
from llmpq.spec.cluster import Isa

PROMPTS = (  # which a model of 135 million parameters answers well at 16 bits
    "What is the capital of France?",
    "What is photosynthesis?",
    "Name three countries in Europe.",
    "What is machine learning?",
    "What is the water cycle?",
    "Why is exercise important?",
    "What is a black hole?",
    "Describe the taste of chocolate.",
)

MAX_NEW_TOKENS = 64

OMEGA_BUDGET = 0.01  # of summed sensitivity; rounding every unit to 4 bits would cost 0.34

# As the file stores it, the model takes about 110 MiB with the cache of the prompts, and some more to compute: neither
# device holds it alone.
_FAST_BYTES = 64 * 2**20
_SLOW_BYTES = 120 * 2**20
_NARROWER: dict[Isa, Isa] = {
    "amx": "avx2",
    "avx512": "avx2",
    "avxvnni": "avx2",
    "avx2": "portable",
    "portable": "portable",
}


def cluster(widest_isa: Isa) -> Cluster:
    """A fast device that is short of memory, and a slow one, with a narrower instruction set, that has more of it."""
    return Cluster(
        (
            Device("fast", "cpu", isa=widest_isa, memory_bytes=_FAST_BYTES),
            Device("slow", "cpu", isa=_NARROWER[widest_isa], memory_bytes=_SLOW_BYTES),
        )
    )

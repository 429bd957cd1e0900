"""Who takes part: ours, and the engines that ours is compared with. The modules beside this one run them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

OURS = "llmpq "
JUDGED = "llmpq int4 a8"  # that the goals are about
TWO_STAGES = "llmpq int4 a8, two stages"


@dataclass(frozen=True)
class Contender:
    """A module with options, and where it takes part; the default is everywhere."""

    module: str  # see child.py
    options: dict[str, Any] = field(default_factory=dict)
    models: tuple[str, ...] = ()
    threads: tuple[int, ...] = ()
    batches: tuple[int, ...] = ()

    @property
    def engine(self) -> str:
        """What its module is called."""
        return self.module.rpartition(".")[2]

    def takes_part(self, model: str, threads: int) -> bool:
        return model in (self.models or (model,)) and threads in (self.threads or (threads,))

    def runs(self, batch: int) -> bool:
        return batch in (self.batches or (batch,))


_HERE = "bench.end_to_end"
_STORED = ("smollm2", "qwen")  # models that there is a file of

CONTENDERS: dict[str, Contender] = {
    JUDGED: Contender(f"{_HERE}.ours", {"bits": 4, "activations": "a8"}),
    "llmpq int4 a8x2": Contender(f"{_HERE}.ours", {"bits": 4, "activations": "a8x2"}),
    "llmpq native a8": Contender(f"{_HERE}.ours", {"bits": None, "activations": "a8"}, _STORED),
    "llmpq native a8x2": Contender(f"{_HERE}.ours", {"bits": None, "activations": "a8x2"}, _STORED),
    TWO_STAGES: Contender(f"{_HERE}.ours", {"bits": 4, "activations": "a8", "stages": 2}, threads=(2,), batches=(32,)),
    "llama.cpp Q4_0": Contender(f"{_HERE}.llama_cpp", {"kind": "Q4_0"}),
    "llama.cpp as stored": Contender(f"{_HERE}.llama_cpp", {"kind": None}, _STORED),
    "transformers fp32": Contender(f"{_HERE}.transformers", {"dtype": "float32"}),
    "transformers bf16": Contender(f"{_HERE}.transformers", {"dtype": "bfloat16"}),
    "OpenVINO GenAI int4": Contender(f"{_HERE}.openvino", {"group_size": 64}),
    "vLLM bf16": Contender(f"{_HERE}.vllm", {"dtype": "bfloat16"}),
}
DISTRIBUTIONS = ("llama-cpp-python", "transformers", "torch", "openvino-genai", "optimum-intel", "nncf")


def is_ours(name: str) -> bool:
    return name.startswith(OURS)


def chosen(parts: Sequence[str] | None) -> dict[str, Contender]:
    """Those whose names have one of these in them; None: all."""
    return {name: one for name, one in CONTENDERS.items() if parts is None or any(part in name for part in parts)}

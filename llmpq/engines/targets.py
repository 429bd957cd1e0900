"""The engines that a plan can be exported to."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from llmpq.engines.device_map import accelerate
from llmpq.engines.export import Export, Job
from llmpq.engines.llama_cpp import llama_cpp
from llmpq.engines.pipelines import sglang, vllm

TARGETS: Mapping[str, tuple[str, Callable[[Job], Export]]] = {  # as --to spells it -> its name, and how
    "vllm": ("vLLM", vllm),
    "sglang": ("SGLang", sglang),
    "llama.cpp": ("llama.cpp", llama_cpp),
    "accelerate": ("accelerate", accelerate),
}

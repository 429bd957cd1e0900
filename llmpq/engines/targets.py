"""The engines that a plan can be exported to."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from llmpq.engines.device_map import for_accelerate
from llmpq.engines.export import Export, Job
from llmpq.engines.llama_cpp import for_llama_cpp
from llmpq.engines.pipelines import for_sglang, for_vllm

TARGETS: Mapping[str, tuple[str, Callable[[Job], Export]]] = {  # as --to spells it -> its name, and how
    "vllm": ("vLLM", for_vllm),
    "sglang": ("SGLang", for_sglang),
    "llama.cpp": ("llama.cpp", for_llama_cpp),
    "accelerate": ("accelerate", for_accelerate),
}

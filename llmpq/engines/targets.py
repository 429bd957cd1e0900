"""The engines that a plan can be exported to. Their modules import torch, so each is imported when it is chosen."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from llmpq.checkpoint.model_files import Model
from llmpq.spec import Plan

if TYPE_CHECKING:
    from llmpq.engines.export import Export


@dataclass(frozen=True)
class Target:
    """An engine's name, and the module and function of this package that make an Export of a Job."""

    name: str
    module: str
    function: str

    def export(self, plan: Plan, model: Model) -> Export:
        """A plan that was made for the model, in the engine's words. Raises UsageError."""
        from llmpq.engines.export import Job

        make: Callable[[Job], Export] = getattr(importlib.import_module(f"llmpq.engines.{self.module}"), self.function)
        return make(Job(plan, model, self.name))


TARGETS: Mapping[str, Target] = {  # as --to spells it
    "vllm": Target("vLLM", "pipelines", "for_vllm"),
    "sglang": Target("SGLang", "pipelines", "for_sglang"),
    "llama.cpp": Target("llama.cpp", "llama_cpp", "for_llama_cpp"),
    "accelerate": Target("accelerate", "device_map", "for_accelerate"),
}

"""transformers' Llama with random bfloat16 weights and a static cache: a line of JSON for each batch, as it is done.

It has the seconds of each round. bench/end_to_end/gpu_decoder.py starts this, and may stop it at any time.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, StaticCache

from bench.end_to_end import gpu_models
from bench.end_to_end.gpu_decoder import prompts, work_of
from bench.end_to_end.transformers import cache_name
from bench.kernels.rivals.command_line import numbers


class Transformers:
    """The model, called as its own `generate` does: decode steps compiled or not, prompts never."""

    def __init__(self, model: str, mode: str, device: torch.device) -> None:
        config = LlamaConfig(**gpu_models.config(model))  # whose attention is torch's, where nothing else is named
        before = torch.get_default_dtype()
        torch.set_default_dtype(torch.bfloat16)
        with device:
            self._model: Any = LlamaForCausalLM(config).eval()
        torch.set_default_dtype(before)
        self._name, self._device, self._work, self._config = model, device, work_of(model), config
        self._step, self._cache = self._model, cache_name(self._model)
        if mode == "compiled":
            self._step = torch.compile(self._model, mode="reduce-overhead", fullgraph=True, dynamic=False)

    def run(self, batch: int, steps: int, cache: StaticCache) -> tuple[float, float]:
        """Seconds of the prompts, and of so many steps after them."""
        ids = torch.tensor(prompts(self._name, batch), device=self._device)
        cache.reset()
        began = time.perf_counter()
        tokens = self._next(self._model, ids, cache, 0)
        first = time.perf_counter()
        for i in range(steps):
            torch.compiler.cudagraph_mark_step_begin()
            tokens = self._next(self._step, tokens, cache, self._work.prompt + i)
        return first - began, time.perf_counter() - first

    def cache(self) -> StaticCache:
        """One for all rounds of a batch: graphs are bound to its memory."""
        return StaticCache(config=self._config, max_cache_len=self._work.length)

    def _next(self, model: Any, ids: torch.Tensor, cache: StaticCache, start: int) -> torch.Tensor:
        """The likeliest tokens [batch, 1] after ids [batch, n], at positions from `start`; the host has seen them."""
        positions = torch.arange(start, start + ids.shape[1], device=self._device)
        found = model(
            ids,
            **{self._cache: cache},
            cache_position=positions,
            position_ids=positions[None],
            use_cache=True,
            logits_to_keep=1,
        )
        tokens: torch.Tensor = found.logits[:, -1].argmax(-1, keepdim=True)
        tokens.tolist()
        return tokens


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", choices=list(gpu_models.CONFIGS), required=True)
    parser.add_argument("--device", choices=["cuda", "cpu"], required=True)
    parser.add_argument("--mode", choices=["eager", "compiled"], required=True)
    parser.add_argument("--batches", type=numbers, required=True)
    parser.add_argument("--rounds", type=int, required=True)
    return parser.parse_args(argv)


@torch.no_grad()
def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse(argv)
    device = torch.device(arguments.device)
    model = Transformers(arguments.model, arguments.mode, device)
    for batch in arguments.batches:
        cache = model.cache()
        model.run(batch, 4, cache)  # compiles what there is to compile
        rounds = [model.run(batch, work_of(arguments.model).output, cache) for _ in range(arguments.rounds)]
        prefills, decodes = zip(*rounds, strict=True)
        print(json.dumps({"batch": batch, "prefills": prefills, "decodes": decodes}), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""transformers' own model with its own cache, in one of torch's floating types."""

from __future__ import annotations

import time
from collections.abc import Sequence
from inspect import signature
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from bench.end_to_end.child import Job


def cache_name(model: torch.nn.Module) -> str:
    """What a model of transformers calls its KV cache, as an argument and in what it returns: `cache` since 5.24."""
    return "cache" if "cache" in signature(model.forward).parameters else "past_key_values"


class Transformers:
    """A Runner."""

    def __init__(self, job: Job) -> None:
        torch.set_num_threads(job.threads)
        dtype = getattr(torch, job.options["dtype"])
        self._model: Any = AutoModelForCausalLM.from_pretrained(job.folder, dtype=dtype).eval()
        self._cache = cache_name(self._model)

    def prepare(self, batch: int, length: int) -> None:
        """There is nothing to do: its cache grows."""

    @torch.inference_mode()
    def generate(self, prompts: Sequence[Sequence[int]], output: int) -> dict[str, Any]:
        start = time.perf_counter()
        found = self._model(torch.tensor(prompts), use_cache=True, logits_to_keep=1)
        tokens = found.logits[:, -1].argmax(-1, keepdim=True)
        first = time.perf_counter()
        for _ in range(output - 1):
            found = self._model(tokens, **{self._cache: found[self._cache]}, use_cache=True, logits_to_keep=1)
            tokens = found.logits[:, -1].argmax(-1, keepdim=True)
        return {"prefill_s": first - start, "decode_s": time.perf_counter() - first}

    @torch.inference_mode()
    def score(self, windows: Sequence[Sequence[int]]) -> list[list[float]]:
        scores = []
        for window in windows:
            token_ids = torch.tensor([window])
            log_probs = self._model(token_ids).logits[0, :-1].double().log_softmax(-1)
            scores.append(log_probs.gather(1, token_ids[0, 1:, None])[:, 0].tolist())
        return scores


def load(job: Job) -> Transformers:
    return Transformers(job)

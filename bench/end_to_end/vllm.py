"""vLLM's build for CPUs. Its cores and the room for its cache are set in the environment, before it starts."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from vllm import LLM, SamplingParams

from bench.end_to_end.child import Job
from bench.end_to_end.first_token import by_first_token

_LENGTH = 1024  # tokens of a sequence at most
_SEQUENCES = 64


class Vllm:
    """A Runner."""

    def __init__(self, job: Job) -> None:
        self._model = LLM(
            job.folder,
            dtype=job.options["dtype"],
            max_model_len=_LENGTH,
            max_num_seqs=_SEQUENCES,
            enable_prefix_caching=False,
            disable_log_stats=True,
        )

    def prepare(self, batch: int, length: int) -> None:
        """There is nothing to do: its cache is of a fixed size."""

    def generate(self, prompts: Sequence[Sequence[int]], output: int) -> dict[str, Any]:
        return by_first_token(self._seconds, prompts, output)

    def _seconds(self, prompts: Any, output: int) -> float:
        sampling = SamplingParams(temperature=0.0, max_tokens=output, ignore_eos=True, detokenize=False)
        inputs = [{"prompt_token_ids": prompt} for prompt in prompts.tolist()]
        start = time.perf_counter()
        self._model.generate(inputs, sampling, use_tqdm=False)
        return time.perf_counter() - start

    def score(self, windows: Sequence[Sequence[int]]) -> list[list[float]]:
        sampling = SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=0, detokenize=False)
        found = self._model.generate([{"prompt_token_ids": list(window)} for window in windows], sampling)
        return [
            [entry[token].logprob for entry, token in zip(output.prompt_logprobs[1:], window[1:])]
            for output, window in zip(found, windows)
        ]


def load(job: Job) -> Vllm:
    return Vllm(job)

"""OpenVINO GenAI on a model that optimum-intel exports with int4 weights. It takes everything else as it finds best."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import openvino
import openvino_genai

from bench.end_to_end.child import Job
from bench.end_to_end.first_token import by_first_token


class OpenVino:
    """A Runner."""

    def __init__(self, folder: Path, threads: int) -> None:
        self._folder, self._properties = folder, {"INFERENCE_NUM_THREADS": threads}
        self._pipeline = openvino_genai.LLMPipeline(str(folder), "CPU", **self._properties)

    def prepare(self, batch: int, length: int) -> None:
        """There is nothing to do: its cache grows."""

    def generate(self, prompts: Sequence[Sequence[int]], output: int) -> dict[str, Any]:
        return by_first_token(self._seconds, prompts, output)

    def _seconds(self, prompts: Any, output: int) -> float:
        """Of continuing int64 [batch, length] by so many tokens."""
        config = openvino_genai.GenerationConfig()
        config.max_new_tokens = config.min_new_tokens = output
        config.ignore_eos, config.do_sample = True, False
        inputs = openvino_genai.TokenizedInputs(openvino.Tensor(prompts), openvino.Tensor(np.ones_like(prompts)))
        start = time.perf_counter()
        found = self._pipeline.generate(inputs, config)
        seconds = time.perf_counter() - start
        if any(len(tokens) != output for tokens in found.tokens):
            raise RuntimeError(f"OpenVINO made {sorted(map(len, found.tokens))} tokens instead of {output}")
        return seconds

    def score(self, windows: Sequence[Sequence[int]]) -> list[list[float]]:
        """By the same network without the pipeline, which gives no logits."""
        network = openvino.Core().compile_model(self._folder / "openvino_model.xml", "CPU", self._properties)
        scores = []
        for window in windows:
            request = network.create_infer_request()
            count = len(window)
            inputs = {
                "input_ids": np.array([window], np.int64),
                "attention_mask": np.ones((1, count), np.int64),
                "position_ids": np.arange(count, dtype=np.int64)[None],
                "beam_idx": np.zeros(1, np.int32),
            }
            logits = request.infer(inputs)["logits"][0, :-1].astype(np.float64)
            logits -= logits.max(-1, keepdims=True)
            log_probs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
            scores.append(log_probs[np.arange(count - 1), window[1:]].tolist())
        return scores


def load(job: Job) -> OpenVino:
    return OpenVino(exported(job), job.threads)


def exported(job: Job) -> Path:
    """Symmetric 4-bit weights in groups, embedding and head in 8 bits, as optimum-intel does by default."""
    path = Path(job.work) / f"openvino-g{job.options['group_size']}"
    if not path.exists():
        partial = path.with_suffix(".partial")
        weights = ["--weight-format", "int4", "--sym", "--group-size", str(job.options["group_size"]), "--ratio", "1.0"]
        command = ["-m", "optimum.commands.optimum_cli", "export", "openvino", "--model", job.folder]
        task = ["--task", "text-generation-with-past"]
        found = subprocess.run(
            [sys.executable, *command, *task, *weights, str(partial)], capture_output=True, text=True, check=False
        )
        if found.returncode:
            lines = found.stderr.strip().splitlines() or ["no message"]
            raise RuntimeError(f"optimum-intel cannot export it: {lines[-1]}")
        partial.rename(path)
    return path

"""llama.cpp through llama-cpp-python's low-level functions: batches of sequences, one token of each at a time."""

from __future__ import annotations

import ctypes
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np

from bench.end_to_end.child import Job

_BATCH = 2048  # tokens that are handed over at once; llama-batched-bench's own
_STEP = 512  # and that are computed together
_PADDED = 256  # what a sequence's room is a multiple of
_TRIAL = 8  # new tokens by which the way to attend is chosen


class LlamaCpp:
    """A Runner. Which of the two ways to attend is faster is tried for each batch."""

    def __init__(self, path: Path, threads: int) -> None:
        llama_cpp.llama_backend_init()
        parameters = llama_cpp.llama_model_default_params()
        parameters.n_gpu_layers = 0
        self._model = llama_cpp.llama_model_load_from_file(str(path).encode(), parameters)
        if not self._model:
            raise RuntimeError(f"llama.cpp cannot load {path.name}")
        self._threads = threads
        self._vocabulary = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self._model))
        self._context: Any = None
        self._batch = llama_cpp.llama_batch_init(_BATCH, 0, 1)

    def prepare(self, batch: int, length: int) -> None:
        prompts = np.random.default_rng(0).integers(100, 4000, (batch, length - _TRIAL)).tolist()
        seconds = {}
        for attention in (llama_cpp.LLAMA_FLASH_ATTN_TYPE_ENABLED, llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED):
            self._open(batch, length, attention)
            self.generate(prompts, 1)
            seconds[attention] = sum(self.generate(prompts, _TRIAL).values())
        self._open(batch, length, min(seconds, key=lambda attention: seconds[attention]))

    def _open(self, sequences: int, length: int, attention: int) -> None:
        """Another context: of so many sequences of so many tokens."""
        if self._context is not None:
            llama_cpp.llama_free(self._context)
        parameters = llama_cpp.llama_context_default_params()
        parameters.n_ctx = sequences * (-(-length // _PADDED) * _PADDED)
        parameters.n_seq_max = sequences
        parameters.n_batch, parameters.n_ubatch = _BATCH, _STEP
        parameters.n_threads = parameters.n_threads_batch = self._threads
        parameters.flash_attn_type = attention
        parameters.no_perf = True
        self._context = llama_cpp.llama_init_from_model(self._model, parameters)
        if not self._context:
            raise RuntimeError(f"llama.cpp has no context for {sequences} sequences of {length} tokens")

    def generate(self, prompts: Sequence[Sequence[int]], output: int) -> dict[str, Any]:
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self._context), True)
        start = time.perf_counter()
        tokens = self._prefill(prompts)
        first = time.perf_counter()
        for position in range(len(prompts[0]), len(prompts[0]) + output - 1):
            rows = [(token, position, sequence, True) for sequence, token in enumerate(tokens)]
            self._decode(rows)
            tokens = [self._likeliest(row) for row in range(len(rows))]
        return {"prefill_s": first - start, "decode_s": time.perf_counter() - first}

    def _prefill(self, prompts: Sequence[Sequence[int]]) -> list[int]:
        """The first new token of each, whole prompts handed over together as far as they fit."""
        rows = [
            (token, position, sequence, position == len(prompt) - 1)
            for sequence, prompt in enumerate(prompts)
            for position, token in enumerate(prompt)
        ]
        tokens = []
        for first in range(0, len(rows), _BATCH):
            part = rows[first : first + _BATCH]
            self._decode(part)
            tokens += [self._likeliest(row) for row, (*_, last) in enumerate(part) if last]
        return tokens

    def _decode(self, rows: Sequence[tuple[int, int, int, bool]]) -> None:
        """Compute tokens at positions of sequences; of those that are marked, the logits."""
        batch = self._batch
        batch.n_tokens = len(rows)
        for i, (token, position, sequence, logits) in enumerate(rows):
            batch.token[i], batch.pos[i] = token, position
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, sequence
            batch.logits[i] = logits
        if status := llama_cpp.llama_decode(self._context, batch):
            raise RuntimeError(f"llama_decode returned {status}")

    def _logits(self, row: int) -> Any:
        """float32 [vocabulary] after a row of the last batch."""
        pointer = llama_cpp.llama_get_logits_ith(self._context, row)
        return np.ctypeslib.as_array(pointer, (self._vocabulary,))

    def _likeliest(self, row: int) -> int:
        return int(self._logits(row).argmax())

    def score(self, windows: Sequence[Sequence[int]]) -> list[list[float]]:
        self._open(1, max(map(len, windows)), llama_cpp.LLAMA_FLASH_ATTN_TYPE_AUTO)
        scores = []
        for window in windows:
            llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self._context), True)
            self._decode([(token, position, 0, True) for position, token in enumerate(window)])
            logits = (self._logits(row).astype(np.float64) for row in range(len(window) - 1))
            scores.append([log_probability(row, target) for row, target in zip(logits, window[1:])])
        return scores


def log_probability(logits: Any, token: int) -> float:
    """Of a token after float64 logits [vocabulary], in nats."""
    return float(logits[token] - logits.max() - np.log(np.exp(logits - logits.max()).sum()))


def load(job: Job) -> LlamaCpp:
    return LlamaCpp(quantized(job), job.threads)


def quantized(job: Job) -> Path:
    """The file as it is, or in another of llama.cpp's types, which it makes itself as it does by default."""
    kind = job.options["kind"]
    if kind is None:
        return Path(job.gguf)
    path = Path(job.work) / f"{kind}.gguf"
    if not path.exists():
        partial = path.with_suffix(".partial")
        parameters = llama_cpp.llama_model_quantize_default_params()
        parameters.nthread, parameters.allow_requantize = job.threads, True
        parameters.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{kind}")
        if llama_cpp.llama_model_quantize(job.gguf.encode(), str(partial).encode(), ctypes.byref(parameters)):
            raise RuntimeError(f"llama_model_quantize cannot make {kind}")
        partial.rename(path)
    return path

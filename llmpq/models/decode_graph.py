"""Decode steps of a stage as graphs: captured once on a GPU, and replayed without Python or launches between kernels.

They are to a GPU what a program (llmpq/kernels/program.py) is to a CPU. Other than a program, a graph is of a fixed
number of rows: there is one for each of some numbers of sequences, and a step takes the next larger one, filled up with
absent sequences.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, TypeVar

import torch
from torch.nn.functional import pad

from llmpq.kernels import DeviceSequences, Sequences
from llmpq.models.step import Step

T = TypeVar("T")

Capture = Callable[[Callable[[], object]], Callable[[], object]]  # of work; returns what does it again


def graph_sizes(most: int) -> tuple[int, ...]:
    """For how many sequences there are graphs, rising: 1, 2, 4, 8, each multiple of 8 and, last, the largest step.

    Tensor cores multiply rows in eights, so sizes between would save no time in products, and a step of more than 8
    sequences computes at most 7 rows that nobody needs. Below 8 it is the other operations that take less time.
    """
    return (*(size for size in (1, 2, 4, *range(8, most, 8)) if size < most), most)


class CudaCapture:
    """A Capture of work on a CUDA device, into graphs that share one pool of memory, since only one runs at a time."""

    def __init__(self, device: torch.device) -> None:
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream(device)

    def __call__(self, work: Callable[[], object]) -> Callable[[], object]:
        """The replay, on the stream that is current then. The work is done twice before, once as a replay."""
        self._stream.wait_stream(torch.cuda.current_stream(self._stream.device))
        with torch.cuda.stream(self._stream):
            work()  # what is compiled, loaded or allocated at the first call must not be while it is captured
        graph = torch.cuda.CUDAGraph()
        # Other threads of a worker may call CUDA meanwhile: those of NCCL look for the end of transfers. What torch
        # keeps for the graphs of a process, such as seeds, must not be tensors that only inference may change.
        captured = torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local")
        try:
            with torch.inference_mode(False), captured, torch.inference_mode():
                work()
        except RuntimeError as error:  # to end a capture fails if it has failed; why that was is for users to read
            raise error from error.__context__
        graph.replay()  # brings it to the device, and shows now if it does not run
        return graph.replay


class DecodeGraph(Generic[T]):
    """What `compute(tokens, sequences)` returns for one new token each of up to `size` sequences.

    At capture `compute` gets tensors on the device that each replay fills before. What it returns must be in the same
    memory each time, and `replay` returns it as it is, with rows of absent sequences behind the others. Tokens are
    given if the stage embeds them, else `compute` has to look for hidden states where the caller puts them.
    """

    def __init__(
        self,
        size: int,
        compute: Callable[[torch.Tensor, Sequences], T],
        device: torch.device,
        capture: Capture,
        *,
        embeds: bool,
        columns: int = 0,
    ) -> None:
        """`columns`: blocks of the longest sequence that tables name; 0: sequences have those of their slots."""
        self.size = size
        self._embeds = embeds
        self._tokens = torch.zeros(size, dtype=torch.int64, device=device)
        self._sequences = DeviceSequences.absent(size, device, columns)
        ones = torch.ones(size, dtype=torch.int32, device="cpu")
        any_of_them = Sequences(torch.zeros_like(ones), ones, ones).placed(self._sequences)

        def work() -> None:
            self._result = compute(self._tokens, any_of_them)

        self._replay = capture(work)

    def replay(self, step: Step, tokens: torch.Tensor | None = None) -> T:
        """The result for a step of at most `size` sequences, one token each; on a GPU without waiting for it.

        `tokens`, on the device, are taken in place of the step's; absent sequences then have those of a replay before.
        """
        if self._embeds and tokens is not None:
            self._tokens[: len(tokens)].copy_(tokens)
        elif self._embeds:
            tokens = pad(step.tokens, (0, self.size - step.num_tokens))
            # Page-locked memory is not given out again before what was copied from it has arrived.
            self._tokens.copy_(tokens.pin_memory() if self._tokens.is_cuda else tokens, non_blocking=True)
        self._sequences.copy_(step.sequences)
        self._replay()
        return self._result

"""How long operations take on a device: between marks in a call, in a recorded program, or in replays of a graph."""

from __future__ import annotations

import time
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch

from llmpq import kernels
from llmpq.kernels import Program
from llmpq.models.decode_graph import Capture, DecodeGraph, graph_sizes
from llmpq.models.step import Step
from llmpq.runtime.emulation import SlowdownEmulator


class Clock:
    """Marks points in time; on a GPU in its stream, so that nothing waits for them.

    With `slowness`, a device's emulated one, calls take as long as it says, and their seconds are stretched as evenly.
    """

    def __init__(self, device: torch.device, slowness: SlowdownEmulator | None = None) -> None:
        self._device = device
        self._slowness = slowness
        self._marks: list[Any] | None = None  # None: nobody wants to know

    def mark(self) -> None:
        if self._marks is None:
            return
        if self._device.type == "cpu":
            self._marks.append(time.perf_counter())
        else:
            # In a graph, an event that others than the graph look at is recorded by each replay.
            external = torch.cuda.is_current_stream_capturing()
            self._marks.append(torch.cuda.Event(enable_timing=True, external=external))
            self._marks[-1].record()

    def _marked(self, marks: list[Any], call: Callable[[], object], *, ends_alone: bool = False) -> None:
        """Call with marks at start and end, and, unless only these are wanted, those that the call makes."""
        marks.clear()
        self._marks = marks
        self.mark()
        if ends_alone:
            self._marks = None
        call()
        self._marks = marks
        self.mark()
        self._marks = None

    def _seconds(self, call: Callable[[], object], marks: list[Any]) -> list[float]:
        """Between the marks that a call makes."""
        if self._slowness is not None:
            self._slowness.begin()
        call()
        stretch = 1.0 if self._slowness is None else self._slowness.hold()
        if self._device.type == "cpu":
            return [stretch * (after - before) for before, after in pairwise(marks)]
        torch.cuda.synchronize(self._device)
        return [stretch * before.elapsed_time(after) / 1e3 for before, after in pairwise(marks)]

    def timed(self, call: Callable[[], object]) -> list[float]:
        """Seconds from the start of the call to its first mark, between marks, and from the last to its end."""
        marks: list[Any] = []
        return self._seconds(lambda: self._marked(marks, call), marks)

    def captured(
        self, work: Callable[[torch.Tensor, kernels.Sequences], object], size: int, capture: Capture, ends_alone: bool
    ) -> Callable[[Step], list[float]]:
        """`timed` for work on decode steps of up to `size` sequences, which is captured with its marks now."""
        marks: list[Any] = []

        def marked(tokens: torch.Tensor, sequences: kernels.Sequences) -> None:
            self._marked(marks, lambda: work(tokens, sequences), ends_alone=ends_alone)

        graph = DecodeGraph(size, marked, self._device, capture, embeds=True)
        return lambda step: self._seconds(lambda: graph.replay(step), marks)

    def timed_program(self, program: Program, step: Step) -> list[float]:
        """Seconds of each operation of a program."""
        seconds = torch.zeros(len(program.names), dtype=torch.float64)
        if self._slowness is not None:
            self._slowness.begin()
        program.run(step.num_tokens, tokens=step.tokens, sequences=step.sequences, seconds=seconds)
        stretch = 1.0 if self._slowness is None else self._slowness.hold()
        return [stretch * each for each in seconds.tolist()]


Compute = Callable[[torch.Tensor, kernels.Sequences, int], object]  # of tokens, with the i-th copy of a weight


class GraphTimer:
    """Seconds of decode steps in graphs, each of which computes with all of `copies`, one after the other.

    `compute` makes the same marks for each copy. As marks in a graph take time as well, all is timed without them, too.
    """

    def __init__(self, compute: Compute, copies: int, most: int, clock: Clock, capture: Capture) -> None:
        """For steps of up to `most` sequences."""
        self._compute, self._copies, self._clock, self._capture = compute, copies, clock, capture
        self._sizes = graph_sizes(most)
        self._graphs: dict[int, tuple[Callable[[Step], list[float]], Callable[[Step], list[float]]]] = {}

    def __call__(self, step: Step) -> list[float]:
        """Between the marks of one copy, its start and its end: the mean of all copies."""
        size = next(size for size in self._sizes if size >= step.num_sequences)
        if size not in self._graphs:
            parts, whole = (self._clock.captured(self._work, size, self._capture, alone) for alone in (False, True))
            self._graphs[size] = parts, whole
        parts, whole = self._graphs[size]
        times = parts(step)
        spans = len(times) // self._copies
        share = sum(whole(step)) / sum(times) / self._copies
        return [share * sum(times[i::spans]) for i in range(spans)]

    def _work(self, tokens: torch.Tensor, sequences: kernels.Sequences) -> None:
        for i in range(self._copies):
            if i:
                self._clock.mark()
            self._compute(tokens, sequences, i)

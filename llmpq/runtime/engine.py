"""Engine: a plan's stages as running workers, to generate and to score with.

By itself it starts them all, on this host. Under torchrun every rank starts the worker of its own stage, so that it has
its device's environment and nothing else in its memory; the stages meet through torchrun's store (see Rank).
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt

from llmpq.checkpoint.model_files import Checkpoint
from llmpq.host_limits import usable_cores
from llmpq.progress import Notify, counted, silent
from llmpq.runtime.launch import Program, WorkerGroup, device_environment, host_threads
from llmpq.runtime.peers import loopback
from llmpq.runtime.request import Generated, Request, RunResult, Scores, check_prompts, make_requests
from llmpq.runtime.sampling import SamplingParams
from llmpq.runtime.torchrun import GRACE_S, Rank
from llmpq.spec import LlmpqError, ModelSpec, Plan, Prediction, Profile, Span, UsageError, WorkerLostError
from llmpq.temporary import working_folder, writing_there

_IFNAME = "GLOO_SOCKET_IFNAME"

__all__ = ["Engine", "Generated", "Request", "RunResult", "SamplingParams", "Scores"]


class Engine:
    """Loads a plan's stages and keeps them until `close`. A context manager.

    `backend` is that of the kernels, None for the best of each device. `eager` stages compute operation by operation,
    where others run a recorded step. With `waits`, stages load and compute nothing:
    each step takes the seconds of its operations in the table of the stage's device, and all tokens are 0. `logits`
    are kept in a file while a sequence is scored, for the method of this name.

    With `rank`, under torchrun, this process has the rank's stage only. Every rank of the plan makes an Engine; the
    first calls `generate` and `score`, the others `serve`.

    Raises UsageError, DeviceMemoryError or WorkerLostError; after one of them, or an interrupt, no worker is left.
    """

    def __init__(
        self,
        plan: Plan,
        checkpoint: Checkpoint,
        spec: ModelSpec,
        *,
        backend: str | None = None,
        eager: bool = False,
        waits: Profile | None = None,
        logits: bool = False,
        rank: Rank | None = None,
        notify: Notify = silent,
    ) -> None:
        plan.check_model(spec)
        for link in plan.cluster.links:
            ends = [plan.cluster.device(name).host for name in (link.source, link.target)]
            if link.emulated and ends[0] != ends[1]:
                raise UsageError(
                    f"the link from {link.source} to {link.target} is emulated, but they are on two hosts, {ends[0]} "
                    f"and {ends[1]}, whose clocks differ; leave out its `emulated`"
                )
        devices = [plan.cluster.device(stage.device) for stage in plan.stages]
        here = range(len(devices)) if rank is None else range(rank.rank, rank.rank + 1)
        if here.stop > len(devices):
            raise UsageError(f"rank {here.start} has no stage; the plan has {len(devices)}")
        elsewhere = [device.name for device in devices if device.host != devices[0].host]
        if rank is None and elsewhere:
            raise UsageError(f"device {elsewhere[0]} is on another host; start llmpq with torchrun on every host")
        self.plan = plan
        self._others_serve = rank is not None and rank.first and len(devices) > 1
        self._spec = spec
        self._longest = min(plan.max_length, spec.max_positions)
        self._folder = working_folder()
        folder = self._folder.path
        self._logits = folder / "logits" if logits else None
        job = {
            "plan": plan.to_dict(),
            "spec": spec.to_dict(),
            "checkpoint": {"name": checkpoint.name, "path": str(checkpoint.path), "format": checkpoint.format},
            "backend": backend,
            "eager": eager,
            "waits": None if waits is None else waits.to_dict(),
            "logits": self._logits and str(self._logits),
            "store": f"file:{folder / 'store'}" if rank is None else rank.new_pipeline(len(devices)),
        }
        path = folder / "job.json"
        with writing_there():
            path.write_text(json.dumps(job), encoding="utf-8")
        # Otherwise gloo looks for a network interface by this host's name, which may have none.
        interface = loopback() if rank is None or rank.one_host else rank.interface()
        local = {} if interface is None or (rank is not None and _IFNAME in os.environ) else {_IFNAME: interface}
        of_host = "" if rank is None or rank.one_host else f" of {rank.here}"
        programs = [
            Program(
                f"stage {i} on {devices[i].name}{of_host}",
                "llmpq.runtime.worker",
                ("--job", str(path), "--rank", str(i)),
                device_environment(devices[i], host_threads(devices[i], devices, usable_cores())) | local,
            )
            for i in here
        ]
        self._rank = rank
        if rank is None:
            self._group = WorkerGroup(programs)
        else:
            self._group = WorkerGroup(programs, rank.rank, others=rank.peers, grace_s=GRACE_S, on_loss=rank.tell)
        with self._closing_on_error():
            self._group.await_start(counted(notify, "starting the stages", len(programs)))
            loaded = counted(notify, "loading the stages", len(programs))
            for _ in self._group.collect("ready"):
                loaded()

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: SamplingParams | Sequence[SamplingParams],
        on_progress: Callable[[int], None] = lambda generated: None,
        on_end: Callable[[int, Generated], None] = lambda request, generated: None,
        on_tokens: Callable[[int, int], None] | None = None,
    ) -> RunResult:
        """Continue token ids, with one SamplingParams for all prompts (see each_sampling) or one for each.

        More prompts than the plan has slots run in waves, one after the other. A sequence ends at an end-of-sequence
        token, which it includes, at its `max_tokens`, or when its slot is full. `on_progress` is called with the number
        of tokens generated so far, `on_end` with each prompt (its number from 0) and its continuation as soon as that
        has ended, `on_tokens` with a prompt's number and its next token, the one that ends it included, as it comes.
        """
        self._check(prompts)
        requests = [request.to_dict() for request in make_requests(prompts, sampling)]
        ended: dict[int, Generated] = {}

        def on_event(event: dict[str, Any]) -> None:
            if event["event"] == "ended":
                request = event["request"]
                ended[request] = Generated.from_dict(event["generated"])
                on_end(request, ended[request])
            elif event["event"] == "tokens" and on_tokens is not None:
                for request, token in zip(event["requests"], event["tokens"], strict=True):
                    on_tokens(request, token)
            else:
                on_progress(event["generated"])

        measured, spans = self._run("generate", on_event, requests=requests, stream=on_tokens is not None)
        first_s = spans[0].start_s if spans else 0.0
        return RunResult(
            tuple(ended[request] for request in range(len(prompts))),
            Prediction.from_dict(measured),
            tuple(replace(s, start_s=s.start_s - first_s, end_s=s.end_s - first_s) for s in spans),
        )

    def _check(self, prompts: Sequence[Sequence[int]], output_len: int = 1) -> None:
        """Raise UsageError for a prompt that the plan has no room for."""
        longest = self.plan.longest_prompt(self._spec)
        check_prompts(prompts, self._spec.vocab_size, self._longest, "the plan's slots", output_len, longest)

    def stop(self) -> None:
        """To be called by what `generate` calls: each prompt that is being continued ends with its next token."""
        self._group.workers[0].send("stop")

    def score(self, sequences: Sequence[Sequence[int]]) -> list[Scores]:
        """For each sequence, the log-probabilities of its tokens but the first, and the likeliest in their places."""
        self._check(sequences, output_len=0)
        scores, _ = self._run("score", lambda _: None, sequences=[list(sequence) for sequence in sequences])
        return [Scores(*score) for score in scores]

    def logits(self, sequence: Sequence[int]) -> npt.NDArray[np.float32]:
        """float32 [t - 1, vocab_size], read-only: the logits after each of a sequence's t >= 2 tokens but the last.

        As long as they are in use, they take their room on the disk. Raises ValueError unless the engine was made with
        `logits`, and under torchrun, where the last stage may be on another host.
        """
        if self._logits is None or self._rank is not None:
            raise ValueError("this engine keeps no logits; make it with logits=True, and not under torchrun")
        self._logits.unlink(missing_ok=True)
        self.score([sequence])
        try:
            return np.memmap(self._logits, np.float32, "r", shape=(len(sequence) - 1, self._spec.vocab_size))
        finally:
            self._logits.unlink()

    def serve(self) -> None:
        """On a rank of torchrun but the first: run its stage until the first rank closes its engine."""
        if self._rank is not None:
            self._rank.let_go()
        with self._closing_on_error():
            for _ in self._group.collect("closed"):
                pass

    def _run(self, command: str, on_event: Callable[[dict[str, Any]], None], **fields: Any) -> tuple[Any, list[Span]]:
        """Have the pipeline carry out a command: its value, and the spans of the stages here in order.

        `on_event` is called with what the first stage tells meanwhile.
        """
        if self._group.closed:
            raise WorkerLostError("the workers of this engine have been ended; make a new one")
        value = None
        spans: list[Span] = []
        waiting = set(self._group.workers)
        with self._closing_on_error():
            self._group.workers[0].send(command, **fields)
            while waiting:
                worker, event = self._group.receive()
                if event["event"] == "result":
                    waiting.remove(worker)
                    spans += map(Span.from_dict, event["spans"])
                    if worker.rank == 0:
                        value = event["value"]
                else:
                    on_event(event)
        return value, sorted(spans, key=lambda span: span.start_s)

    @contextmanager
    def _closing_on_error(self) -> Iterator[None]:
        """End the workers after an error or an interrupt: they may be in the middle of a command."""
        try:
            yield
        except BaseException:
            self._end()
            raise

    @property
    def pids(self) -> list[int]:
        """Process ids of the workers, in the order of their stages."""
        return [worker.process.pid for worker in self._group.workers]

    @property
    def closed(self) -> bool:
        """Whether the workers have been ended: by `close`, an error or an interrupt."""
        return self._group.closed

    def close(self) -> None:
        """End the workers, and what other ranks serve."""
        if self._rank is not None:
            self._rank.let_go()
        if self._others_serve and not self._group.closed:
            self._group.workers[0].send("close")
            with suppress(LlmpqError):
                for _ in self._group.collect("closed"):
                    pass
        self._end()

    def _end(self) -> None:
        self._group.close()
        self._folder.close()

    def __enter__(self) -> Engine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        else:
            self._end()

"""Engine: a plan's stages as running workers, to generate and to score with.

By itself it starts them all, on this host. Under torchrun every rank starts the worker of its own stage, so that it has
its device's environment and nothing else in its memory; the stages meet through torchrun's store (see Rank).
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from itertools import count
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt

from llmpq.checkpoint.model_files import Checkpoint
from llmpq.host_limits import usable_cores
from llmpq.progress import Notify, counted, silent
from llmpq.runtime.exchange import Exchange
from llmpq.runtime.launch import Program, WorkerGroup, device_environment, host_threads
from llmpq.runtime.peers import loopback
from llmpq.runtime.request import Generated, Request, RunResult, Scores, check_prompts, make_requests
from llmpq.runtime.sampling import SamplingParams
from llmpq.runtime.session import Handle, Session
from llmpq.runtime.torchrun import GRACE_S, Rank
from llmpq.spec import LlmpqError, ModelSpec, Plan, Prediction, Profile, Span, UsageError, WorkerLostError
from llmpq.temporary import working_folder, writing_there

_IFNAME = "GLOO_SOCKET_IFNAME"

__all__ = ["Engine", "Generated", "Handle", "Request", "RunResult", "SamplingParams", "Scores", "Session"]


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
        self._exchange: Exchange | None = None  # what the workers are at
        self._numbers = count()  # of requests
        self._lock = threading.RLock()
        self._others_serve = rank is not None and rank.first and len(devices) > 1
        self._spec = spec
        self._longest = min(plan.max_length, spec.max_positions)
        self._folder = working_folder()
        folder = self._folder.path
        self._simulated = waits is not None
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
        vocabulary: Sequence[bytes] | None = None,
    ) -> RunResult:
        """Continue token ids, with one SamplingParams for all prompts (see each_sampling) or one for each.

        If there are more prompts than the plan has slots, some wait until others end. A sequence ends at an
        end-of-sequence token, which it includes, at its `max_tokens`, or when its slot is full. `on_progress` is called
        with the number of tokens generated so far, `on_end` with each prompt (its number from 0) and its continuation
        as soon as that has ended, `on_tokens` with a prompt's number and its next token, the one that ends it included,
        as it comes. `vocabulary`: see Session.submit_all.
        """
        session = self._new_session(on_progress)
        with self._claimed_by(session):
            requests = make_requests(prompts, sampling)
            session.batch = handles = session.submit_all(requests, on_tokens, on_end, vocabulary)
            session.close()
            measured, spans = self._listen(session)
        first_s = spans[0].start_s if spans else 0.0
        return RunResult(
            tuple(handle.result() for handle in handles),
            Prediction.from_dict(measured),
            tuple(replace(s, start_s=s.start_s - first_s, end_s=s.end_s - first_s) for s in spans),
            tuple(handle.times for handle in handles if handle.times is not None),
        )

    @contextmanager
    def session(self, on_progress: Callable[[int], None] = lambda generated: None) -> Iterator[Session]:
        """Requests are handed in while others run, from any thread: `session.submit`. A thread of its own listens.

        On that thread, `on_progress` is called now and then with the number of tokens generated so far.

        At the end of the block, what was handed in is brought to an end; after an error in it, all is cancelled. Raises
        what ended the session, if an error did; no worker is left then, nor after an interrupt. Raises ValueError while
        the engine is in use.
        """
        session = self._new_session(on_progress)

        def listen() -> None:
            with suppress(BaseException):  # it is kept as the session's `failure`, which is raised below
                self._listen(session)

        with self._claimed_by(session):
            thread = threading.Thread(target=listen, name="session", daemon=True)
            thread.start()
            try:
                yield session
            except BaseException:
                session.cancel()
                raise
            finally:
                session.close()
                with self._closing_on_error():
                    thread.join()
            if session.failure is not None:
                raise session.failure

    def _new_session(self, on_progress: Callable[[int], None] = lambda generated: None) -> Session:
        return Session(self._group, self._numbers, self._check, on_progress)

    @contextmanager
    def _claimed_by(self, exchange: Exchange) -> Iterator[None]:
        """The workers have one exchange at a time."""
        with self._lock:
            if self._group.closed:
                raise WorkerLostError("the workers of this engine have been ended; make a new one")
            if self._exchange is not None:
                raise ValueError("this engine is in use; hand requests to its session, or wait until it is done")
            self._exchange = exchange
        try:
            yield
        finally:
            self._exchange = None

    def _listen(self, exchange: Exchange) -> tuple[Any, list[Span]]:
        with self._closing_on_error():
            return exchange.listen()

    def _check(self, requests: Sequence[Request]) -> None:
        """Raise UsageError for prompts that the plan has no room for, or tokens that the model has not.

        Raises ValueError for what is not done here.
        """
        prompts = [request.prompt for request in requests]
        check_prompts(prompts, self._spec.vocab_size, self._longest, "the plan's slots")
        for params in (request.sampling for request in requests):
            params.check_tokens(self._spec.vocab_size, self._spec.eos_token_ids)
            if params.stop or params.bad_words or params.num_choices > 1:
                raise ValueError("stop, bad_words, n and best_of are for Completions, which has a tokenizer")
            if self._simulated and params.asks_log_probs:
                raise ValueError("a simulated run has no log-probabilities")

    def stop(self, prompt: int | None = None) -> None:
        """Cancel a prompt that `generate` continues, by its number, or all that are being continued; see Handle.

        From any thread, or by what `generate` calls. Raises IndexError if it continues no prompt of this number.
        """
        session = self._exchange
        if isinstance(session, Session):
            session.cancel(None if prompt is None else [session.batch[prompt]])

    def score(self, sequences: Sequence[Sequence[int]]) -> list[Scores]:
        """For each sequence, the log-probabilities of its tokens but the first, and the likeliest in their places.

        Raises UsageError for a sequence that there is no room for, ValueError while the engine is in use.
        """
        longest = self.plan.longest_query(self._spec)  # each is computed in one step
        check_prompts(sequences, self._spec.vocab_size, self._longest, "the plan's slots", 0, longest)
        exchange = Exchange(self._group)
        exchange.say("score", sequences=[list(sequence) for sequence in sequences])
        with self._claimed_by(exchange):
            found, _ = self._listen(exchange)
        return [Scores(*score) for score in found]

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
        if self._others_serve and not self._group.closed and self._exchange is None:
            self._group.workers[0].send("close")
            with suppress(LlmpqError):
                for _ in self._group.collect("closed"):
                    pass
        self._end()

    def _end(self) -> None:
        """From any thread; whoever listens to the workers has to stop before they are gone."""
        exchange = self._exchange
        if exchange is not None:
            exchange.abort(WorkerLostError("the engine was closed before it was done"))
        with self._lock:
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

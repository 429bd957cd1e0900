"""Engine: a plan's stages as running workers, to generate and to score with.

By itself it starts them all, on this host. Under torchrun every rank starts the worker of its own stage, so that it has
its device's environment and nothing else in its memory; the stages meet through torchrun's store (see Rank).
"""

from __future__ import annotations

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
from llmpq.progress import Notify, silent
from llmpq.runtime.device_watch import OnReturn
from llmpq.runtime.exchange import Exchange
from llmpq.runtime.handle import Handle
from llmpq.runtime.pipeline import Options, Served, start
from llmpq.runtime.recovery import OnLoss, Recovery
from llmpq.runtime.request import (
    Ends,
    Generated,
    Request,
    RunResult,
    Scores,
    check_prompts,
    make_requests,
)
from llmpq.runtime.sampling import SamplingParams
from llmpq.runtime.session import Session
from llmpq.runtime.torchrun import Rank
from llmpq.runtime.worker_group import WorkerGroup
from llmpq.spec import (
    DeviceLoss,
    DeviceMemoryError,
    DeviceReturn,
    LlmpqError,
    ModelSpec,
    Plan,
    Prediction,
    Profile,
    Span,
    WorkerLostError,
)
from llmpq.temporary import working_folder

__all__ = ["Engine", "Generated", "Handle", "Request", "RunResult", "SamplingParams", "Scores", "Session"]


class Engine:
    """Loads a plan's stages and keeps them until `close`. A context manager.

    `backend` is that of the kernels, None for the best of each device. `eager` stages compute operation by operation,
    where others run a recorded step. With `waits`, stages load and compute nothing:
    each step takes the seconds of its operations in the table of the stage's device, and all tokens are 0. `logits`
    are kept in a file while a sequence is scored, for the method of this name.

    With `on_loss`, requests go on when a device is lost: on the plan that it makes for what is left, on which they are
    computed again from prompt and tokens so far. Scoring does not. With `on_return` as well, the device is tried again
    later, and requests move to the plan that it makes, if that is better. `on_plan` is told of every other plan before
    it is loaded, on the thread that listens.

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
        on_loss: OnLoss | None = None,
        on_return: OnReturn | None = None,
        on_plan: Callable[[Plan], None] = lambda plan: None,
        notify: Notify = silent,
    ) -> None:
        self._exchange: Exchange | None = None  # what the workers are at
        self._numbers = count()  # of requests
        self._lock = threading.RLock()
        self._simulated, self._rank = waits is not None, rank
        self._folder = working_folder()
        self._logits = self._folder.path / "logits" if logits else None
        if on_loss is not None and rank is not None:
            raise ValueError("on_loss is for an engine that starts all stages itself")
        options = Options(backend, eager, waits, self._logits, rank)
        self._recovery = Recovery(on_loss, options, on_return, on_plan)
        self._served = Served(plan, checkpoint, spec)
        try:
            self._group = self._start(options, notify)
        except BaseException:
            self._recovery.close()
            self._folder.close()
            raise
        self._others_serve = rank is not None and rank.first and len(plan.stages) > 1

    def _start(self, options: Options, notify: Notify) -> WorkerGroup:
        try:
            group, _ = start(self._served, options, self._folder.path, notify)
        except (DeviceMemoryError, WorkerLostError) as error:
            self._served, group = self._recovery.replacement(self._served, error, (), self._folder.path)
        group.outlives_losses = not self._recovery.is_off
        return group

    @property
    def plan(self) -> Plan:
        """What runs now."""
        return self._served.plan

    @property
    def losses(self) -> tuple[DeviceLoss, ...]:
        """The devices that were lost so far, without ending what ran."""
        return tuple(self._recovery.losses)

    @property
    def returns(self) -> tuple[DeviceReturn, ...]:
        """The times that lost devices were taken back."""
        return tuple(self._recovery.returns)

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
        return Session(
            self._group,
            self._numbers,
            self._check,
            on_progress,
            None if self._recovery.is_off else self._replace,
            lambda request: Ends(request, self._served.plan.max_length, self._served.spec.eos_token_ids),
            lambda: self._recovery.offered,
        )

    def _replace(self, error: LlmpqError | None, in_flight: Sequence[Handle]) -> WorkerGroup:
        """Other workers, after a loss, or for a device that is back."""
        served, group = self._recovery.replacement(self._served, error, in_flight, self._folder.path, self._group)
        with self._lock:
            self._served, self._group = served, group
        return group

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
        check_prompts(prompts, self._served.spec.vocab_size, self._served.longest, "the plan's slots")
        for params in (request.sampling for request in requests):
            params.check_tokens(self._served.spec.vocab_size, self._served.spec.eos_token_ids)
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
        longest = self.plan.longest_query(self._served.spec)  # each is computed in one step
        check_prompts(sequences, self._served.spec.vocab_size, self._served.longest, "the plan's slots", 0, longest)
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
            return np.memmap(self._logits, np.float32, "r", shape=(len(sequence) - 1, self._served.spec.vocab_size))
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
        self._recovery.close()
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

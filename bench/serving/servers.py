"""The servers that are compared, each a process that listens on a port of its own."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

from bench import process_tree
from bench.end_to_end.child import Job
from bench.end_to_end.ours import plan_for
from bench.machine import ROOT
from bench.serving.client import Fields, is_ready
from bench.serving.load import OUTPUT_TOKENS, PROMPT_TOKENS
from llmpq.checkpoint.model_files import open_model
from llmpq.spec import Plan

SLOTS = 16  # sequences at once
LENGTH = -(-(PROMPT_TOKENS[1] + OUTPUT_TOKENS[1] + 32) // 256) * 256  # tokens of one: a text may have a few more again
PREFILL_SEQUENCES = 2  # prompts in a step of their own
CHUNK_TOKENS = 64  # of prompts beside those who decode: the least of the sizes that the simulator finds best
_LOAD_S = 600.0
_EXIT_S = 15.0

Weights = Literal["int4", "stored"]


class MissingError(RuntimeError):
    """A server cannot take part; the message says why in one line."""


@dataclass(frozen=True)
class Place:
    """Where servers find what they serve. `binary` is llama-server, if there is one."""

    job: Job
    work: Path  # for plans
    binary: str | None = None


@dataclass(frozen=True)
class Contender:
    """How a server is started, what it is asked beside prompt and length, and where it says that it is ready."""

    weights: Weights
    command: Callable[[Place, Weights, int], Sequence[str]]  # at this port
    fields: Fields
    ready: str = "/health"
    environments: Sequence[Mapping[str, str]] = ({},)  # variables to choose from: whichever makes it faster


class Served:
    """A server that has loaded, stopped but in `awake`. A context manager, which ends it. Raises MissingError."""

    def __init__(self, contender: Contender, place: Place, environment: Mapping[str, str]) -> None:
        self.environment = environment
        self.port = _free_port()
        self.fields = contender.fields
        command = contender.command(place, contender.weights, self.port)
        path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
        threads = {"OMP_NUM_THREADS": str(place.job.threads), "PYTHONPATH": path}
        self._log = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115 `close` closes it
        try:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=self._log,
                stderr=subprocess.STDOUT,
                cwd=place.work,
                start_new_session=True,
                env=os.environ | threads | dict(environment),
            )
        except OSError as error:
            self._log.close()
            raise MissingError(f"{command[0]}: {error.strerror}") from None
        try:
            self._await(contender.ready)
        except BaseException:
            self.close()
            raise
        process_tree.stop(self._process.pid)

    def awake(self) -> AbstractContextManager[None]:
        return process_tree.awake(self._process.pid)

    def _await(self, ready: str) -> None:
        deadline = time.monotonic() + _LOAD_S
        while not is_ready(self.port, ready):
            if self._process.poll() is not None:
                self._log.seek(0)
                lines = self._log.read().strip().splitlines() or ["no message"]
                raise MissingError(f"ended with {self._process.returncode}: {lines[-1][:200]}")
            if time.monotonic() > deadline:
                raise MissingError(f"was not ready after {_LOAD_S:.0f} s")
            time.sleep(0.1)

    def close(self) -> None:
        """End it as a user would; what does not end is killed."""
        process_tree.go_on(self._process.pid)
        self._process.terminate()
        try:
            self._process.wait(_EXIT_S)
        except subprocess.TimeoutExpired:
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
        self._log.close()

    def __enter__(self) -> Served:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def plan_of(job: Job, weights: Weights) -> Plan:
    """One stage with all the threads, its weights as in bench.end_to_end."""
    bits = 4 if weights == "int4" else None
    of_weights = replace(job, options={"bits": bits, "activations": "a8"})
    plan = plan_for(open_model(job.model).spec, of_weights, SLOTS, LENGTH)
    return replace(plan, prefill_microbatch=PREFILL_SEQUENCES, chunk_tokens=CHUNK_TOKENS)


def _ours(place: Place, weights: Weights, port: int) -> list[str]:
    path = place.work / f"serving-{weights}.json"
    plan_of(place.job, weights).save(path)
    options = {"model": place.job.model, "plan": str(path), "port": str(port)}
    return [sys.executable, "-m", "llmpq", "serve", *_arguments(options)]


def _llama_server(place: Place, weights: Weights, port: int) -> list[str]:
    if place.binary is None:
        raise MissingError("it is named by --llama-server")
    threads = str(place.job.threads)
    options = {
        "model": _gguf(place.job, weights),
        "port": str(port),
        "threads": threads,
        "threads-batch": threads,
        "threads-http": str(2 * SLOTS),  # or those who wait for a slot are not even read
        "parallel": str(SLOTS),
        "ctx-size": str(SLOTS * LENGTH),
        "gpu-layers": "0",
        "cache-ram": "0",  # no two prompts begin alike: what it would keep is of no use
    }
    return [place.binary, *_arguments(options), "--cont-batching"]


def _llama_cpp_python(place: Place, weights: Weights, port: int) -> list[str]:
    if find_spec("llama_cpp") is None or find_spec("sse_starlette") is None:
        raise MissingError("pip install '.[rivals]'")
    threads = str(place.job.threads)
    options = {
        "model": _gguf(place.job, weights),
        "port": str(port),
        "n_threads": threads,
        "n_threads_batch": threads,
        "n_ctx": str(LENGTH),
        "n_gpu_layers": "0",
        "interrupt_requests": "False",  # or each request cuts off the one before
    }
    return [sys.executable, "-m", "llama_cpp.server", *_arguments(options)]


def _arguments(options: Mapping[str, str]) -> Iterator[str]:
    for name, value in options.items():
        yield from (f"--{name}", value)


def _gguf(job: Job, weights: Weights) -> str:
    """The file as it is, or what llama.cpp makes of it."""
    if weights == "stored":
        return job.gguf
    path = Path(job.work) / "Q4_0.gguf"
    if not path.exists():
        try:
            from bench.end_to_end.llama_cpp import quantized
        except ImportError:
            raise MissingError(f"there is no {path}, and no llama-cpp-python to make it") from None
        return str(quantized(replace(job, options={"kind": "Q4_0"})))
    return str(path)


def version_of(binary: str | None) -> dict[str, str]:
    """What a llama-server calls itself."""
    if binary is None:
        return {}
    said = subprocess.run([binary, "--version"], capture_output=True, text=True, check=False)
    found = re.search("version: (.*)", said.stdout + said.stderr)
    return {"llama-server": found[1] if found else "unknown"}


def _free_port() -> int:
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        return int(bound.getsockname()[1])


def _counted(output_len: int) -> dict[str, Any]:
    return {"ignore_eos": True, "stream_options": {"include_usage": True}}


def _uncounted(output_len: int) -> dict[str, Any]:
    return {"min_tokens": output_len}  # its way to go on past ends of text


# Threads of llama.cpp spin while they wait for each other, in which others on their cores are in their way.
_WAITS: Sequence[Mapping[str, str]] = ({}, {"OMP_WAIT_POLICY": "passive"})

OURS = "llmpq "
JUDGED = "llmpq int4 a8"  # that the goal is about
CONTENDERS: Mapping[str, Contender] = {
    JUDGED: Contender("int4", _ours, _counted),
    "llama-server Q4_0": Contender("int4", _llama_server, _counted, environments=_WAITS),
    "llama-cpp-python Q4_0": Contender("int4", _llama_cpp_python, _uncounted, "/v1/models", _WAITS),
    "llmpq native a8": Contender("stored", _ours, _counted),
    "llama-server as stored": Contender("stored", _llama_server, _counted, environments=_WAITS),
    "llama-cpp-python as stored": Contender("stored", _llama_cpp_python, _uncounted, "/v1/models", _WAITS),
}
DISTRIBUTIONS = ("llama-cpp-python", "uvicorn", "fastapi")

"""A client of the completions that servers stream in OpenAI's form: what each request waited, or why it failed.

Requests are sent when they come, whatever became of those before. Times count from there, so that a server that takes
connections late does not look faster.
"""

from __future__ import annotations

import asyncio
import json
import time
import urllib.request
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Any

from bench.serving.load import Load
from llmpq.spec import Latency, RequestTimes

_PATH = "/v1/completions"
_PATIENCE_S = 120.0  # for one answer
_STARTS_S = 0.05  # until the first request is sent


class LostError(Exception):
    """A request was not answered in full; the message says how."""


@dataclass(frozen=True)
class Outcome:
    """What became of a load. `lost` says why of each request that was not answered in full."""

    times: tuple[RequestTimes, ...]
    lost: tuple[str, ...]

    @property
    def latency(self) -> Latency | None:
        """None where nothing was answered."""
        return Latency.of(self.times) if self.times else None


Fields = Callable[[int], dict[str, Any]]  # of a body beside prompt and max_tokens, whose number it is told


def send(port: int, load: Load, fields: Fields, patience_s: float = _PATIENCE_S) -> Outcome:
    """Send a load to the server at this port; who has no answer after so many seconds is lost."""
    return asyncio.run(_send(port, load, fields, patience_s))


def is_ready(port: int, path: str) -> bool:
    """Whether the server answers at `path`."""
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=5) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


async def _send(port: int, load: Load, fields: Fields, patience_s: float) -> Outcome:
    start = time.perf_counter() + _STARTS_S

    async def one(number: int) -> RequestTimes:
        asked, arrives_s = load.requests[number], load.arrivals_s[number]
        body = {"prompt": asked.prompt, "max_tokens": asked.output_len, "temperature": 0, "stream": True}
        body |= fields(asked.output_len)
        await asyncio.sleep(max(0.0, start + arrives_s - time.perf_counter()))
        first_s, ended_s = await asyncio.wait_for(_ask(port, body), patience_s)
        return RequestTimes(arrives_s, first_s - start, ended_s - start, asked.output_len)

    found = await asyncio.gather(*map(one, range(len(load.requests))), return_exceptions=True)
    lost = [reason for reason in found if isinstance(reason, BaseException)]
    for reason in lost:
        if not isinstance(reason, (LostError, OSError, asyncio.TimeoutError)):
            raise reason
    times = tuple(one for one in found if isinstance(one, RequestTimes))
    return Outcome(times, tuple(f"{type(reason).__name__}: {reason}" for reason in lost))


async def _ask(port: int, body: dict[str, Any]) -> tuple[float, float]:
    """When the first text of an answer came, and its end. Raises LostError, OSError."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        data = json.dumps(body).encode()
        head = f"POST {_PATH} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\nConnection: close\r\n"
        writer.write(f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data)
        await writer.drain()
        return await _times(_events(reader), body["max_tokens"])
    finally:
        writer.close()


async def _times(events: AsyncIterator[dict[str, Any]], tokens: int) -> tuple[float, float]:
    """When the first text came, and the last event of the choice. Raises LostError if tokens are missing."""
    first: float | None = None
    last, reason, told = 0.0, None, None
    async for event in events:
        if "error" in event:
            raise LostError(f"it was told {str(event['error'])[:200]}")
        told = (event.get("usage") or {}).get("completion_tokens", told)
        for choice in event.get("choices") or ():
            last = time.perf_counter()
            first = last if first is None and choice.get("text") else first
            reason = choice.get("finish_reason") or reason
    if first is None or reason != "length":
        raise LostError(f"the answer ended with {reason!r}, and {'no' if first is None else 'some'} text")
    if told not in (None, tokens):
        raise LostError(f"the answer had {told} tokens of {tokens}")
    return first, last


async def _events(reader: asyncio.StreamReader) -> AsyncIterator[dict[str, Any]]:
    """Those of a stream until its [DONE]. Raises LostError."""
    status, headers = await _head(reader)
    chunked = headers.get("transfer-encoding", "").lower() == "chunked"
    if status != 200:
        raise LostError(f"the status was {status}")
    unread = b""
    async for part in _parts(reader, chunked):
        *lines, unread = (unread + part).split(b"\n")
        for line in lines:
            if not line.startswith(b"data:"):
                continue  # an empty line, or a comment that keeps the connection open
            value = line[5:].strip()
            if value == b"[DONE]":
                return
            yield json.loads(value)
    raise LostError("the stream broke off")


async def _head(reader: asyncio.StreamReader) -> tuple[int, dict[str, str]]:
    """The status and the headers of an answer. Raises LostError."""
    try:
        first, *lines = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
    except asyncio.IncompleteReadError:
        raise LostError("the connection was closed without an answer") from None
    headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    return int(first.split()[1]), headers


async def _parts(reader: asyncio.StreamReader, chunked: bool) -> AsyncIterator[bytes]:
    """The body as it comes."""
    while not chunked and (part := await reader.read(2**16)):
        yield part
    while chunked:
        size = int((await reader.readline()).split(b";")[0] or b"0", 16)
        if size == 0:
            return
        try:
            yield (await reader.readexactly(size + 2))[:-2]
        except asyncio.IncompleteReadError:
            return

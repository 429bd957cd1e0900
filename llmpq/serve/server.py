"""Listens for requests of HTTP until it is told to stop, or the session fails."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import socket
from collections.abc import Iterator

import uvicorn
from fastapi import FastAPI

from llmpq.serve.service import Service
from llmpq.spec import UsageError

_POLL_S = 0.2
LINGER_S = 2.0  # after the session has failed, for /health to tell


def bind(host: str, port: int) -> socket.socket:
    """A socket that nobody can connect to yet; port 0 is any that is free. Raises UsageError."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        bound = socket.socket(family, kind, protocol)
    except (OSError, UnicodeError) as error:  # a name that is none
        raise UsageError(f"cannot listen on {host}: {getattr(error, 'strerror', None) or error}") from None
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
    except OSError as error:
        bound.close()
        raise UsageError(f"cannot listen on {host}, port {port}: {error.strerror}; name another --port") from None
    return bound


def url(bound: socket.socket) -> str:
    """What a client takes as its base."""
    host, port = bound.getsockname()[:2]
    return f"http://{f'[{host}]' if ':' in host else host}:{port}/v1"


class Server:
    """Serves an app on a socket, from which it listens once it is made."""

    def __init__(self, app: FastAPI, service: Service, bound: socket.socket, drain_s: float) -> None:
        """`drain_s`: what runs has so long to end when the server is told to stop."""
        config = uvicorn.Config(
            app,
            log_config=None,
            log_level="error",
            access_log=False,
            lifespan="off",
            ws="none",
            timeout_graceful_shutdown=math.ceil(drain_s + LINGER_S),  # for clients that read nothing
        )
        logging.getLogger("uvicorn.error").addFilter(_is_defect)
        self._uvicorn = _Uvicorn(config)
        self._service, self._socket, self._drain_s = service, bound, drain_s
        bound.listen(config.backlog)

    def stop(self) -> None:
        """Take in nothing more, and end when what runs has ended. From any thread, or a handler of a signal."""
        self._service.draining = self._service.session.stays = True
        self._uvicorn.should_exit = True

    def run(self) -> None:
        """Until `stop`, or until the session fails. What has not ended in time is cancelled."""
        asyncio.run(self._run())

    async def _run(self) -> None:
        serving = asyncio.ensure_future(self._uvicorn.serve([self._socket]))
        while self._service.problem is None and not serving.done():
            await asyncio.wait({serving}, timeout=_POLL_S)
        await asyncio.wait({serving}, timeout=self._drain_s if self._service.session.failure is None else LINGER_S)
        self.stop()
        self._service.session.cancel()
        await serving


def _is_defect(record: logging.LogRecord) -> bool:
    """Whether what uvicorn logs is one: not that a second signal has cut off a request."""
    return not (record.exc_info and isinstance(record.exc_info[1], asyncio.CancelledError))


class _Uvicorn(uvicorn.Server):
    """Leaves signals to the command."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

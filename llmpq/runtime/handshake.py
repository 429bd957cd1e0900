"""Who may talk: processes that know a secret. The first rank's door for the others, and how they pass it.

Each side says a random number first, and then proves with the other's number that it knows the secret, which itself is
never sent. Whoever says something else, or nothing for some seconds, is a stranger: it is named and its connection is
closed; others come in meanwhile, and nothing of what it said is used.
"""

from __future__ import annotations

import hmac
import json
import re
import secrets
import selectors
import socket
import time
from contextlib import suppress
from types import TracebackType
from typing import Any, NamedTuple

from llmpq.progress import warn_once
from llmpq.spec import WorkerLostError
from llmpq.spec.ranges import shown

SECRET = "LLMPQ_SECRET"  # the variable that holds it
HELLO_S = 5.0  # for who has connected to say who it is; at the other end, for each line of the door's
_LONGEST = 1000  # bytes of what it says
_MOST = 64  # that are listened to at once
_PROOF = re.compile("[0-9a-f]{64}")  # as `proof` writes one


def proof(secret: bytes, *said: object) -> str:
    """What only who knows the secret can say of these words, in hexadecimal."""
    return hmac.digest(secret, json.dumps(said).encode(), "sha256").hex()


def _proves(given: object, right: str) -> bool:
    """Whether what somebody has said is the proof that is right."""
    return isinstance(given, str) and _PROOF.fullmatch(given) is not None and hmac.compare_digest(given, right)


class Guest(NamedTuple):
    """A process that knows the secret."""

    rank: int
    host: str  # its name
    address: str
    connection: socket.socket


class _Unknown:
    """Who has connected, and has not said yet who it is."""

    def __init__(self, connection: socket.socket, address: tuple[Any, ...]) -> None:
        self.connection, self.address = connection, address
        self.until = time.monotonic() + HELLO_S
        self.said = b""
        self.number = secrets.token_hex(16)
        connection.setblocking(False)
        with suppress(OSError):
            connection.send(json.dumps({"number": self.number}).encode() + b"\n")

    def read(self) -> bool:
        """Whether there is nothing more to wait for."""
        try:
            data = self.connection.recv(_LONGEST)
        except BlockingIOError:
            return False
        except OSError:
            data = b""
        self.said += data
        return not data or b"\n" in self.said or len(self.said) > _LONGEST

    def guest(self, secret: bytes) -> Guest | None:
        """Who it is; None for a stranger."""
        fields = _object(self.said)
        rank, host, number, given = (fields.get(name) for name in ("rank", "host", "number", "proof"))
        if not (isinstance(rank, int) and isinstance(host, str) and isinstance(number, str)):
            return None
        if not _proves(given, proof(secret, "rank", self.number, rank, host, number)):
            return None
        self.connection.setblocking(True)
        try:
            self.connection.sendall(json.dumps({"proof": proof(secret, "first", number)}).encode() + b"\n")
        except OSError:
            return None
        return Guest(rank, host, self.address[0], self.connection)

    def drop(self) -> None:
        said = f"said {shown(self.said[:40].decode(errors='replace'))}" if self.said else "said nothing"
        warn_once(f"a stranger at {self.address[0]} port {self.address[1]} {said} and was dropped")
        self.connection.close()


class Door:
    """Listens at one address of this host, on a `port` that is free. A context manager. Raises OSError."""

    def __init__(self, address: str, secret: bytes) -> None:
        self._secret = secret
        self._unknown: list[_Unknown] = []
        family, *_, where = socket.getaddrinfo(address, 0, type=socket.SOCK_STREAM)[0]
        self._server = socket.create_server(where, family=family)
        self._server.setblocking(False)
        self.address, self.port = self._server.getsockname()[:2]
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._server, selectors.EVENT_READ)

    def receive(self, until: float) -> Guest | None:
        """The next process that knows the secret; None if none has come by a moment of `time.monotonic`."""
        while (now := time.monotonic()) < until:
            wait_s = min([until, *(each.until for each in self._unknown)]) - now
            for key, _ in self._selector.select(max(0.0, wait_s)):
                if key.data is None:
                    self._open()
                    continue
                unknown: _Unknown = key.data
                if unknown.read():
                    self._forget(unknown)
                    if (guest := unknown.guest(self._secret)) is not None:
                        return guest
                    unknown.drop()
            for late in [each for each in self._unknown if each.until < time.monotonic()]:
                self._forget(late)
                late.drop()
        return None

    def _open(self) -> None:
        try:
            unknown = _Unknown(*self._server.accept())
        except OSError:  # it has gone again
            return
        if len(self._unknown) == _MOST:
            self._forget(oldest := self._unknown[0])
            oldest.drop()
        self._unknown.append(unknown)
        self._selector.register(unknown.connection, selectors.EVENT_READ, unknown)

    def _forget(self, unknown: _Unknown) -> None:
        self._unknown.remove(unknown)
        self._selector.unregister(unknown.connection)

    def __enter__(self) -> Door:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._selector.close()
        self._server.close()
        for each in self._unknown:
            each.connection.close()


def introduce(connection: socket.socket, rank: int, at: str, secret: bytes) -> None:
    """Pass the door at the other end, which is the first rank's. `at` is where, for messages.

    Raises WorkerLostError if who is there does not know the secret, or does not take ours for it; OSError.
    """
    theirs, number, host = _line(connection).get("number"), secrets.token_hex(16), socket.gethostname()
    hello = {"rank": rank, "host": host, "number": number, "proof": proof(secret, "rank", theirs, rank, host, number)}
    connection.sendall(json.dumps(hello).encode() + b"\n")
    if not _proves(_line(connection).get("proof"), proof(secret, "first", number)):
        connection.close()
        raise WorkerLostError(
            f"who listens at {at} does not know this rank's secret; give all ranks one {SECRET}, and as MASTER_ADDR "
            "the address of rank 0"
        )


def _line(connection: socket.socket) -> dict[str, Any]:
    """The next line, and no more; empty if that is none of ours. Raises OSError, within HELLO_S."""
    until, line = time.monotonic() + HELLO_S, b""
    while not line.endswith(b"\n") and len(line) < _LONGEST:
        if (left_s := until - time.monotonic()) <= 0:
            raise TimeoutError("timed out")
        connection.settimeout(left_s)
        if not (byte := connection.recv(1)):
            break
        line += byte
    connection.settimeout(HELLO_S)
    return _object(line)


def _object(line: bytes) -> dict[str, Any]:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}

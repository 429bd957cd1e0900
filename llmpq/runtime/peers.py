"""The ranks of a pipeline on several hosts hear of each other: all others through one connection to the first.

So each has its answer within seconds, whatever waits for a message of another: a rank that does not come, falls silent,
ends or fails is lost to all of them. Who they are is settled before (handshake.py).
"""

from __future__ import annotations

import ipaddress
import json
import os
import secrets
import select
import socket
import struct
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmpq.runtime.handshake import SECRET, Door, introduce
from llmpq.runtime.party import Party
from llmpq.spec import WorkerLostError

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store  # torch.distributed's own

SILENCE_S = 10.0
_BEAT_S = 1.0
_RETRY_S = 0.2
_SIOCGIFADDR = 0x8915  # Linux


def meeting_s() -> float:
    """The seconds for which ranks wait for each other at first."""
    return float(os.environ.get("LLMPQ_MEETING_S", "20"))


class Peer(Party):
    """Another rank: its connection, and what it has said."""

    def __init__(self, rank: int, host: str, connection: socket.socket) -> None:
        super().__init__(rank, connection.fileno(), SILENCE_S)
        connection.settimeout(SILENCE_S)  # of a send
        self.host, self.connection = host, connection
        self.started = True
        self.ready = 0  # for how many pipelines it was
        self.needed = False  # its stage is one of a pipeline that runs
        self.shared: deque[str] = deque()
        self.outward: str | None = None  # an address by which other hosts reach the first rank; see outward_interface
        self._failure = (0, "")  # that it told of: how surely that is a cause (see Party.failure), and what it is
        self._left = False
        self._lock = threading.Lock()
        threading.Thread(target=self._beat, name="beats", daemon=True).start()

    @property
    def local_address(self) -> str:
        """This host's end of the connection."""
        return _plain(self.connection.getsockname()[0])

    def send(self, event: str, **fields: Any) -> None:
        """Send an event. If it cannot be, the connection's end or silence tells."""
        with self._lock, suppress(OSError):
            self.connection.sendall(json.dumps({"event": event, **fields}).encode() + b"\n")

    def leave(self) -> None:
        """Nothing more is sent."""
        self.send("bye")
        with suppress(OSError):
            self.connection.shutdown(socket.SHUT_WR)

    def _beat(self) -> None:
        with suppress(OSError, ValueError):  # the connection is closed
            while True:
                if select.select([], [self.connection], [], 0)[1]:  # the other may be stopped
                    self.send("heartbeat", doing="")
                time.sleep(_BEAT_S)

    def _note(self, event: dict[str, Any]) -> bool:
        if event["event"] == "failure":
            self._failure = max(self._failure, (event["certainty"], event["message"]))
        elif event["event"] == "bye":
            self._left = True
        elif event["event"] == "ready":
            self.ready += 1
        elif event["event"] == "shared":
            self.shared.append(event["text"])
        elif event["event"] == "welcome":
            self.outward = event["outward"]
        else:
            return super()._note(event)
        return True

    def failure(self) -> int:
        if self._failure[0]:
            return self._failure[0]
        if self._left:
            return 2 if self.needed else 0
        return super().failure()

    def describe_loss(self) -> str:
        who = f"rank {self.rank} on {self.host}"
        if self._failure[0]:
            return self._failure[1]
        if self._left:
            return f"{who} has ended before the pipeline did"
        return (
            f"{who} was lost: its connection ended" if self.ended else f"{who} has not answered for {SILENCE_S:.0f} s"
        )


def host_name(address: str) -> str:
    """This host, in messages to others."""
    return f"{socket.gethostname()} ({address})"


def _plain(address: str) -> str:
    """IPv4 addresses of a socket for both versions look like IPv6."""
    return address.removeprefix("::ffff:")


def _is_loopback(address: str) -> bool:
    return ipaddress.ip_address(address.partition("%")[0]).is_loopback


def receive_ranks(store: Store, world_size: int, address: str, at: str, secret: bytes) -> list[Peer]:
    """On the first rank: wait for all others, who know the secret, at an address of this host. `at` is for messages.

    Raises WorkerLostError if one does not come in time; OSError if this host does not have the address.
    """
    seconds = meeting_s()
    until = time.monotonic() + seconds
    peers: dict[int, Peer] = {}
    with Door(address, secret) as door:
        store.set("meeting", str(door.port))
        while len(peers) < world_size - 1:
            guest = door.receive(until)
            if guest is None:
                # The host's own name may stand for the loopback on it.
                where = f", which is {door.address} here," if _is_loopback(door.address) else ""
                missing = [str(rank) for rank in range(1, world_size) if rank not in peers]
                error = WorkerLostError(
                    f"rank {' and '.join(missing)} of {world_size} has not come to {at}{where} within {seconds:.0f} s; "
                    f"start all ranks at about the same time (LLMPQ_MEETING_S gives them longer)"
                )
                for peer in peers.values():
                    peer.send("failure", certainty=5, message=str(error))
                    peer.leave()
                raise error
            if 0 < guest.rank < world_size and guest.rank not in peers:
                name = f"{guest.host} ({_plain(guest.address)})"
                peers[guest.rank] = Peer(guest.rank, name, guest.connection)
            else:
                guest.connection.close()
    outward = next((p.local_address for p in peers.values() if not _is_loopback(p.local_address)), None)
    for peer in peers.values():
        peer.outward = outward or peer.local_address
        peer.send("welcome", outward=peer.outward)
    return list(peers.values())


def join_first(
    open_store: Callable[[timedelta], Store], host: str, port: int, address: str, rank: int, secret: Callable[[], bytes]
) -> Peer:
    """On every other rank: the first one, at its address. `open_store` opens the store at `host` and `port`.

    `secret` is called once that is open.

    Raises WorkerLostError if the first is not there in time, or who is there does not know the secret.
    """
    seconds = meeting_s()
    until = time.monotonic() + seconds
    try:
        _await_port(host, port, until)
        store = open_store(timedelta(seconds=seconds))
        store.wait(["meeting"], timedelta(seconds=max(0.1, until - time.monotonic())))
        at = int(store.get("meeting"))
        connection = socket.create_connection((address, at), timeout=max(0.1, until - time.monotonic()))
        introduce(connection, rank, f"{host}:{at}", secret())
    except (OSError, RuntimeError) as error:  # the store's own errors are RuntimeErrors
        why = f" ({error.strerror or error})" if isinstance(error, OSError) else ""
        raise WorkerLostError(
            f"rank 0 has not come to {host}:{port} within {seconds:.0f} s{why}; start all ranks at about the same "
            f"time, with one MASTER_ADDR that every host reaches (LLMPQ_MEETING_S gives them longer)"
        ) from None
    return Peer(0, host, connection)


def _await_port(host: str, port: int, until: float) -> None:
    """Until something listens there. Raises the last try's OSError."""
    while True:
        try:
            socket.create_connection((host, port), timeout=max(0.1, until - time.monotonic())).close()
            return
        except OSError:
            if time.monotonic() + _RETRY_S > until:
                raise
            time.sleep(_RETRY_S)


def outward_interface(peers: list[Peer]) -> str | None:
    """The network interface through which this host meets the others; None if that is not known."""
    addresses = [address for peer in peers for address in (peer.local_address, peer.outward) if address is not None]
    return interface_of(next((address for address in addresses if not _is_loopback(address)), "127.0.0.1"))


def loopback() -> str:
    """This system's loopback interface."""
    return "lo0" if sys.platform == "darwin" else "lo"


def transports_on(interface: str, secret: str) -> dict[str, str]:
    """Variables with which a process's transports listen on this network interface alone, and it knows a secret.

    The names are gloo's and NCCL's. Without an interface, gloo takes that of this host's name, if it has one.
    """
    return {"GLOO_SOCKET_IFNAME": interface, "NCCL_SOCKET_IFNAME": interface, SECRET: secret}


def among_us() -> dict[str, str]:
    """These variables for processes of this host that meet each other alone."""
    return transports_on(loopback(), secrets.token_hex(16))


def interface_of(address: str) -> str | None:
    """The network interface that has an address; None if that is not known (not all systems say it)."""
    if _is_loopback(address):
        return loopback()
    if sys.platform != "linux":
        return None
    import fcntl

    wanted = ipaddress.ip_address(address.partition("%")[0])
    if wanted.version == 6:
        lines = [line.split() for line in Path("/proc/net/if_inet6").read_text().splitlines()]
        return next((name for digits, *_, name in lines if int(digits, 16) == int(wanted)), None)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            with suppress(OSError):  # it has no address
                found = fcntl.ioctl(probe.fileno(), _SIOCGIFADDR, struct.pack("256s", name.encode()))
                if found[20:24] == wanted.packed:
                    return name
    return None

"""How the stages of a pipeline meet, by a store that all of them know, and a secret that each shows the next one; and
how they part.
"""

from __future__ import annotations

import hmac
import os
import socket
import stat
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import FileStore, PrefixStore, Store, TCPStore  # torch.distributed's own

from llmpq.runtime.control import Control, Left
from llmpq.runtime.handshake import SECRET, proof
from llmpq.runtime.memory_watch import is_failed_allocation
from llmpq.spec import WorkerLostError

FOREVER = timedelta(days=365)  # no timeout: worker_group.py watches the workers
_PROOF_BYTES = 32
_POLL_S = 0.02  # whether this process is leaving
_AGAIN_S = 0.05  # to cut links of who has not left


class LinkLostError(Exception):
    """The process at the other end of a link is gone, or this one has cut it."""


@contextmanager
def links_may_end() -> Iterator[None]:
    """Within, what torch.distributed raises is a LinkLostError, unless there was no memory."""
    try:
        yield
    except RuntimeError as error:
        if is_failed_allocation(error):
            raise
        raise LinkLostError(str(error)) from error


def open_store(address: str, world_size: int) -> Store:
    """The store through which processes find each other: `file:PATH` or, of a running one, `tcp:HOST:PORT:PREFIX`."""
    kind, _, rest = address.partition(":")
    if kind == "file":
        return FileStore(rest, world_size)
    host, port, prefix = rest.rsplit(":", 2)
    return PrefixStore(prefix, TCPStore(host, int(port), is_master=False, timeout=FOREVER))


@links_may_end()
def join(store: Store, rank: int, world_size: int, leaving: threading.Event | None = None) -> None:
    """Meet the other stages. Returns when all are there, and those that this one hears of have shown the
    secret of this process's environment.

    gloo lets in whoever speaks its protocol. Raises WorkerLostError if that is not one of us, LinkLostError if one of
    us is lost meanwhile, or, at once, if this one is `leaving`.
    """
    secret = os.environ[SECRET].encode()
    here = [f"here/{i}" for i in range(world_size)]
    with _waiting_ends(store, leaving or threading.Event()):
        store.set(here[rank], "")
        store.wait(here, FOREVER)  # gloo would try for long to reach one that has been here, and is gone
        dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size, timeout=FOREVER)
    previous, following = (rank - 1) % world_size, (rank + 1) % world_size
    shown = torch.empty(_PROOF_BYTES, dtype=torch.uint8)
    sending, receiving = dist.isend(_proof(secret, rank, following), following), dist.irecv(shown, previous)
    assert sending is not None and receiving is not None
    receiving.wait()
    if not hmac.compare_digest(bytes(shown.tolist()), bytes(_proof(secret, previous, rank).tolist())):
        raise WorkerLostError(f"a stranger has come to stage {rank} in the place of stage {previous}; start again")
    sending.wait()


@contextmanager
def _waiting_ends(store: Store, leaving: threading.Event) -> Iterator[None]:
    """Within, waiting for what a store in a file lacks ends once this process is leaving, and the store with it.
    Waiting for one that is reached by a link ends with that.
    """
    over = threading.Event()

    def watch(path: Path) -> None:
        while not over.wait(_POLL_S):
            if leaving.is_set():
                # torch looks at nothing but the file, and would wait for one that is missing.
                unreadable = path.with_name(f"{path.name}-{os.getpid()}")
                with suppress(FileNotFoundError):  # its folder may be gone, too
                    unreadable.symlink_to(path)
                    unreadable.replace(path)
                return

    if not isinstance(store, FileStore):
        yield
        return
    watching = threading.Thread(target=watch, args=(Path(store.path),), name="meeting", daemon=True)  # type: ignore[attr-defined]
    watching.start()
    try:
        yield
    finally:
        over.set()
        watching.join()


def _proof(secret: bytes, source: int, target: int) -> torch.Tensor:
    """uint8 [_PROOF_BYTES]: what a stage shows another before its first message."""
    return torch.tensor(list(bytes.fromhex(proof(secret, "link", source, target))), dtype=torch.uint8)


@contextmanager
def taking_part(control: Control) -> Iterator[None]:
    """Within, this process takes part in a pipeline, until it is told to leave; after it, it has left.

    A thread that waits for a message is not freed by what torch.distributed calls abort, shutdown and destroy, but by
    the end of its connection. So all are cut. If a link ends before, that is reported, and what is to be done about it
    is waited for.
    """
    left = threading.Event()
    cutter = threading.Thread(target=_cut_links, args=(control.leaving, left), name="leaving", daemon=True)
    cutter.start()
    try:
        yield
    except Left:
        pass
    except LinkLostError as error:
        if not control.leaving.is_set():
            control.report(error)
            control.leaving.wait()
    left.set()
    cutter.join()
    if dist.is_initialized():
        dist.destroy_process_group()


def _cut_links(leaving: threading.Event, left: threading.Event) -> None:
    """End this process's connections once it is leaving, until it has left."""
    leaving.wait()
    while True:  # once at least: another thread may wait for a message, though nothing has kept this one
        for descriptor in map(int, os.listdir("/dev/fd")):
            with suppress(OSError):  # it has been closed meanwhile, or is connected to nobody
                if stat.S_ISSOCK(os.fstat(descriptor).st_mode):
                    _cut(descriptor)
        if left.wait(_AGAIN_S):
            return


def _cut(descriptor: int) -> None:
    """End a connection of the network."""
    with socket.socket(fileno=os.dup(descriptor)) as connection:
        if connection.family in (socket.AF_INET, socket.AF_INET6) and connection.getpeername():
            connection.shutdown(socket.SHUT_RDWR)

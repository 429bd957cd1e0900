"""This process as one of torchrun's, or of any launcher that sets the same variables: its rank, and the other ranks.

The ranks show each other that they know a secret: LLMPQ_SECRET, or on one host a random one that lies in the store.
The store asks nobody who they are: whoever reaches it, as any user of the host does, can read that one.
"""

from __future__ import annotations

import atexit
import os
import secrets
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta

from torch._C._distributed_c10d import PrefixStore, Store, TCPStore  # torch.distributed's own

from llmpq.runtime.handshake import SECRET, proof
from llmpq.runtime.party import Listener
from llmpq.runtime.peers import Peer, host_name, join_first, meeting_s, outward_interface, receive_ranks
from llmpq.spec import LlmpqError, UsageError, WorkerLostError

GRACE_S = 2.0  # see Listener; the cause may be on another host
_SHORTEST = 16  # characters


@dataclass
class Rank:
    """Rank i runs stage i of a plan; ranks beyond its stages have nothing to do."""

    rank: int
    world_size: int
    host: str
    port: int
    one_host: bool
    prefix: str
    peers: list[Peer] = field(default_factory=list, repr=False)  # the others on the first rank, the first on the others
    _secret: bytes = field(default=b"", repr=False)
    _count: int = 0
    _store: Store | None = field(default=None, repr=False)
    _told: int = 0  # certainty of what the others know

    @classmethod
    def current(cls) -> Rank | None:
        """From torchrun's environment variables; None without them."""
        environment = os.environ
        if not {"RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"} <= environment.keys():
            return None
        return cls(
            rank=int(environment["RANK"]),
            world_size=int(environment["WORLD_SIZE"]),
            host=environment["MASTER_ADDR"],
            port=int(environment["MASTER_PORT"]),
            one_host=environment.get("LOCAL_WORLD_SIZE") == environment["WORLD_SIZE"],
            prefix=f"llmpq-{environment.get('TORCHELASTIC_RESTART_COUNT', '0')}",
        )

    @property
    def first(self) -> bool:
        return self.rank == 0

    @property
    def here(self) -> str:
        """This rank's host, in messages to others."""
        addresses = [peer.local_address for peer in self.peers]
        return host_name(addresses[0]) if addresses else socket.gethostname()

    def meet(self) -> None:
        """Wait for the other ranks.

        Raises WorkerLostError if one does not come in time, UsageError without a secret.
        """
        if self._store is not None or self.world_size == 1:
            return
        given = os.environ.get(SECRET, "")
        if len(given) < _SHORTEST and (given or not self.one_host):
            raise UsageError(
                f"{SECRET} {'is too short' if given else 'is missing'}; set it to one text of {_SHORTEST} characters "
                "or more at all ranks, such as `llmpq plan` shows, so that nobody else takes part"
            )
        address = "localhost" if self.one_host else self.host
        if self.first:
            # torchrun's agent keeps a store of its own; other launchers leave it to the first rank.
            store = self._open(timedelta(seconds=meeting_s()), os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True")
            if not given:
                store.set("secret", secrets.token_hex(_SHORTEST))
            self._secret = given.encode() or store.get("secret")
            try:
                self.peers = receive_ranks(store, self.world_size, address, f"{self.host}:{self.port}", self._secret)
            except OSError as error:
                raise self._cannot_wait(error.strerror or str(error)) from None
        else:

            def secret() -> bytes:
                assert self._store is not None
                return given.encode() or self._store.get("secret")

            self.peers = [join_first(self._open, self.host, self.port, address, self.rank, secret)]
            self._secret = secret()
            self._listen_until(lambda: self.peers[0].outward is not None)
        for peer in self.peers:
            atexit.register(peer.leave)

    def share(self, text: str | None) -> str:
        """The first rank's text, at every rank; all call this in the same order, the others with None.

        Raises WorkerLostError if the first is lost.
        """
        self.meet()
        if self.first:
            if text is None:
                raise ValueError("text is None; the first rank has to share one")
            for peer in self.peers:
                peer.send("shared", text=text)
            return text
        self._listen_until(lambda: self.peers[0].shared)
        return self.peers[0].shared.popleft()

    def new_pipeline(self, stages: int) -> tuple[str, str]:
        """The address of its store, for meeting.open_store, and its secret, once the ranks of all stages ask for it.

        They do so in the same order. From now on none of them may end, until `let_go`. Raises WorkerLostError.
        """
        self.meet()
        self._count += 1
        for peer in self.peers:
            peer.needed = peer.rank < stages
            peer.send("ready")
        self._listen_until(lambda: all(peer.ready >= self._count for peer in self.peers if peer.needed))
        name = f"{self.prefix}-pipeline-{self._count}"
        return f"tcp:{self.host}:{self.port}:{name}", proof(self._secret, name)

    def interface(self) -> str | None:
        """The network interface through which this host meets the others; None if that is not known."""
        return outward_interface(self.peers)

    def let_go(self) -> None:
        """The other ranks may end."""
        for peer in self.peers:
            peer.needed = False

    def tell(self, certainty: int, error: BaseException) -> None:
        """Tell the other ranks of an error, unless they know of a surer one. `certainty`: see Party.failure."""
        if certainty <= self._told:
            return
        self._told = certainty
        message = str(error) if isinstance(error, WorkerLostError) else f"rank {self.rank} on {self.here}: {error}"
        for peer in self.peers:
            peer.send("failure", certainty=certainty, message=message)

    @contextmanager
    def telling(self) -> Iterator[None]:
        """Meet the other ranks, and tell them of an error in the block."""
        try:
            self.meet()
            yield
        except BaseException as error:
            # What is no LlmpqError may be the effect of another rank's failure: torchrun ends the rest by SIGTERM.
            self.tell(5 if isinstance(error, LlmpqError) else 2, error)
            raise

    def _listen_until(self, condition: Callable[[], object]) -> None:
        listener = Listener[Peer](GRACE_S, self.tell)
        for peer in self.peers:
            listener.listen_to(peer)
        listener.listen_until(condition)

    def _open(self, timeout: timedelta, keeps: bool = False) -> Store:
        """The store. `keeps`: it is this process's, and listens at the address given alone."""
        listening = self._listening() if keeps else None
        try:
            store = TCPStore(
                self.host,
                self.port,
                is_master=keeps,
                timeout=timeout,
                wait_for_workers=False,
                master_listen_fd=listening,
            )
        except RuntimeError as error:
            if not keeps:
                raise
            raise self._cannot_wait(str(error).partition("\n")[0]) from None
        self._store = PrefixStore(self.prefix, store)
        return self._store

    def _listening(self) -> int:
        """The descriptor of a socket for the store, which closes it. Raises UsageError."""
        try:
            family, *_, where = socket.getaddrinfo(self.host, self.port, type=socket.SOCK_STREAM)[0]
            return socket.create_server(where, family=family).detach()
        except OSError as error:
            raise self._cannot_wait(error.strerror or str(error)) from None

    def _cannot_wait(self, problem: str) -> UsageError:
        return UsageError(
            f"cannot wait for other ranks at {self.host}:{self.port}: {problem}; MASTER_ADDR has to be an address of "
            "rank 0's host"
        )

"""This process as one of torchrun's: its rank, and texts that the ranks share through torchrun's store."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from datetime import timedelta

from torch._C._distributed_c10d import PrefixStore, Store, TCPStore  # torch.distributed's own

_PLANNING_TIMEOUT = timedelta(days=1)  # torchrun ends all ranks if one fails


@dataclass
class Rank:
    """Rank i runs stage i of a plan; ranks beyond its stages have nothing to do."""

    rank: int
    world_size: int
    host: str
    port: int
    one_host: bool
    prefix: str
    _count: int = 0
    _store: Store | None = field(default=None, repr=False)

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

    def share(self, text: str | None) -> str:
        """The first rank's text, at every rank; all call this in the same order, the others with None."""
        store, key = self._open(), f"shared-{self._next()}"
        if self.first:
            if text is None:
                raise ValueError("text is None; the first rank has to share one")
            store.set(key, text)
            return text
        shared: bytes = store.get(key)
        return shared.decode()

    def store_address(self) -> str:
        """Of the store of a new pipeline, for communication.open_store; all ranks call this in the same order."""
        self._open()
        return f"tcp:{self.host}:{self.port}:{self.prefix}-pipeline-{self._next()}"

    def _next(self) -> int:
        self._count += 1
        return self._count

    def _open(self) -> Store:
        if self._store is None:
            # torchrun's agent keeps a store of its own; other launchers leave it to the first rank.
            keeps = self.first and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
            store = TCPStore(self.host, self.port, is_master=keeps, timeout=_PLANNING_TIMEOUT)
            self._store = PrefixStore(self.prefix, store)
        return self._store

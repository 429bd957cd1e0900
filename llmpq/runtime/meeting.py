"""How the stages of a pipeline meet: by a store that all of them know, and a secret that each shows the next one."""

from __future__ import annotations

import hmac
import os
from datetime import timedelta

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import FileStore, PrefixStore, Store, TCPStore  # torch.distributed's own

from llmpq.runtime.handshake import SECRET, proof
from llmpq.spec import WorkerLostError

FOREVER = timedelta(days=365)  # no timeout: launch.py watches the workers
_PROOF_BYTES = 32


def open_store(address: str, world_size: int) -> Store:
    """The store through which processes find each other: `file:PATH` or, of a running one, `tcp:HOST:PORT:PREFIX`."""
    kind, _, rest = address.partition(":")
    if kind == "file":
        return FileStore(rest, world_size)
    host, port, prefix = rest.rsplit(":", 2)
    return PrefixStore(prefix, TCPStore(host, int(port), is_master=False, timeout=FOREVER))


def join(store: Store, rank: int, world_size: int) -> None:
    """Meet the other stages. Returns when all are there, and those that this one hears of have shown the
    secret of this process's environment.

    gloo lets in whoever speaks its protocol. Raises WorkerLostError if that is not one of us.
    """
    secret = os.environ[SECRET].encode()
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size, timeout=FOREVER)
    previous, following = (rank - 1) % world_size, (rank + 1) % world_size
    shown = torch.empty(_PROOF_BYTES, dtype=torch.uint8)
    sending, receiving = dist.isend(_proof(secret, rank, following), following), dist.irecv(shown, previous)
    assert sending is not None and receiving is not None
    receiving.wait()
    if not hmac.compare_digest(bytes(shown.tolist()), bytes(_proof(secret, previous, rank).tolist())):
        raise WorkerLostError(f"a stranger has come to stage {rank} in the place of stage {previous}; start again")
    sending.wait()


def _proof(secret: bytes, source: int, target: int) -> torch.Tensor:
    """uint8 [_PROOF_BYTES]: what a stage shows another before its first message."""
    return torch.tensor(list(bytes.fromhex(proof(secret, "link", source, target))), dtype=torch.uint8)
